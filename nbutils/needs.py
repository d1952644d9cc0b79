"""What a model needs, by counting: bytes on the GPUs, in host memory and on disk. Predicted; notebook 06 measures."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Model:
    """The sizes of a Llama that decide about memory.

    Args:
        linear: parameters in the decoder layers' linear layers: these become 4-bit.
        kept: parameters in embedding and head, which stay in bf16 (norms are too small to count).
        layers: decoder layers; each is one FSDP unit.
        gpu_needed: False for the tiny model, which is rehearsed on CPUs.
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
        """One whole quantised copy, as each rank holds it in host memory after loading."""
        return self.nf4_gib + self.kept_gib + self.tables_gib

    @property
    def download_gib(self) -> float:
        """The checkpoint on the hub: two bytes for every parameter."""
        return (self.linear + self.kept) * 2 / GIB


def _llama(
    hidden: int, inner: int, layers: int, kv: int, vocabulary: int, tied: bool
) -> tuple[int, int, int]:
    layer = (
        2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner
    )  # q and o, k and v, gate and up and down
    return layer * layers, vocabulary * hidden * (1 if tied else 2), layers


MODELS = {
    "tiny": Model("tiny", *_llama(256, 640, 4, 128, 1024, False), gpu_needed=False),
    "llama32_1b": Model("llama32_1b", *_llama(2048, 8192, 16, 512, 128_256, True)),
    "llama31_8b": Model("llama31_8b", *_llama(4096, 14_336, 32, 1024, 128_256, False)),
    "llama31_70b": Model("llama31_70b", *_llama(8192, 28_672, 80, 1024, 128_256, False)),
}

# Activations of one layer, the logits of one chunk, the adapter with its optimizer, and PyTorch's fragmentation. A
# planning figure: with 1024 tokens a step, 2 to 4 GiB are in use, and the allocator reserves more.
WORKING_ROOM_GIB = 6.0
# CUDA's context and NCCL's buffers stand outside PyTorch's allocator.
OUTSIDE_ALLOCATOR_GIB = 1.5


def gpu_gib(model: Model, gpus: int, offload: bool) -> float:
    """GPU memory that one rank needs under FULL_SHARD.

    Args:
        model: one of MODELS.
        gpus: number of ranks.
        offload: the shards live in host memory between uses.

    Returns:
        GiB: the shard (unless offloaded), the quantisation state, the gathered root unit (embedding and head), one
        gathered layer twice (this one and the prefetched one), and working room.
    """
    shard = 0.0 if offload else (model.nf4_gib + model.kept_gib) / gpus
    two_layers = 2 * model.nf4_gib / model.layers
    return shard + model.tables_gib + model.kept_gib + two_layers + WORKING_ROOM_GIB + OUTSIDE_ALLOCATOR_GIB


def host_gib(model: Model, ranks: int) -> tuple[float, float]:
    """Host memory for all ranks together.

    Returns:
        (least, comfortable) in GiB: each rank loads one whole quantised copy; while FSDP moves it, and with offload
        all the time, up to a second one stands beside it. 2 GiB a process come on top.
    """
    return ranks * (model.copy_gib + 2), ranks * (2 * model.copy_gib + 2)
