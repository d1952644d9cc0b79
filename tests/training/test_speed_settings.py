"""Settings beyond the recipe of 2024: what each of them leaves as it was, and what it saves."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import transformers.modeling_utils
from peft import LoraConfig, get_peft_model
from torch import nn
from training_runs import run, train
from transformers import LlamaConfig, LlamaForCausalLM

from nbutils.common.paths import ROOT
from nbutils.launching.rehearsal import keep_four_bit_weights_in_order
from nbutils.models.loading import load_nf4
from nbutils.patches.activation_offload import WaitOnHost, copy_activations_beside_compute
from nbutils.training.compiled_layers import adapter_first
from nbutils.training.host_embeddings import keep_embeddings_on_host, refuse_offloaded_head

COMPILER = os.environ.get("CXX", "g++")  # torch.compile writes C++ for a CPU


# ---- the real script on two processes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The script under both versions, plain and with a setting; dropout, and evaluations between the steps."""
    folder = tmp_path_factory.mktemp("speed")
    more = {
        "max_steps": 4,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
    }
    plan = []
    for fsdp in (1, 2):
        plan.append(run(folder, f"plain {fsdp}", f"plain{fsdp}", fsdp, **more))
        plan.append(run(folder, f"host {fsdp}", f"host{fsdp}", fsdp, **more, embeddings_on_host="true"))
    plan.append(run(folder, "compiled 1", "compiled1", 1, **more, compile_layers="true"))
    seen = train(folder, plan)
    return folder, seen


@pytest.mark.launch
@pytest.mark.parametrize("fsdp", [1, 2])
def test_embeddings_on_the_host_change_no_bit_of_the_adapter(trained, fsdp):
    folder, seen = trained
    for name in (f"plain {fsdp}", f"host {fsdp}"):
        assert seen[name]["status"] == [0, 0], seen[name]["output"]
    plain, host = (
        json.loads((folder / f"{way}{fsdp}" / "run.json").read_text()) for way in ("plain", "host")
    )
    assert plain["adapter"]["tensors"] == host["adapter"]["tensors"] == 7 * 4 * 2
    assert host["adapter"]["sha256"] == plain["adapter"]["sha256"]
    for name in ("loss_last", "held_out_loss_before", "held_out_loss_after"):
        assert host["training"][name] == plain["training"][name]
    assert host["training"]["held_out_loss_after"] != host["training"]["held_out_loss_before"]


@pytest.mark.launch
def test_compiled_layers_are_refused_under_fsdp_1(trained):
    folder, seen = trained
    assert seen["compiled 1"]["status"] == [1, 1]
    assert all("compile_layers wants FSDP 2" in output for output in seen["compiled 1"]["output"])
    assert not (folder / "compiled1" / "adapter").exists()


# ---- embedding and head on the host ---------------------------------------------------------------------------------


def small_llama(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16)


def with_adapter(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def loss_and_gradients(model: nn.Module) -> list[torch.Tensor]:
    ids = torch.arange(32).view(2, 16)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize(
    ("version", "offload", "refused"), [("2", "true", True), ("2", "false", False), ("1", "true", False)]
)
def test_fsdp_2_with_offload_is_refused_while_the_head_is_fsdps(monkeypatch, version, offload, refused):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", offload)
    with pytest.raises(ValueError, match="wants embeddings_on_host: true") if refused else nullcontext():
        refuse_offloaded_head()


def test_the_heads_copy_is_there_for_the_loss_alone():
    model = with_adapter(keep_embeddings_on_host(small_llama().requires_grad_(False)))
    head = model.get_output_embeddings()
    in_layers = []
    layer = model.base_model.model.model.layers[0]
    layer.register_forward_pre_hook(lambda *_: in_layers.append(head.on_device is not None))
    ids = torch.arange(32).view(2, 16)

    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert head.on_device is not None
    loss.backward()
    assert head.on_device is None

    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert head.on_device is not None  # no gradient tells it that the loss is done
    model(input_ids=ids, use_cache=False)
    assert in_layers == [False, False, False]


def test_on_the_host_loss_and_gradients_keep_every_bit():
    plain = loss_and_gradients(with_adapter(small_llama().requires_grad_(False)))
    moved = loss_and_gradients(with_adapter(keep_embeddings_on_host(small_llama().requires_grad_(False))))
    assert len(plain) == len(moved) == 1 + 2 * 7 * 2
    assert all(torch.equal(one, other) for one, other in zip(plain, moved))
    assert all(gradient.any() for gradient in moved)


def test_on_the_host_nothing_of_embedding_and_head_is_left_for_fsdp():
    model = keep_embeddings_on_host(small_llama().requires_grad_(False))
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert list(module.parameters()) == list(module.buffers()) == []


@pytest.mark.parametrize("trained", ["embed_tokens", "lm_head"])
def test_a_trained_embedding_or_head_is_refused(trained):
    model = small_llama().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if trained in name:
            parameter.requires_grad_(True)
    with pytest.raises(ValueError, match="only while they are frozen; one of them is trained"):
        keep_embeddings_on_host(model)


# ---- compiled layers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What tests/ranks/compiled_step.py saw."""
    if not shutil.which(COMPILER):
        pytest.skip(f"torch.compile needs a C++ compiler on a CPU, and there is no {COMPILER}")
    folder = tmp_path_factory.mktemp("compiled")
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    command = [sys.executable, str(ROOT / "tests/ranks/compiled_step.py"), str(folder)]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.ci
def test_all_layers_share_few_graphs_and_none_breaks(compiled):
    assert compiled["breaks"] == {}
    assert 1 <= compiled["graphs"] <= 4


@pytest.mark.ci
def test_packed_rows_of_all_lengths_are_compiled_for_in_the_first_steps_alone(compiled):
    graphs = compiled["packed_graphs"]
    assert len(graphs) == 8 and graphs[0] > compiled["graphs"]
    assert len(set(graphs[2:])) == 1, graphs


@pytest.mark.ci
def test_a_checkpoint_leaves_the_last_projection_out(compiled):
    layers, products = compiled["layers"], compiled["products"]
    assert products["eager"] == 2 * 7 * layers
    assert products["compiled"] == products["eager"] - layers


@pytest.mark.ci
def test_compiled_gradients_are_close_to_eager_ones(compiled):
    assert compiled["names_agree"]
    assert compiled["gradients"] == 2 * 7 * compiled["layers"]
    assert 0 < compiled["furthest"] < 0.05  # of a gradient's norm


@pytest.mark.ci
def test_compiled_layers_take_tiles_and_break_no_graph(compiled):
    """Of each MLP every tile is computed twice, its last projection too; attention as without tiles."""
    tiled, layers = compiled["tiled"], compiled["layers"]
    assert tiled["breaks"] == {}
    assert 0 < tiled["furthest"] < 0.05
    assert tiled["products"] == 2 * (4 + 3 * 4) * layers


@pytest.fixture(scope="module")
def projection(tmp_path_factory):
    """PEFT's LoRA layer around a Linear4bit, dropout on."""
    keep_four_bit_weights_in_order()
    folder = tmp_path_factory.mktemp("base")
    small_llama(layers=1).save_pretrained(folder)
    model = load_nf4(str(folder))
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False).train()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def both_ways(projection: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's own result and ours, with the same dropout."""
    torch.manual_seed(2)
    x = torch.randn(3, 5, projection.in_features, dtype=torch.bfloat16)
    results = []
    for function in (projection, lambda x: adapter_first(projection, x)):
        torch.manual_seed(3)
        results.append(function(x))
    return tuple(results)


def test_the_adapter_first_is_pefts_result_bit_for_bit(projection):
    wanted, found = both_ways(projection)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, projection.base_layer(torch.randn(3, 5, 64, dtype=torch.bfloat16)))


