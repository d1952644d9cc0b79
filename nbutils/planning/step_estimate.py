"""How long a step takes over given links: bytes that come in, seconds that compute, and what hides behind what.

Four constants were fitted to recorded steps of two H200s. `tests/planning/test_step_estimate.py` holds the whole to
those steps with links made slow (`benchmarks/results/slow_links.json`), and to every other record.
"""

from dataclasses import dataclass

from nbutils.planning.memory_items import BF16, packed_bytes
from nbutils.planning.run_setup import LORA_RANK, Choices, Setup
from nbutils.planning.shapes import Shape

# Of the rate of one large product, what a training step reaches; compiled layers read and write less in between.
REACHED, REACHED_COMPILED = 0.66, 0.80
# What a step costs whatever its rows hold, as so many tokens more a rank: weights are unpacked three times.
TOKENS_MORE = 700
# Seconds of a step in which no layer is computed: tokens are looked up, the loss; and, offloaded, clipping and the
# optimizer on the CPU's cores.
BESIDE, BESIDE_OFFLOADED = 0.04, 0.13


@dataclass(frozen=True)
class Links:
    """What `python -m nbutils links` measures, of the slowest rank.

    Args:
        host_gbs: GB/s from host memory to a GPU, all GPUs at once.
        between_gbs: GB/s that a rank receives in a gather.
        tflops: TFLOP/s of a large product in bf16.
    """

    host_gbs: float
    between_gbs: float
    tflops: float


# A lane of PCIe 4.0 carries 16 GT/s, 128 bits of 130. Of the lanes' rate a copy reached 0.86 on an H200 (54 of 63
# GB/s), and a gather without peer access 0.46 of that: each byte goes to the host and back (`links_2gpu_no_peer.json`).
LANE_GBS, COPY_REACHES, GATHER_REACHES = 16 * 128 / 130 / 8, 0.86, 0.46


def pcie4_links(lanes: int, tflops: float) -> Links:
    """What cards without peer access can expect of their slots, if these behave as those of an H200 do.

    Args:
        lanes: of PCIe 4.0 that each card has: 16, 8 or 4.
        tflops: dense bf16 with fp32 sums, as the maker states it.
    """
    host = COPY_REACHES * LANE_GBS * lanes
    return Links(host, GATHER_REACHES * host, tflops)


