"""The memory plan: bytes a rank, item by item, on the GPU and in host memory, before anything is bought or started."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml

GIB = 2**30
BF16 = 2  # bytes
FP32 = 4


@dataclass(frozen=True)
class Shape:
    """What of a Llama's `config.json` decides about memory."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The seven linear layers of a decoder layer: `(out_features, in_features)` by name."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers of one decoder layer."""
        return sum(out * into for out, into in self.linears.values())

    @property
    def parameters(self) -> int:
        """Weights of the whole model."""
        embeddings = (1 if self.tied else 2) * self.vocab * self.hidden
        norms = (2 * self.layers + 1) * self.hidden
        return self.layers * self.linear_parameters + embeddings + norms

    def adapter_parameters(self, rank: int) -> int:
        """Weights of a LoRA adapter on all linear layers: `A` is `(rank, in)`, `B` is `(out, rank)`."""
        return self.layers * sum(rank * (out + into) for out, into in self.linears.values())


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 4, 256, 640, 8, 4, 32, 1024),
        Shape("llama32_1b", 16, 2048, 8192, 32, 8, 64, 128256, tied=True),
        Shape("llama31_8b", 32, 4096, 14336, 32, 8, 128, 128256),
        Shape("llama31_70b", 80, 8192, 28672, 64, 8, 128, 128256),
        Shape("llama31_405b", 126, 16384, 53248, 128, 8, 128, 128256),
    )
}


def shape_of(model: str | Path) -> Shape:
    """The shape of a built-in model, or of a local `config.json` of the Llama family.

    Args:
        model: a name in `SHAPES`, a folder that holds `config.json`, or such a file.

    Raises:
        ValueError: neither, or the file lacks a key that a Llama has.
    """
    if str(model) in SHAPES:
        return SHAPES[str(model)]
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"{model!r} is neither one of {', '.join(SHAPES)} nor a local folder with a config.json."
        )
    config = json.loads(path.read_text())
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        return Shape(
            name=path.resolve().parent.name,
            layers=config["num_hidden_layers"],
            hidden=hidden,
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as missing:
        raise ValueError(f"{path} has no {missing}; the plan is for models of the Llama family.") from None


@dataclass(frozen=True)
class Setup:
    """What an accelerate config decides about memory."""

    world_size: int = 2
    fsdp_version: int = 1
    offload: bool = True
    reshard: bool = True

    @classmethod
    def read(cls, path: str | Path, world_size: int | None = None) -> "Setup":
        """Read an accelerate config file.

        Args:
            path: YAML for `accelerate launch`.
            world_size: if it differs from the file's `num_processes`.
        """
        config = yaml.safe_load(Path(path).read_text())
        fsdp = config.get("fsdp_config", {})
        version = int(fsdp.get("fsdp_version", 1))
        strategy = str(fsdp.get("fsdp_sharding_strategy", "FULL_SHARD"))
        return cls(
            world_size=world_size or config["num_processes"],
            fsdp_version=version,
            offload=bool(fsdp.get("fsdp_offload_params", False)),
            reshard=bool(fsdp.get("fsdp_reshard_after_forward", True))
            if version == 2
            else strategy == "FULL_SHARD",
        )


@dataclass
class Plan:
    """Bytes a rank: on the GPU item by item at the two moments that can be its peak, and in host memory."""

    training: dict[str, int] = field(default_factory=dict)
    wrapping: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)

    @property
    def gpu(self) -> dict[str, int]:
        """The items of the higher of the two moments."""
        return max(self.training, self.wrapping, key=lambda items: sum(items.values()))

    @property
    def gpu_peak_bytes(self) -> int:
        return sum(self.gpu.values())

    @property
    def host_bytes(self) -> int:
        """Of one rank."""
        return sum(self.host.values())


def nf4_bytes(parameters: int) -> int:
    """Packed 4-bit weights: half a byte each."""
    return parameters // 2


