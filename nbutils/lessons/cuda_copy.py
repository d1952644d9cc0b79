"""CUDA's copy of bf16, imitated on a CPU: every NaN arrives as the same one."""

import torch

SAME_NAN = 0x7FFF  # what every bf16 NaN becomes, as recorded in gather_copy.json

exact_copy = torch._foreach_copy_


def copy_as_numbers(targets: list[torch.Tensor], sources: list[torch.Tensor], *more) -> None:
    """Copy as CUDA's `torch._foreach_copy_` does: each bf16 value that is NaN arrives as one and the same NaN.

    torch's own is exact on a CPU. On CUDA it takes bf16 to float and back (pytorch/pytorch#159333).

    Args:
        targets: written to.
        sources: read from, one for each target; all dtypes but bf16 arrive as they are.
        more: what `torch._foreach_copy_` takes besides.
    """
    exact_copy(targets, sources, *more)
    for target in targets:
        if target.dtype == torch.bfloat16:
            target.view(torch.int16)[torch.isnan(target)] = SAME_NAN
