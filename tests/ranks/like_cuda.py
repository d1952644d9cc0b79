"""The script, rehearsed with a copy that treats NaN as CUDA's does: all that look like NaN in bf16 become the same one.

Run as: accelerate launch ... -m like_cuda SCRIPT ...

torch's `_foreach_copy_` is exact on a CPU. On CUDA it takes bf16 to float and back (pytorch/pytorch#159333).
"""

import torch

from nbutils.launching import rehearsal

exact = torch._foreach_copy_


def as_numbers(targets, sources, *more):
    exact(targets, sources, *more)
    for target in targets:
        if target.dtype == torch.bfloat16:
            target.view(torch.int16)[torch.isnan(target)] = 0x7FFF


if __name__ == "__main__":
    torch._foreach_copy_ = as_numbers
    rehearsal.main()