def quantisation_state_bytes(parameters: int) -> int:
    """Scales of NF4 with double quantisation.

    One byte for each block of 64 weights, and one fp32 for each 256 of these bytes: 0.127 bits a weight
    (QLoRA, arXiv 2305.14314, section 3, "Double Quantization").
    """
    return parameters // 64 + FP32 * parameters // (64 * 256)


def plan(shape: Shape, setup: Setup, batch: int, length: int, lora_r: int = 16) -> Plan:
    """Predict the memory of a training run with the recipe's script.

    The items follow what FSDP, bitsandbytes and the Llama of transformers allocate, see the comments; the sizes of
    saved activations are counted from the operations of `LlamaDecoderLayer`.

    Args:
        shape: of the model.
        setup: from the accelerate config.
        batch: rows a rank and step.
        length: tokens a row.
        lora_r: rank of the adapter, on all linear layers.

    Returns:
        The plan.
    """
    world = setup.world_size if setup.reshard or setup.fsdp_version == 1 else 1
    tokens = batch * length
    layer = nf4_bytes(shape.linear_parameters) + BF16 * 2 * shape.hidden
    embeddings = BF16 * ((1 if shape.tied else 2) * shape.vocab + 1) * shape.hidden
    scales = shape.layers * quantisation_state_bytes(shape.linear_parameters)
    adapter = BF16 * shape.adapter_parameters(lora_r) // setup.world_size  # a rank's share
    largest = max(out * into for out, into in shape.linears.values())

    training = {
        "quantisation state": scales,
        "embeddings and head": embeddings,  # the root unit, gathered from the first forward to the last backward
        # Two units are gathered at a time: the one in use and the one that is fetched ahead.
        "gathered layers": 2 * layer,
        "checkpointed layer inputs": shape.layers * tokens * shape.hidden * BF16,
        "one layer computed again": tokens * saved_bytes_per_token(shape),
        "one weight in bf16": BF16 * largest,  # bitsandbytes multiplies by the unpacked weight
    }
    if setup.offload:
        training["shards on their way"] = layer // world
    else:
        training["4-bit shards"] = shape.layers * layer // world
        training["shard of embeddings and head"] = embeddings // world
        training["adapter"] = adapter
        training["gradients"] = adapter
        training["optimizer states"] = 2 * adapter

    # FSDP 1 copies a unit's tensors into one flat tensor: for a moment there are two of it, and then a rank's shard.
    wrapping = {"quantisation state": scales, "root unit": embeddings, "its flat copy": embeddings}
    if not setup.offload:
        wrapping["4-bit shards"] = shape.layers * layer // world
        wrapping["adapter"] = adapter
    host = {"Python and libraries": int(2.5 * GIB)}
    if setup.offload:
        host["layers, pinned"] = shape.layers * pinned_bytes(layer // world)
        host["embeddings and head, pinned"] = pinned_bytes(embeddings // world)
        host["adapter, gradients, optimizer"] = 4 * adapter
    return Plan(training, wrapping, host)


def saved_bytes_per_token(shape: Shape) -> int:
    """What one decoder layer keeps for its backward pass while it is computed again, in bytes a token.

    Counted in `LlamaDecoderLayer` with LoRA on all linear layers and no dropout: each of the two norms keeps its input
    in fp32 and its result in bf16 (the input of `lora_A`); attention keeps rotated queries, keys and values repeated
    for all heads, and its output; the MLP keeps gate, activated gate, up, and their product (the input of the last
    `lora_A`); and the residual stream between the two halves.
    """
    queries = shape.heads * shape.head_dim
    norms = 2 * (FP32 + BF16) * shape.hidden + BF16 * shape.hidden
    attention = 4 * BF16 * queries
    mlp = 4 * BF16 * shape.intermediate
    return norms + attention + mlp


def pinned_bytes(wanted: int) -> int:
    """What PyTorch's pinned allocator takes for a request: the next power of two."""
    return 1 << max(0, wanted - 1).bit_length()
