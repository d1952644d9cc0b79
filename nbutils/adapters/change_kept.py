"""How much of an adapter's change is left after it was merged and rounded to NF4.

NF4 has 16 values for the 64 weights of a block, and the weights of a 4-bit base lie exactly on them: a change that is
smaller than half a step is rounded away, weight by weight. In the bf16 base the weights lie anywhere between the steps.
There the same change pushes some of them over the middle of a step, as many as its size asks for, and so it survives on
average. bf16 has steps too, of up to 1/128 of a weight: far below them a merge into bf16 loses in the same way.
"""

import bitsandbytes as bnb
import torch

from nbutils.models.nf4 import quantise_tensor

INTO_BF16, INTO_NF4 = "into bf16, then NF4", "into the NF4 base"
SIZES = (
    0.002,
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.07,
    0.1,
    0.2,
    0.35,
)  # norm of the change over norm of the weights


def change_kept(size: float, rank: int = 16, width: int = 1024, seed: int = 0) -> dict[str, float]:
    """Merge a random change of low rank into Gaussian weights in two ways, and measure what is left along the change.

    Args:
        size: the change's norm over the weights' norm (Frobenius).
        rank: of the change.
        width: the weights are (width, width), normal, in bf16.
        seed: of the weights and of the change.

    Returns:
        For `INTO_BF16` and `INTO_NF4` the share of the change that is left: the inner product of what the 4-bit weights
        moved by with the change, over the change's own. 1: all of it; 0: nothing.
    """
    random = torch.Generator().manual_seed(seed)
    weight = (0.02 * torch.randn(width, width, generator=random)).bfloat16()
    change = torch.randn(width, rank, generator=random) @ torch.randn(rank, width, generator=random)
    change *= size * weight.float().norm() / change.norm()
    return kept_of(weight, change)


def kept_of(weight: torch.Tensor, change: torch.Tensor) -> dict[str, float]:
    """The share of a change that is left after each way of merging.

    Args:
        weight: (out, in), bf16; not yet quantised.
        change: (out, in), fp32: `B @ A * scaling`.

    Returns:
        As `change_kept`.
    """
    base = through_nf4(weight)
    merged = {
        INTO_BF16: through_nf4((weight.float() + change).bfloat16()),
        INTO_NF4: through_nf4(base + change.bfloat16()),  # as PEFT's merge_and_unload does it, in bf16
    }
    return {way: along(new.float() - base.float(), change) for way, new in merged.items()}


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """A weight as the 4-bit base has it: quantised to NF4 with double quantisation, and back to bf16."""
    return bnb.functional.dequantize_4bit(*quantise_tensor(weight, "cpu"))


def along(moved: torch.Tensor, change: torch.Tensor) -> float:
    """How far the weights moved along a change, over the change itself."""
    return ((moved * change).sum() / change.square().sum()).item()
