"""More than one machine, by counting: what a rank must hold, and what must pass between the machines in each step."""

from dataclasses import replace

from nbutils.planning.memory_items import BF16, packed_bytes
from nbutils.planning.run_setup import LORA_RANK, Setup
from nbutils.planning.shapes import Shape

# What a link between machines carries at best, in bytes a second and direction.
LINKS = {
    "1 Gbit/s": 0.125e9,
    "10 Gbit/s": 1.25e9,
    "25 Gbit/s": 3.125e9,
    "100 Gbit/s": 12.5e9,
    "400 Gbit/s": 50e9,
}


def inside_a_machine(setup: Setup, machines: int) -> Setup:
    """The setup whose memory plan holds for HYBRID_SHARD: shards are divided among the ranks of one machine only.

    Args:
        setup: with the ranks of all machines.
        machines: how many.

    Raises:
        ValueError: the ranks cannot be shared out evenly.
    """
    if setup.world_size % machines:
        raise ValueError(f"{setup.world_size} ranks cannot be shared out evenly among {machines} machines.")
    return replace(setup, world_size=setup.world_size // machines)


def bytes_between_machines(
    shape: Shape, setup: Setup, machines: int, lora_r: int = LORA_RANK, hybrid: bool = False
) -> int:
    """What each machine sends to another in one step of FSDP 1 with one forward and one backward pass.

    FULL_SHARD gathers each decoder layer twice, in the forward and in the backward pass, and the root unit (embedding,
    output head) once, or twice if it is offloaded; gradients exist for the adapter alone and are reduced once. A ring
    over all ranks passes each boundary between machines once, with (ranks - 1) / ranks of what is gathered.
    HYBRID_SHARD gathers inside each machine; between them, the adapter's gradients are summed, which sends them twice
    around a ring of machines.

    Args:
        shape: of the model.
        setup: with the ranks of all machines.
        machines: how many; one sends nothing.
        lora_r: rank of the adapter.
        hybrid: HYBRID_SHARD in place of FULL_SHARD.

    Returns:
        Bytes a step, in one direction.
    """
    if machines == 1:
        return 0
    adapter = BF16 * shape.adapter_parameters(lora_r)
    if hybrid:
        return 2 * adapter * (machines - 1) // machines
    layers = (
        packed_bytes(shape.layers * shape.linear_parameters)
        + BF16 * 2 * shape.hidden * shape.layers
        + adapter
    )
    root = BF16 * (shape.embedding_parameters + shape.hidden)
    gathered = 2 * layers + (2 if setup.offload else 1) * root
    return (gathered + adapter) * (setup.world_size - 1) // setup.world_size


def tokens_per_second(
    tokens: int, ranks: int, compute_seconds: float, sent: int, link: float
) -> tuple[float, float]:
    """Speed over all ranks if nothing of the sending hides behind the computing, and if all of it does.

    Args:
        tokens: of a rank and step.
        ranks: of all machines.
        compute_seconds: of a step on one machine.
        sent: from `bytes_between_machines`.
        link: bytes a second.

    Returns:
        `(slowest, fastest)`.
    """
    sending = sent / link
    return ranks * tokens / (compute_seconds + sending), ranks * tokens / max(compute_seconds, sending)


def link_that_pays(sent: int, compute_seconds: float, hides: bool = False, machines: int = 2) -> float:
    """Bytes a second at which so many machines are together as fast as one, which sends nothing.

    Args:
        sent: from `bytes_between_machines`.
        compute_seconds: of a step on one machine.
        hides: all of the sending hides behind the computing; else none of it.
        machines: how many.

    Returns:
        Over a slower link one machine alone is faster.
    """
    return sent / (compute_seconds * (machines if hides else machines - 1))