@dataclass(frozen=True)
class StepEstimate:
    """An estimate of one step, in seconds; it is no measurement.

    Args:
        computing: in which layers are computed.
        waiting: in which weights are moved and nothing is computed.
        beside: in which neither happens: optimizer, loss, the head's way to the GPU.
        moving: of all transfers, hidden or not.
        tokens: of all ranks.
    """

    computing: float
    waiting: float
    beside: float
    moving: float
    tokens: int

    @property
    def step(self) -> float:
        """Seconds from one step to the next."""
        return self.computing + self.waiting + self.beside

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks, of full rows."""
        return self.tokens / self.step


def estimate(
    shape: Shape,
    setup: Setup,
    batch: int,
    length: int,
    links: Links,
    choices: Choices = Choices(),
    lora_r: int = LORA_RANK,
) -> StepEstimate:
    """Estimate a step from the model's shape and a machine's links.

    Args:
        shape: of the model.
        setup: from the accelerate config.
        batch: rows a rank and step.
        length: tokens a row, full rows.
        links: of the machine.
        choices: further settings of the script.
        lora_r: rank of the adapter.
    """
    incoming = incoming_bytes(shape, setup, batch * length, choices, lora_r)
    moving = [moving_seconds(*passing, links) for passing in incoming]
    computing = computing_seconds(shape, batch, length, links.tflops, choices)
    beside = BESIDE_OFFLOADED if setup.offload else BESIDE
    if choices.embeddings_on_host:
        beside += (
            BF16 * shape.vocab * shape.hidden / (links.host_gbs * 1e9)
        )  # the head comes when the layers are done
    waiting = waiting_seconds(moving, computing, setup, shape.layers)
    return StepEstimate(sum(computing), waiting, beside, sum(moving), batch * length * setup.world_size)


def incoming_bytes(
    shape: Shape, setup: Setup, tokens: int, choices: Choices = Choices(), lora_r: int = LORA_RANK
) -> list[tuple[float, float]]:
    """Bytes that a rank receives in the forward and in the backward pass of a step.

    Every layer is gathered in both passes. With offload the rank's own shard comes from host memory each time. Under
    FSDP 1 embedding and head come once from the other ranks, and with offload twice from the host; under FSDP 2 they
    are taken to stay on the host.

    Args:
        shape: of the model.
        setup: from the accelerate config.
        tokens: of a rank and step.
        choices: further settings of the script.
        lora_r: rank of the adapter.

    Returns:
        For each pass: bytes from host memory, and bytes from other ranks.
    """
    ranks = setup.world_size
    packed = packed_bytes(shape.layers * shape.linear_parameters) + BF16 * 2 * shape.hidden * shape.layers
    layers = packed + BF16 * shape.adapter_parameters(lora_r)
    root = BF16 * (shape.embedding_parameters + shape.hidden) if setup.fsdp_version == 1 else 0
    others = (ranks - 1) / ranks
    own = (layers + root) / ranks if setup.offload else 0.0
    inputs = BF16 * tokens * shape.hidden * shape.layers if choices.offload_activations else 0
    return [(own, (layers + root) * others), (own + inputs, layers * others)]


def moving_seconds(from_host: float, from_ranks: float, links: Links) -> float:
    """Seconds of a pass's transfers, one after the other: without peer access both come over the rank's own slot."""
    return from_host / (links.host_gbs * 1e9) + from_ranks / (links.between_gbs * 1e9)


def computing_seconds(
    shape: Shape, batch: int, length: int, tflops: float, choices: Choices = Choices()
) -> list[float]:
    """Seconds that a rank computes in the forward and in the backward pass.

    A frozen weight costs 2 FLOP a token forward, and 2 for the gradient of its input; a checkpoint computes the forward
    pass again. With compiled layers that leaves the last projection out, which the rate has in it; with a tiled MLP as
    well it does not. Attention costs 2 x length x hidden FLOP a token and layer forward, since a token sees half of the
    others, and 2.5 times as much backward (FlashAttention, arXiv 2205.14135).

    Args:
        shape: of the model.
        batch: rows of a rank and step.
        length: tokens a row.
        tflops: of a large product.
        choices: further settings of the script.
    """
    weights = shape.layers * shape.linear_parameters + shape.vocab * shape.hidden
    products = 2 * weights * (batch * length + TOKENS_MORE)
    attention = 2 * length * shape.hidden * shape.layers * batch * length
    again = choices.checkpointing / choices.every_n_layers
    rate = (REACHED_COMPILED if choices.compile_layers else REACHED) * tflops * 1e12
    last = 2 * shape.layers * shape.hidden * shape.intermediate * batch * length
    more = again * last if choices.compile_layers and choices.mlp_tiles else 0
    return [
        (products + attention) / rate,
        ((1 + again) * products + more + (2.5 + again) * attention) / rate,
    ]


def waiting_seconds(moving: list[float], computing: list[float], setup: Setup, layers: int) -> float:
    """Seconds in which a step moves and does not compute.

    FSDP 1 with offload does one after the other, as the record shows. FSDP 2 gathers the next layer while it computes
    this one: in each pass the shorter time hides behind the longer, but for one layer's, the first or the last.

    Args:
        moving: of the passes.
        computing: of the passes.
        setup: from the accelerate config.
        layers: of the model.
    """
    if setup.fsdp_version == 1 and setup.offload:
        return sum(moving)
    return sum(
        max(0.0, here - beside) + min(here, beside) / layers
        for here, beside in zip(moving, computing, strict=True)
    )
