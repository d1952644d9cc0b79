"""A tiled MLP: the losses of the whole one, its gradients, fewer bytes; on ranks of FSDP 1 and 2, and with dropout."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from training_runs import run, train
from transformers import LlamaConfig, LlamaForCausalLM

from nbutils.common.refused import Refused
from nbutils.launching.rehearsal import keep_four_bit_weights_in_order
from nbutils.models.loading import load_nf4
from nbutils.training.prep import prepare_for_fsdp_qlora
from nbutils.training.tiled_mlp import refuse_tiles, tile_mlps

LAYERS, HIDDEN = 2, 64
IDS = torch.arange(34).view(2, 17)  # 34 tokens: three tiles are not of one height


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=192, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    keep_four_bit_weights_in_order()
    return str(folder)


def with_adapter(
    base: str, dtype=torch.bfloat16, dropout=0.0, targets="all-linear", checkpoints=True, reentrant=False
) -> nn.Module:
    """NF4, PEFT's adapter, checkpoints of the layers."""
    model = prepare_for_fsdp_qlora(
        load_nf4(base), activation_checkpointing=checkpoints, use_reentrant=reentrant
    )
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False).train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def tile(model: nn.Module, tiles: int) -> nn.Module:
    model = copy.deepcopy(model)
    assert tile_mlps(model, tiles) == LAYERS
    return model


def step(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def furthest(found: dict, wanted: dict) -> float:
    """Of all gradients, the largest difference in parts of a gradient's norm."""
    assert found.keys() == wanted.keys() and all(gradient.any() for gradient in wanted.values())
    return max(((found[n] - wanted[n]).float().norm() / wanted[n].float().norm()).item() for n in wanted)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_the_loss_is_the_whole_mlps_and_gradients_differ_by_the_sum_over_tiles(base, dtype, near, reentrant):
    whole = with_adapter(base, dtype, reentrant=reentrant)
    if reentrant:  # its checkpoint wants an input that asks for a gradient
        whole.enable_input_require_grads()
    tiled = tile(whole, 3)
    (wanted_loss, wanted), (loss, found) = step(whole), step(tiled)
    assert loss == wanted_loss
    assert furthest(found, wanted) < near
    assert len(found) == 7 * LAYERS * 2


def test_an_adapter_of_the_mlp_alone_gets_its_gradient_in_the_first_layer_too(base):
    """Without checkpoints, which make the first layer's input ask for a gradient."""
    whole = with_adapter(
        base, torch.float32, targets=["gate_proj", "up_proj", "down_proj"], checkpoints=False
    )
    _, wanted = step(whole)
    _, found = step(tile(whole, 3))
    assert furthest(found, wanted) < 1e-5


def test_dropout_drops_in_the_second_computation_what_it_dropped_in_the_first(base):
    """Beside the same tiles in plain autograd, which computes each of them once."""
    model = with_adapter(base, torch.float32, dropout=0.5)
    plain, other = tile(model, 1), tile(model, 3)
    for layer in plain.get_base_model().model.layers:
        mlp = layer.mlp.forward.args[0]
        layer.mlp.forward = lambda x, mlp=mlp: torch.cat([mlp(t) for t in x.view(-1, HIDDEN).chunk(3)]).view(
            x.shape
        )
    (wanted_loss, wanted), (loss, found) = step(plain), step(other)
    assert loss == wanted_loss
    assert furthest(found, wanted) < 1e-5


def test_a_checkpoint_stops_at_the_mlps_input(base):
    """Each tile is computed twice: in the forward pass, and in its own backward pass. Never a third time."""
    model = tile(with_adapter(base), 3)
    seen = []
    for layer in model.get_base_model().model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    step(model)
    assert seen.count(False) == seen.count(True) == 3 * LAYERS


@pytest.mark.parametrize(("tiles", "kept"), [(0, 8), (3, 1)])
def test_tiled_it_keeps_its_input_and_nothing_else(base, tiles, kept):
    """In tensors of the hidden width, or more; the whole one keeps thirteen of them: its width is three times that."""
    model = with_adapter(base)
    mlp = (tile(model, tiles) if tiles else model).get_base_model().model.layers[0].mlp
    x = torch.randn(1, 256, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    saved = {}
    weights = {p.untyped_storage().data_ptr() for p in mlp.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = mlp(x)
    found = sum(saved.values()) / (x.numel() * 2)
    assert made.requires_grad and (found == kept if tiles else found > kept)


@pytest.mark.parametrize(("told", "words"), [
    ((-1, False, 0.0), "mlp_tiles is -1; wanted 0"),
    ((8, True, 0.1), "with compile_layers and lora_dropout 0.1"),
])  # fmt: skip
def test_no_number_of_tiles_and_compiled_dropout_are_refused(told, words):
    with pytest.raises(Refused, match=words):
        refuse_tiles(*told)


@pytest.mark.parametrize("told", [(0, True, 0.1), (8, True, 0.0), (8, False, 0.1)])
def test_each_of_these_alone_is_not(told):
    refuse_tiles(*told)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The script on two ranks, whole and in tiles; weights on the ranks."""
    folder = tmp_path_factory.mktemp("tiles")
    more = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no", "lora_dropout": 0}
    plan = [
        run(folder, f"{tiles} {fsdp}", f"tiles{tiles}_{fsdp}", fsdp, **more, mlp_tiles=tiles,
            gradient_accumulation_steps=2)
        for fsdp in (1, 2) for tiles in (0, 4)
    ]  # fmt: skip
    return folder, train(folder, plan)


@pytest.mark.launch
@pytest.mark.parametrize("fsdp", [1, 2])
def test_on_two_ranks_it_trains_what_the_whole_mlp_trains(trained, fsdp):
    folder, seen = trained
    for tiles in (0, 4):
        assert seen[f"{tiles} {fsdp}"]["status"] == [0, 0], seen[f"{tiles} {fsdp}"]["output"]
    whole, tiled = (
        json.loads((folder / f"tiles{tiles}_{fsdp}" / "run.json").read_text())["training"] for tiles in (0, 4)
    )
    assert tiled["loss_first"] == whole["loss_first"]
    for name in ("loss_last", "held_out_loss_after"):
        assert tiled[name] == pytest.approx(whole[name], abs=0.005)
    wanted, found = (
        load_file(folder / f"tiles{tiles}_{fsdp}" / "adapter" / "adapter_model.safetensors")
        for tiles in (0, 4)
    )
    assert len(found) == 7 * 4 * 2
    moved = {name: one for name, one in wanted.items() if "lora_B" in name}  # they begin at zero
    assert furthest({name: found[name] for name in moved}, moved) < 0.1
