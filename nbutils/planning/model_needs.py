"""What a model needs at the least: on the GPUs, in host memory and on disk. Predicted; notebook 06 measures."""

from dataclasses import dataclass

from nbutils.planning.memory_items import GIB, LIBRARIES_CPU
from nbutils.planning.memory_plan import OUTSIDE, plan
from nbutils.planning.run_setup import Setup
from nbutils.planning.shapes import SHAPES

IN_MEMORY_GB = (
    20  # a bf16 checkpoint up to this size is quantised by each rank for itself: nbutils.models.loading
)


@dataclass(frozen=True)
class Model:
    """The sizes of a Llama that decide about memory.

    Args:
        linear: parameters in the decoder layers' linear layers: these become 4-bit.
        kept: parameters in embedding and head, which stay in bf16 (norms are too small to count).
        layers: decoder layers; each is one FSDP unit.
        gpu_needed: False for the small models, which are rehearsed on CPUs.
    """

    name: str
    linear: int
    kept: int
    layers: int
    gpu_needed: bool = True

    @property
    def nf4_gib(self) -> float:
        """Packed 4-bit weights: half a byte each."""
        return self.linear / 2 / GIB

    @property
    def kept_gib(self) -> float:
        """Embedding and head: two bytes each."""
        return self.kept * 2 / GIB

    @property
    def tables_gib(self) -> float:
        """The quantisation state: one byte for 64 weights, four more for 256 of those (QLoRA paper, section 3).

        It is no parameter, so FSDP does not shard it: every rank holds all of it.
        """
        return self.linear * (1 / 64 + 4 / (64 * 256)) / GIB

    @property
    def copy_gib(self) -> float:
        """One whole quantised copy."""
        return self.nf4_gib + self.kept_gib + self.tables_gib

    @property
    def download_gib(self) -> float:
        """The checkpoint on the hub: two bytes for every parameter."""
        return (self.linear + self.kept) * 2 / GIB

    @property
    def mapped(self) -> bool:
        """Whether the quantised copy is written to disk once, and mapped from there by all ranks."""
        return self.download_gib * GIB > IN_MEMORY_GB * 1e9

    @property
    def disk_gib(self) -> float:
        """The download, and the quantised copy if it is written."""
        return self.download_gib + (self.copy_gib if self.mapped else 0)


def _llama(
    hidden: int, inner: int, layers: int, kv: int, vocabulary: int, tied: bool
) -> tuple[int, int, int]:
    layer = (
        2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner
    )  # q and o, k and v, gate and up and down
    return layer * layers, vocabulary * hidden * (1 if tied else 2), layers


MODELS = {
    "tiny": Model("tiny", *_llama(256, 640, 4, 128, 1024, False), gpu_needed=False),
    "smollm2": Model("smollm2", *_llama(576, 1536, 30, 192, 49_152, True), gpu_needed=False),
    "llama32_1b": Model("llama32_1b", *_llama(2048, 8192, 16, 512, 128_256, True)),
    "llama31_8b": Model("llama31_8b", *_llama(4096, 14_336, 32, 1024, 128_256, False)),
    "llama31_70b": Model("llama31_70b", *_llama(8192, 28_672, 80, 1024, 128_256, False)),
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
    return (plan(SHAPES[model.name], setup, batch=1, length=1024).gpu_peak_bytes + OUTSIDE) / GIB


def host_gib(model: Model, ranks: int) -> tuple[float, float]:
    """Host memory for all ranks together, with offload.

    Returns:
        (least, comfortable) in GiB. A model that is quantised in memory stands there once a rank while FSDP copies it.
        A mapped one costs nothing but time if its pages do not stay in memory; comfortable is with all of them.
    """
    setup = Setup(world_size=ranks, fsdp_version=1, offload=True)
    host = plan(SHAPES[model.name], setup, batch=1, length=1024).host
    if not model.gpu_needed:
        host["Python and libraries"] = LIBRARIES_CPU
    held = ranks * sum(host.values()) / GIB
    if model.mapped:
        return held, held + model.copy_gib
    return held + ranks * model.copy_gib, held + ranks * model.copy_gib + 2
