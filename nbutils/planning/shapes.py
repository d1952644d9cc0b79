"""What decides about memory: the model's shape, the accelerate config, and the settings of the script."""

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from nbutils.hybrid import is_hybrid


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
    config = json.loads(path.read_text(encoding="utf-8"))
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


def config_of(shape: Shape):
    """The `LlamaConfig` of a shape, with the rotary frequencies of Llama 3.1: `shape_of` the other way round.

    Args:
        shape: of the model.
    """
    from transformers import LlamaConfig  # takes seconds, and a plan does without

    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=131072,
        tie_word_embeddings=shape.tied,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=0,
        eos_token_id=7,
        pad_token_id=3,
    )


@dataclass(frozen=True)
class Setup:
    """What an accelerate config decides about memory; `fsdp_version` 0 is one process without FSDP."""

    world_size: int = 2
    fsdp_version: int = 1
    offload: bool = True
    reshard: bool = True

    @property
    def no_shard(self) -> bool:
        """FSDP 1 on one rank: whatever the config says, torch turns its strategy into NO_SHARD.

        Then nothing is freed after its use. With offload the host has its copy, and the modules' views keep the other
        on the GPU, until the next copy takes its place.
        """
        return self.fsdp_version == 1 and self.world_size == 1

    @classmethod
    def read(cls, path: str | Path, world_size: int | None = None) -> "Setup":
        """Read an accelerate config file.

        Args:
            path: YAML for `accelerate launch`. Under HYBRID_SHARD the ranks of one machine share the model.
            world_size: ranks of all machines, if they differ from the file's `num_processes`.
        """
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        fsdp = config.get("fsdp_config") or {}
        version = int(fsdp.get("fsdp_version", 1)) if fsdp else 0
        strategy = fsdp.get("fsdp_sharding_strategy", "FULL_SHARD")
        sharing = world_size or config.get("num_processes", 1)
        if version == 1 and is_hybrid(strategy):
            sharing //= config.get("num_machines", 1)
        return cls(
            world_size=sharing,
            fsdp_version=version,
            offload=bool(fsdp.get("fsdp_offload_params", False)),
            reshard=bool(fsdp.get("fsdp_reshard_after_forward", True))
            if version == 2
            else strategy in ("FULL_SHARD", "HYBRID_SHARD"),
        )


@dataclass(frozen=True)
class Choices:
    """What the script's settings decide about memory, beside batch, length and rank of the adapter."""

    embeddings_on_host: bool = False
    compile_layers: bool = False
    checkpointing: bool = True
    every_n_layers: int = 1
    offload_activations: bool = False

    @classmethod
    def read(cls, settings: dict) -> "Choices":
        """Read the settings of the script.

        Args:
            settings: as in its YAML; what is absent has the script's default.
        """
        how = settings.get("activation_checkpointing_kwargs") or {}
        return cls(
            embeddings_on_host=settings.get("embeddings_on_host", False),
            compile_layers=settings.get("compile_layers", False),
            checkpointing=settings.get("activation_checkpointing", True),
            every_n_layers=how.get("every_n_layers", 1),
            offload_activations=how.get("offload", False),
        )
