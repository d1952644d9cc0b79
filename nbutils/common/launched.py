"""What `accelerate launch` tells each rank about the launch, by environment variables."""

import os


def ranks_here() -> int:
    """Ranks of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def fsdp_version() -> int:
    """1 or 2; 0 without FSDP."""
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return int(os.environ.get("FSDP_VERSION", "1")) if fsdp else 0


def sharding_strategy() -> str | None:
    """Of FSDP 1; accelerate gives the variable to FSDP 2 as well, which does not read it."""
    return os.environ.get("FSDP_SHARDING_STRATEGY") if fsdp_version() == 1 else None


def offloads_parameters() -> bool:
    """Whether weights wait in host memory between uses."""
    return os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"


def reshards_after_forward() -> bool:
    """Whether a unit is freed after its forward pass, and gathered again for the backward pass."""
    if fsdp_version() == 2:
        return os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
    # As accelerate reads it: a name, or a number from 1 on.
    return (sharding_strategy() or "FULL_SHARD").upper() in ("FULL_SHARD", "HYBRID_SHARD", "1", "4")
