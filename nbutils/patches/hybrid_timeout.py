"""FSDP 1 makes the groups of HYBRID_SHARD and passes no time-out on; here they get it."""

from datetime import timedelta


def give_its_groups_the_timeout(model, timeout: timedelta) -> None:
    """Let a rank wait for a lost machine as long as `ddp_timeout` says, and not for torch's 10 minutes (gloo: 30).

    FSDP 1 makes the groups of HYBRID_SHARD by itself, and passes no time-out on
    (`torch.distributed.fsdp._init_utils._init_intra_and_inter_node_groups`).

    Args:
        model: wrapped by FSDP 1 under HYBRID_SHARD.
        timeout: `ddp_timeout_delta` of the training arguments.
    """
    # Here, because the launcher reads this module for configs only and needs no torch.
    from torch.distributed.distributed_c10d import _set_pg_timeout
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    units = FSDP.fsdp_modules(model)
    for group in {group for unit in units for group in (unit.process_group, unit._inter_node_pg)}:
        _set_pg_timeout(timeout, group)
