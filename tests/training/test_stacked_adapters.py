"""Projections with one input share a product with their A's: the numbers of PEFT, with fewer products."""

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import profile
from transformers import LlamaConfig, LlamaForCausalLM

from nbutils.training import compiled_layers
from nbutils.training.stacked_adapters import stack_adapters

R = 4


def with_adapter(dropout: float = 0.0, alpha: int = 12) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    lora = LoraConfig(
        r=R, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(LlamaForCausalLM(config), lora).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def stack(model: nn.Module) -> nn.Module:
    """As `compile_layers` does it, without the compiler."""
    for layer in model.get_base_model().model.layers:
        stack_adapters(layer.self_attn)
        layer.mlp.forward = lambda x, mlp=layer.mlp: mlp.down_proj(compiled_layers._gated(mlp, x))
    return model


def step(model: nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.arange(32).view(2, 16)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found | {"loss": loss.detach()}


def furthest(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max(((one[name] - other[name]).norm() / one[name].norm()).item() for name in one)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_loss_and_gradients_are_pefts_to_the_last_digits_of_fp32(checkpoint):
    plain = with_adapter()
    stacked = stack(copy.deepcopy(plain))
    if checkpoint:
        for model in (plain, stacked):
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
    wanted, found = step(plain), step(stacked)
    assert all(gradient.any() for gradient in wanted.values())
    assert furthest(wanted, found) < 1e-6
    assert furthest(found, step(stacked)) == 0  # nothing of the first pass is left


def test_in_bf16_the_difference_is_that_of_rounding():
    exact = with_adapter()
    wanted = step(exact)
    plain = copy.deepcopy(exact).bfloat16()
    stacked = stack(copy.deepcopy(plain))
    rounding, found = furthest(wanted, step(plain)), furthest(wanted, step(stacked))
    assert 0 < found < 1.5 * rounding


def test_fewer_products_are_computed():
    counts = {}
    for way, change in {"plain": lambda model: model, "stacked": stack}.items():
        model = change(with_adapter())
        with torch.no_grad(), profile() as seen:
            model(input_ids=torch.arange(32).view(2, 16), use_cache=False)
        counts[way] = sum(event.count for event in seen.key_averages() if event.key == "aten::linear")
    assert counts["plain"] - counts["stacked"] == 2 * (2 + 1)  # layers; q, k and v; gate and up


@pytest.mark.parametrize("reason", ["dropout", "second", "disabled", "fp32 adapter"])
def test_what_cannot_be_shared_is_left_to_peft_bit_for_bit(reason):
    plain = with_adapter(dropout=0.3 if reason == "dropout" else 0.0)
    if reason == "second":
        plain.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        plain.base_model.set_adapter(["default", "second"])
    if reason == "fp32 adapter":
        plain.bfloat16()
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    stacked = stack(copy.deepcopy(plain))
    results = []
    for model in (plain, stacked):
        torch.manual_seed(3)
        with model.disable_adapter() if reason == "disabled" else nullcontext():
            results.append(model(input_ids=torch.arange(32).view(2, 16), use_cache=False).logits)
    assert torch.equal(*results)
