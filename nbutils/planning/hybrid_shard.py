"""HYBRID_SHARD: shards inside a machine, copies between machines. When FSDP 1 makes of it what was meant, and when not.

FSDP 1 shards among as many ranks as a process sees devices, and takes it that these ranks share a machine. With one
device it calls the group of one NO_SHARD and leaves out the sum over the others as well: each rank trains an adapter of
its own, and only a warning of torch says so (torch 2.13, `torch.distributed.fsdp._init_utils`).
"""

# As accelerate reads them, in any case of letters: the names, torch's own name of the second, and the numbers.
SPELLINGS = ("HYBRID_SHARD", "HYBRID_SHARD_ZERO2", "_HYBRID_SHARD_ZERO2", "4", "5")


def is_hybrid(strategy: object) -> bool:
    """Whether a value of `fsdp_sharding_strategy` is one of the two hybrid strategies."""
    return str(strategy).upper() in SPELLINGS


def hybrid_fault(strategy: object, ranks: int, devices: int) -> str | None:
    """What keeps HYBRID_SHARD from sharding inside each machine, and only there.

    Args:
        strategy: value of `fsdp_sharding_strategy`.
        ranks: of one machine.
        devices: that a process of this machine sees.

    Returns:
        A sentence with what was found, what was wanted and what to do; None if all is well or another strategy is used.
    """
    if not is_hybrid(strategy):
        return None
    if ranks < 2:
        return (
            f"fsdp_sharding_strategy is {strategy} with {ranks} rank a machine, wanted at least 2: FSDP 1 would shard "
            "nothing, and not sum the gradients of the ranks either. Take FULL_SHARD, or all GPUs of machines that "
            "have several."
        )
    if ranks != devices:
        seen = f"{devices} device" + "s" * (devices != 1)
        return (
            f"fsdp_sharding_strategy is {strategy} with {ranks} ranks a machine, each of which sees {seen}; "
            "wanted the same number: FSDP 1 shards among as many ranks as it sees devices, whichever machine they are "
            f"on. Use all GPUs of each machine, show {ranks} with CUDA_VISIBLE_DEVICES, or take FULL_SHARD."
        )
    return None
