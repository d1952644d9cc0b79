"""What a model needs at the least: on the GPUs, in host memory and on disk. Predicted; notebook 06 measures."""

from dataclasses import dataclass

from nbutils.planning.memory_items import BF16, GIB, LIBRARIES_CPU, packed_bytes, quantisation_state_bytes
from nbutils.planning.memory_plan import FILLED, OUTSIDE, left_gib, plan
from nbutils.planning.run_setup import Choices, Setup
from nbutils.planning.shapes import SHAPES, Shape

# A bf16 checkpoint up to this size is quantised by each rank for itself: nbutils.models.loading.
IN_MEMORY_GB = 20
RUNS_GIB = 2  # logs, adapters and a few checkpoints
# configs/params/llama31_70b_2x24gb_resident.yaml: the weights stay on the cards, and two rows of 2,048 tokens fit.
RESIDENT = Choices(embeddings_on_host=True, compile_layers=True, offload_activations=True)


@dataclass(frozen=True)
class Model:
    """The sizes of a Llama that decide what machine it needs.

    Args:
        shape: of the model.
        gpu_needed: False for the small models, which are rehearsed on CPUs.
    """

    shape: Shape
    gpu_needed: bool = True

    @property
    def name(self) -> str:
        """As in `SHAPES`."""
        return self.shape.name

    @property
    def layers(self) -> int:
        """Decoder layers; each is one FSDP unit."""
        return self.shape.layers

    @property
    def linear(self) -> int:
        """Parameters in the decoder layers' linear layers: these become 4-bit."""
        return self.shape.layers * self.shape.linear_parameters

    @property
    def kept(self) -> int:
        """Parameters in embedding and head, which stay in bf16; norms are too small to count."""
        return self.shape.embedding_parameters

    @property
    def nf4_gib(self) -> float:
        """Packed 4-bit weights."""
        return packed_bytes(self.linear) / GIB

    @property
    def kept_gib(self) -> float:
        """Embedding and head."""
        return BF16 * self.kept / GIB

    @property
    def quantisation_state_gib(self) -> float:
        """The scales. They are no parameters, so FSDP does not shard them: every rank holds all of them."""
        return quantisation_state_bytes(self.linear) / GIB

    @property
    def copy_gib(self) -> float:
        """One whole quantised copy."""
        return self.nf4_gib + self.kept_gib + self.quantisation_state_gib

    @property
    def download_gib(self) -> float:
        """The checkpoint on the hub: two bytes for every parameter."""
        return BF16 * (self.linear + self.kept) / GIB

    @property
    def mapped(self) -> bool:
        """Whether the quantised copy is written to disk once, and mapped from there by all ranks."""
        return self.download_gib * GIB > IN_MEMORY_GB * 1e9

    def disk_gib(self, merge: bool = False) -> float:
        """Disk for the download, for the quantised copy if one is written, and for what runs leave behind.

        Args:
            merge: the adapter is to be merged too, which writes the model a second time in bf16.
        """
        copies = self.copy_gib if self.mapped else 0
        return self.download_gib * (2 if merge else 1) + copies + RUNS_GIB


# The shapes that somebody with one machine may want to train; the others are there for the plan alone.
MODELS = {
    name: Model(SHAPES[name], gpu_needed=name not in ("tiny", "smollm2"))
    for name in ("tiny", "smollm2", "llama32_1b", "llama31_8b", "llama31_70b")
}


def gpu_gib(model: Model, gpus: int, offload: bool) -> float:
    """GPU memory that one rank needs with FSDP 1 and one row of 1,024 tokens.

    Args:
        model: one of MODELS.
        gpus: number of ranks.
        offload: the shards live in host memory between uses. On one GPU it saves nothing there: `Setup.no_shard`.

    Returns:
        GiB: the plan's highest moment, and what CUDA and NCCL take beside it.
    """
    setup = Setup(world_size=gpus, fsdp_version=1, offload=offload)
    return (plan(model.shape, setup, batch=1, length=1024).gpu_peak_bytes + OUTSIDE) / GIB


def has_room(model: Model, gpus: int, offload: bool, card_gib: float) -> bool:
    """Whether `gpu_gib` fits with room: into `FILLED` of what a card leaves to PyTorch.

    Args:
        model: one of MODELS.
        gpus: number of ranks.
        offload: the shards live in host memory between uses.
        card_gib: what the card shows to programs, 23.6 for one of 24 GB.
    """
    return gpu_gib(model, gpus, offload) - OUTSIDE / GIB <= FILLED * left_gib(card_gib)


def host_gib(model: Model, ranks: int) -> tuple[float, float]:
    """Host memory for all ranks together, with offload.

    Returns:
        (least, comfortable) in GiB. A model that is quantised in memory stands there once a rank while FSDP copies it.
        A mapped one costs nothing but time if its pages do not stay in memory; comfortable is with all of them.
    """
    setup = Setup(world_size=ranks, fsdp_version=1, offload=True)
    host = plan(model.shape, setup, batch=1, length=1024).host
    if not model.gpu_needed:
        host["Python and libraries"] = LIBRARIES_CPU
    held = ranks * sum(host.values()) / GIB
    if model.mapped:
        return held, held + model.copy_gib
    return held + ranks * model.copy_gib, held + ranks * model.copy_gib + 2


def host_gib_resident(model: Model, ranks: int) -> float:
    """Host memory for all ranks together where the weights stay on the cards: the settings *resident*, FSDP 2.

    Returns:
        GiB, with two rows of 2,048 tokens a rank.
    """
    host = plan(model.shape, Setup(ranks, 2, offload=False), batch=2, length=2048, choices=RESIDENT).host
    return ranks * sum(host.values()) / GIB


def resident_has_room(model: Model, ranks: int, card_gib: float) -> bool:
    """Whether the settings *resident* fit with one row of 1,024 tokens. They fill a card: no margin is kept here.

    Args:
        model: one of MODELS.
        ranks: one a GPU.
        card_gib: what the card shows to programs, 23.6 for one of 24 GB.
    """
    planned = plan(model.shape, Setup(ranks, 2, offload=False), batch=1, length=1024, choices=RESIDENT)
    return planned.gpu_peak_bytes / GIB <= left_gib(card_gib)
