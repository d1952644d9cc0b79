"""`Linear4bit.forward` that torch.compile can trace: the quantisation state is read from the module.

Changes `Linear4bit.forward` of bitsandbytes. Ran with 0.50.2. We found no upstream issue of this one.
"""

import bitsandbytes as bnb
import torch

from nbutils.common.foreign_code import expect, source

PLAIN = bnb.nn.Linear4bit.forward  # when this module is imported


def check() -> None:
    """Refuse a bitsandbytes that multiplies in another way.

    Raises:
        UnknownCode: the method or the product that `multiply` calls is gone, or takes other arguments.
    """
    expect(bnb.nn.Linear4bit, "forward", ("self", "x"), "linear4bit_forward")
    expect(bnb, "matmul_4bit", ("A", "B", "quant_state", "out", "bias"), "linear4bit_forward")


def still_needed() -> bool:
    """Whether the method still repairs the weight's quantisation state before it multiplies."""
    return "fix_4bit_weight_quant_state_from_module(self)" in source(PLAIN)


def make_linear4bit_traceable() -> None:
    """Put `multiply` in the place of `Linear4bit.forward`, for this process; a second call changes nothing.

    Raises:
        UnknownCode: as `check`.
    """
    check()
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
