"""`Linear4bit.forward` that torch.compile can trace: the quantisation state is read from the module."""

import bitsandbytes as bnb
import torch


def make_linear4bit_traceable() -> None:
    """Put `multiply` in the place of `Linear4bit.forward`, for this process; a second call changes nothing."""
    bnb.nn.Linear4bit.forward = multiply


def multiply(self: bnb.nn.Linear4bit, x: torch.Tensor) -> torch.Tensor:
    """`Linear4bit.forward` with the quantisation state read from the module.

    FSDP 2 puts a plain tensor in the place of the weight, and the original method then repairs the tensor: something
    torch.compile cannot trace, so each of the seven projections would end a graph.

    Args:
        x: `(..., in_features)` in bf16.

    Returns:
        `(..., out_features)`.
    """
    return bnb.matmul_4bit(x, self.weight, bias=self.bias, quant_state=self.quant_state)
