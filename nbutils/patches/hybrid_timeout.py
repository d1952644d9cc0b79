"""FSDP 1 makes the groups of HYBRID_SHARD and passes no time-out on; here they get it.

Changes no function: it sets the time-out of groups that FSDP 1 has made, through names that are torch's own. Ran
with torch 2.11 and 2.13. Upstream: pytorch/pytorch#135352, closed without a change.
"""

from datetime import timedelta

from nbutils.common.foreign_code import expect, expect_source, source


def check() -> None:
    """Refuse a torch whose groups are kept or given a time-out in another way.

    Raises:
        UnknownCode: `_set_pg_timeout` is gone or takes other arguments, or FSDP 1 keeps its groups under other names.
    """
    from torch.distributed import distributed_c10d
    from torch.distributed.fsdp import _init_utils

    expect(distributed_c10d, "_set_pg_timeout", ("timeout", "group"), "hybrid_timeout")
    expect_source(_init_utils, "state._inter_node_pg = ", "hybrid_timeout")


def still_needed() -> bool:
    """Whether FSDP 1 still makes its groups without a time-out."""
    from torch.distributed.fsdp import _init_utils

    return "timeout" not in source(_init_utils._init_intra_and_inter_node_groups)


def give_its_groups_the_timeout(model, timeout: timedelta) -> None:
    """Let a rank wait for a lost machine as long as `ddp_timeout` says, and not for torch's 10 minutes (gloo: 30).

    FSDP 1 makes the groups of HYBRID_SHARD by itself, and passes no time-out on
    (`torch.distributed.fsdp._init_utils._init_intra_and_inter_node_groups`).

    Args:
        model: wrapped by FSDP 1 under HYBRID_SHARD.
        timeout: `ddp_timeout_delta` of the training arguments.

    Raises:
        UnknownCode: as `check`.
    """
    check()
    # Here, because the launcher reads this module for configs only and needs no torch.
    from torch.distributed.distributed_c10d import _set_pg_timeout
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    units = FSDP.fsdp_modules(model)
    for group in {group for unit in units for group in (unit.process_group, unit._inter_node_pg)}:
        _set_pg_timeout(timeout, group)
