"""A 4-bit product whose unpacked weight is kept for the backward pass: the numbers of the one that unpacks twice."""

import bitsandbytes as bnb
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nbutils.models.nf4 import quantise_tensor
from nbutils.patches import linear4bit_forward


@pytest.fixture
def layer() -> bnb.nn.Linear4bit:
    torch.manual_seed(0)
    made = bnb.nn.Linear4bit(128, 192, bias=False, compute_dtype=torch.bfloat16, quant_storage=torch.bfloat16)
    packed, state = quantise_tensor(torch.randn(192, 128).bfloat16(), "cpu")
    made.weight = bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, bnb_quantized=True, quant_storage=torch.bfloat16
    )
    made.quant_state = state
    return made.train()


def numbers(layer, monkeypatch, kept: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Output, the input's gradient, and how often the weight was unpacked, in a checkpoint."""
    monkeypatch.setattr(linear4bit_forward, "KEPT", kept)
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", linear4bit_forward.multiply)
    plain, count = bnb.functional.dequantize_4bit, []
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda *a, **k: count.append(1) or plain(*a, **k))
    torch.manual_seed(1)
    x = torch.randn(5, 128, dtype=torch.bfloat16, requires_grad=True)
    out = checkpoint(lambda x: torch.tanh(layer(x)), x, use_reentrant=False)
    out.sum().backward()
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", plain)
    return out.detach(), x.grad, len(count)


def test_kept_or_unpacked_again_the_numbers_are_the_same(layer, monkeypatch):
    wanted, gradient, _ = numbers(layer, monkeypatch, kept=False)
    found, kept, times = numbers(layer, monkeypatch, kept=True)
    assert gradient.any() and torch.equal(found, wanted)
    assert (kept - gradient).norm() <= 0.004 * gradient.norm()
    assert times == 2  # forward, and once for computing again and the backward pass together
