"""FSDP 1 with parameters in host memory: reserve there what frozen weights need, and not three times as much."""

import functools

from torch.distributed.fsdp._flat_param import FlatParamHandle


def spare_host_memory() -> None:
    """Let FSDP 1 keep one pinned copy of each offloaded frozen shard, where it would keep three.

    When the first forward begins, FSDP 1 copies each shard of every unit into pinned memory, keeps the unpinned
    original beside it until the unit's first use, and reserves a pinned gradient of the same size, for frozen weights
    too (`FlatParamHandle.init_flat_param_attributes`). A frozen weight never has a gradient: FSDP looks at the
    reserved one for trainable parameters only (`_finalize_params`). For 70B on one machine this is the difference
    between about 45 and about 125 GiB.

    It changes the class for this process; a second call does nothing. Without offload it has no effect.
    """
    plain = FlatParamHandle.init_flat_param_attributes
    if hasattr(plain, "__wrapped__"):
        return

    @functools.wraps(plain)
    def init_flat_param_attributes(self):
        plain(self)
        flat = self.flat_param
        if self._offload_params:
            flat.data = flat._local_shard  # the unpinned original is free from here on
            if not flat.requires_grad:
                del flat._cpu_grad  # its pinned block serves the next unit

    FlatParamHandle.init_flat_param_attributes = init_flat_param_attributes