def test_two_adapters_and_an_fp32_one_are_left_to_peft(projection):
    """Two sums in another order, or a cast in between, would round differently."""
    projection.update_layer("second", 4, lora_alpha=8, config=LoraConfig(r=4))
    nn.init.normal_(projection.lora_B["second"].weight)
    one, _ = both_ways(projection)
    try:
        projection.set_adapter(["default", "second"])
        wanted, found = both_ways(projection)
        assert torch.equal(found, wanted)
        assert not torch.equal(wanted, one)
        projection.set_adapter(["default"])
        projection.lora_A.float(), projection.lora_B.float()
        wanted, found = both_ways(projection)
        assert torch.equal(found, wanted)
    finally:
        projection.set_adapter(["default"])
        projection.lora_A.bfloat16(), projection.lora_B.bfloat16()
        projection.delete_adapter("second")


@pytest.mark.parametrize("state", ["disabled", "merged"])
def test_a_disabled_or_merged_adapter_is_left_to_peft(projection, state):
    with_it, _ = both_ways(projection)
    if state == "disabled":
        projection.enable_adapters(False)
    else:
        projection.merge()
    try:
        wanted, found = both_ways(projection)
    finally:
        projection.enable_adapters(True) if state == "disabled" else projection.unmerge()
    assert torch.equal(found, wanted)
    assert not torch.equal(wanted, with_it)


def test_a_projection_without_adapter_is_left_as_it_is(projection):
    wanted, found = both_ways(projection.base_layer)
    assert torch.equal(found, wanted)


# ---- activations that wait on the host ------------------------------------------------------------------------------


def test_on_a_cpu_every_activation_stays_where_it_is():
    """The ways to the host and back need a GPU; they were run there, in the recorded 70B runs and not here."""
    saved = WaitOnHost()
    for tensor in (torch.ones(3), torch.ones(2**21)):  # 8 MiB: on a GPU it would leave
        assert saved.unpack(saved.pack(tensor)) is tensor
    assert WaitOnHost.waiting == []


def test_transformers_offload_goes_through_it_and_changes_no_gradient(monkeypatch):
    monkeypatch.setattr(transformers.modeling_utils, "save_on_cpu", transformers.modeling_utils.save_on_cpu)
    copy_activations_beside_compute()
    packed, plain_pack = [], WaitOnHost.pack
    monkeypatch.setattr(
        WaitOnHost, "pack", lambda self, tensor: packed.append(tensor) or plain_pack(self, tensor)
    )
    gradients = []
    for offload in (False, True):
        model = with_adapter(small_llama().requires_grad_(False))
        model.activation_checkpointing_enable({"use_reentrant": False}, offload=offload)
        assert packed == []
        gradients.append(loss_and_gradients(model))
    assert len(packed) >= 2  # the input of each layer
    assert all(torch.equal(one, other) for one, other in zip(*gradients))


# ---- the laptop -----------------------------------------------------------------------------------------------------


def test_a_rehearsal_loads_no_compiler_and_gives_torch_compile_back():
    """Each rank of a tiny launch spent a second on it; benchmarks/launch_seconds.py."""
    code = """
import sys, torch
before = torch.compile
from nbutils.launching import rehearsal
rehearsal.enable()
assert "bitsandbytes" in sys.modules
assert torch.compile is before
assert "torch._inductor.compile_fx" not in sys.modules, "the compiler was loaded"
"""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
