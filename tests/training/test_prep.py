"""The custom prep: what it freezes, keeps and lets through, beside PEFT's own."""

import bitsandbytes.nn.modules
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from transformers import LlamaConfig, LlamaForCausalLM

from nbutils.models.loading import load_nf4
from nbutils.training.prep import (
    keep_rotary_frequencies_exact,
    prepare_for_fsdp_qlora,
    rotary_error,
)

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.arange(24)[None]  # (1, 24)
MATRICES = 2 * 7 * 2  # layers, projections, A and B


@pytest.fixture(scope="module", autouse=True)
def one_process():
    kept = bitsandbytes.nn.modules.has_avx512bf16
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    bitsandbytes.nn.modules.has_avx512bf16 = kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def adapt(model):
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.05)
    return model.train()


def step(model):
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_it_freezes_everything_and_changes_no_dtype(folder):
    loaded = load_nf4(folder)
    before = {name: (p.dtype, p.data.clone()) for name, p in loaded.named_parameters()}
    prepared = prepare_for_fsdp_qlora(loaded)
    assert prepared is loaded and prepared.config.use_cache is False
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
    for name, parameter in prepared.named_parameters():
        assert parameter.dtype == before[name][0] == torch.bfloat16, name
        assert torch.equal(parameter.data.view(torch.uint8), before[name][1].view(torch.uint8)), name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_reach_every_adapter_matrix(folder, use_reentrant):
    model = adapt(prepare_for_fsdp_qlora(load_nf4(folder), use_reentrant=use_reentrant))
    assert model.is_gradient_checkpointing
    _, gradients = step(model)
    assert len(gradients) == MATRICES and all(g.abs().sum() > 0 for g in gradients.values())


def test_it_is_pefts_prep_without_the_cast(folder):
    """Undo the cast of PEFT's prep, and loss and gradients are equal bit for bit; with it they are only near."""
    loss, ours = step(adapt(prepare_for_fsdp_qlora(load_nf4(folder))))
    peft = prepare_model_for_kbit_training(
        load_nf4(folder), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    undone = prepare_model_for_kbit_training(
        load_nf4(folder), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    for parameter in undone.parameters():
        if type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.to(torch.bfloat16)
    same_loss, same = step(adapt(undone))
    assert torch.equal(loss, same_loss) and all(torch.equal(g, ours[name]) for name, g in same.items())
    near_loss, near = step(adapt(peft))
    assert near.keys() == ours.keys() and abs(near_loss.item() - loss.item()) < 0.02
    a, b = (torch.cat([g[name].float().flatten() for name in sorted(g)]) for g in (ours, near))
    assert 0 < (a - b).norm() / a.norm() < 0.1 and torch.cosine_similarity(a, b, 0) > 0.99


def wrap(model):
    policy = MixedPrecision(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model),
        mixed_precision=policy,
        device_id=torch.device("cpu"),
    )


def test_rotary_frequencies_survive_fsdp1(folder):
    plain = load_nf4(folder).requires_grad_(False)
    prepared = prepare_for_fsdp_qlora(load_nf4(folder))
    assert rotary_error(plain) == rotary_error(prepared) == 0
    alone = prepared(input_ids=TOKENS, labels=TOKENS).loss.item()
    for model, exact in ((wrap(adapt(plain)), False), (wrap(adapt(prepared)), True)):
        model(input_ids=TOKENS, labels=TOKENS)
        assert (rotary_error(model) == 0) == exact
    again = wrap(prepare_for_fsdp_qlora(load_nf4(folder)))
    assert again(input_ids=TOKENS, labels=TOKENS).loss.item() == alone


def test_hiding_the_frequencies_leaves_checkpoints_alone(folder):
    model = load_nf4(folder)
    keys = set(model.state_dict())
    assert keep_rotary_frequencies_exact(model) == 2
    assert keep_rotary_frequencies_exact(model) == 0  # a second call finds nothing left to do
    assert set(model.state_dict()) == keys and not any(
        "inv_freq" in name for name, _ in model.named_buffers()
    )


def test_frequencies_of_a_model_made_from_a_configuration_are_hidden_too():
    """There they are torch.nn.Buffer objects, which setattr registers by themselves."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=1))  # fmt: skip
    assert keep_rotary_frequencies_exact(model) == 2
    assert not list(model.named_buffers()) and rotary_error(model) == 0
