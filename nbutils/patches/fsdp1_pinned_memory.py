"""FSDP 1 with parameters in host memory: reserve there what frozen weights need, and not three times as much.

Changes `FlatParamHandle.init_flat_param_attributes` of torch. Ran with torch 2.11 and 2.13 on
GPUs, with 2.15 on CPUs. We found no upstream issue.
"""

import functools

import torch
from torch.distributed.fsdp._flat_param import FlatParamHandle

from nbutils.common.foreign_code import expect, expect_source, source

RESERVED = "flat_param._cpu_grad = torch.zeros_like("  # for frozen weights too


def check() -> None:
    """Refuse a torch whose FSDP 1 prepares offloaded shards in another way.

    Raises:
        UnknownCode: the method is gone, takes other arguments, or does not pin the shard.
    """
    expect(FlatParamHandle, "init_flat_param_attributes", ("self",), "fsdp1_pinned_memory")
    pinned = "flat_param._local_shard = flat_param._local_shard.pin_memory()"
    expect_source(FlatParamHandle.init_flat_param_attributes, pinned, "fsdp1_pinned_memory")


def still_needed() -> bool:
    """Whether FSDP 1 still reserves a gradient for a frozen shard."""
    before, reserves, _ = source(FlatParamHandle.init_flat_param_attributes).partition(RESERVED)
    return bool(reserves) and "requires_grad" not in before


def spare_host_memory() -> None:
    """Let FSDP 1 keep one pinned copy of each offloaded frozen shard, where it would keep three.

    When the first forward begins, FSDP 1 copies each shard of every unit into pinned memory, keeps the unpinned
    original beside it until the unit's first use, and reserves a pinned gradient of the same size, for frozen weights
    too (`FlatParamHandle.init_flat_param_attributes`). A frozen weight never has a gradient: FSDP fills the reserved
    one, and reads it, for trainable parameters only (`_post_backward_hook`, `_finalize_params`). Measured for 70B on
    one machine without this: 124 GiB, of them 89 pinned and 36 of unpinned originals.

    It changes the class for this process; a second call does nothing. Without offload it has no effect.

    Raises:
        UnknownCode: as `check`.
    """
    check()
    plain = FlatParamHandle.init_flat_param_attributes
    if getattr(plain, "spares_host_memory", False):
        return

    @functools.wraps(plain)
    def init_flat_param_attributes(self):
        plain(self)
        flat = self.flat_param
        if not self._offload_params:
            return
        flat.data = flat._local_shard  # the unpinned original is free from here on
        if not flat.requires_grad:
            # FSDP asks before each forward whether there is a gradient, and makes one if it finds None.
            # One number, repeated over the whole shape, is answer enough; the pinned block serves the next unit.
            flat._cpu_grad = torch.zeros(1, dtype=flat.dtype).expand(flat.shape)

    init_flat_param_attributes.spares_host_memory = (
        True  # torch wraps the original too: __wrapped__ would not tell
    )
    FlatParamHandle.init_flat_param_attributes = init_flat_param_attributes
