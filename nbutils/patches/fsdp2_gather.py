"""FSDP 2 gathers weights with a copy that reads them as numbers. Packed 4-bit weights are none, and stay whole here.

Changes `_get_all_gather_input_metadatas` of torch. Ran with torch 2.11, 2.13 and
2.15. Upstream: pytorch/pytorch#159333 (the
copy), bitsandbytes-foundation/bitsandbytes#1945 (what it does to 4-bit weights).
"""

import functools

import torch
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

from nbutils.common.foreign_code import expect, expect_source, source


def check() -> None:
    """Refuse a torch whose FSDP 2 fills the buffer of a gather in another way.

    Raises:
        UnknownCode: the function is gone, takes other arguments, or returns something else.
    """
    name = "_get_all_gather_input_metadatas"
    expect(_fsdp_collectives, name, ("param_all_gather_inputs",), "fsdp2_gather")
    several = "all_gather_dtype = torch.uint8"  # what we ask for always
    expect_source(getattr(_fsdp_collectives, name), several, "fsdp2_gather")


def still_needed() -> bool:
    """Whether the copy of the gather changes bf16 patterns; without a GPU, whether it is still that copy."""
    if not torch.cuda.is_available():
        return "torch._foreach_copy_(" in source(_fsdp_collectives)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cuda").to(torch.int16)
    copied = torch.empty_like(patterns).view(torch.bfloat16)
    torch._foreach_copy_([copied], [patterns.view(torch.bfloat16)])
    return not torch.equal(copied.view(torch.int16), patterns)


def gather_as_bytes() -> None:
    """Let FSDP 2 gather each unit as bytes, as it does by itself where a unit holds several dtypes.

    It fills the buffer of a gather with `torch._foreach_copy_`. On CUDA that copy takes each bf16 value to float and
    back, and so writes every NaN as the same NaN (pytorch/pytorch#159333). About one pair of packed bytes in a thousand
    looks like a NaN in bf16, and becomes other 4-bit values (bitsandbytes-foundation/bitsandbytes#1945). A copy of
    bytes computes nothing.

    It changes torch for this process; a second call does nothing. FSDP 1, and FSDP 2 on one rank, gather without that
    copy.

    Raises:
        UnknownCode: as `check`.
    """
    check()
    plain = _fsdp_collectives._get_all_gather_input_metadatas
    if getattr(plain, "as_bytes", False):
        return

    @functools.wraps(plain)
    def metadatas(inputs):
        dtypes, sizes, _ = plain(inputs)
        return dtypes, sizes, torch.uint8

    metadatas.as_bytes = True
    _fsdp_collectives._get_all_gather_input_metadatas = metadatas
