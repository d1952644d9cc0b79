"""The memory plan: bytes a rank, item by item, on the GPU and in host memory, before anything is bought or started."""

from dataclasses import dataclass, replace

from nbutils.memory_items import GIB, items_of, quantisation_state_bytes
from nbutils.shapes import SHAPES, Choices, Setup, Shape, shape_of

# Lessons take whatever they plan with from here.
__all__ = [
    "CARDS",
    "GIB",
    "OUTSIDE",
    "SHAPES",
    "Choices",
    "Plan",
    "Setup",
    "Shape",
    "fits",
    "plan",
    "quantisation_state_bytes",
    "shape_of",
    "what_to_change",
]

OUTSIDE = int(2.3 * GIB)  # CUDA context and NCCL, a rank; recorded on two H200s: 2.18 to 2.26
# What a card of a nominal size shows to programs, in GiB, as nvidia-smi tells its total.
CARDS = {16: 15.6, 24: 23.6, 40: 39.4, 48: 47.4, 80: 79.1, 141: 139.8}


@dataclass
class Plan:
    """Bytes a rank: on the GPU item by item at each moment that can be its peak, and in host memory."""

    moments: dict[str, dict[str, int]]
    host: dict[str, int]

    @property
    def peak_moment(self) -> str:
        """The moment that needs most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def gpu(self) -> dict[str, int]:
        """The items of that moment."""
        return self.moments[self.peak_moment]

    @property
    def gpu_peak_bytes(self) -> int:
        return sum(self.gpu.values())

    @property
    def host_bytes(self) -> int:
        """Of one rank."""
        return sum(self.host.values())


def plan(
    shape: Shape,
    setup: Setup,
    batch: int,
    length: int,
    lora_r: int = 16,
    spare_host: bool = True,
    choices: Choices = Choices(),
) -> Plan:
    """Predict the memory of a training run with the recipe's script.

    What is alive at which moment was read from traces of the allocator in the recorded runs of 8 layers
    (`benchmarks/results/fit_*.json`); sizes come from the model's shape. Every other recorded run is a test of the
    plan and was not used to make it.

    Args:
        shape: of the model.
        setup: from the accelerate config.
        batch: rows a rank and step.
        length: tokens a row.
        lora_r: rank of the adapter, on all linear layers.
        spare_host: `nbutils.offload.spare_host_memory` was called; matters for FSDP 1 with offload only.
        choices: further settings of the script.

    Returns:
        The plan.
    """
    return Plan(*items_of(shape, setup, batch * length, lora_r, choices, spare_host))


def fits(plan: Plan, outside: int = OUTSIDE) -> dict[int, float]:
    """The room that is left on cards of each usual size, in GiB; below zero it does not fit.

    Args:
        plan: of one rank.
        outside: what the CUDA context and NCCL take beside PyTorch's allocator, in bytes.

    Returns:
        `{nominal size in GB: GiB left}`.
    """
    return {size: shown - (plan.gpu_peak_bytes + outside) / GIB for size, shown in CARDS.items()}


def what_to_change(
    shape: Shape,
    setup: Setup,
    batch: int,
    length: int,
    lora_r: int,
    budget: int,
    choices: Choices = Choices(),
) -> list[str]:
    """What brings a plan under a budget: each change alone, then all of them, cheapest in speed first.

    Args:
        shape: of the model.
        setup: from the accelerate config.
        batch: rows a rank and step.
        length: tokens a row.
        lora_r: rank of the adapter.
        budget: bytes that the allocator may have.
        choices: further settings of the script; they stay as they are.

    Returns:
        Sentences; empty if the plan fits as it is.
    """
    if plan(shape, setup, batch, length, lora_r, choices=choices).gpu_peak_bytes <= budget:
        return []
    tries = []
    if batch > 1:
        tries.append(("one row a rank instead of " + str(batch), setup, 1, length))
    if not setup.reshard:
        tries.append(
            ("reshard after the forward pass (FULL_SHARD)", replace(setup, reshard=True), batch, length)
        )
    if setup.fsdp_version and not setup.offload:
        offloaded = replace(setup, offload=True, fsdp_version=1)
        tries.append(("FSDP 1 with parameters in host memory", offloaded, batch, length))
    if length > 1024:
        tries.append(("rows of 1,024 tokens instead of " + f"{length:,}", setup, batch, 1024))
    if setup.fsdp_version:
        tries.append(("twice as many GPUs", replace(setup, world_size=2 * setup.world_size), batch, length))
    said = []
    for change, other, rows, tokens in tries:
        peak = plan(shape, other, rows, tokens, lora_r, choices=choices).gpu_peak_bytes
        verdict = "fits" if peak <= budget else "is still too much"
        said.append(f"{change}: {peak / GIB:.1f} GiB, {verdict}")
    return said
