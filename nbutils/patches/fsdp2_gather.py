"""FSDP 2 gathers weights with a copy that reads them as numbers. Packed 4-bit weights are none, and stay whole here."""

import functools

import torch
from torch.distributed.fsdp._fully_shard import _fsdp_collectives


def gather_as_bytes() -> None:
    """Let FSDP 2 gather each unit as bytes, as it does by itself where a unit holds several dtypes.

    It fills the buffer of a gather with `torch._foreach_copy_`. On CUDA that copy takes each bf16 value to float and
    back, and so writes every NaN as the same NaN (pytorch/pytorch#159333). About one pair of packed bytes in a thousand
    looks like a NaN in bf16, and becomes other 4-bit values (bitsandbytes-foundation/bitsandbytes#1945). A copy of
    bytes computes nothing.

    It changes torch for this process; a second call does nothing. FSDP 1, and FSDP 2 on one rank, gather without that
    copy.
    """
    plain = _fsdp_collectives._get_all_gather_input_metadatas
    if getattr(plain, "as_bytes", False):
        return

    @functools.wraps(plain)
    def metadatas(inputs):
        dtypes, sizes, _ = plain(inputs)
        return dtypes, sizes, torch.uint8

    metadatas.as_bytes = True
    _fsdp_collectives._get_all_gather_input_metadatas = metadatas
