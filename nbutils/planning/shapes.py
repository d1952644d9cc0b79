"""The shape of a model, as far as it decides about memory: built in, or read from its config.json."""

import json
from dataclasses import dataclass
from pathlib import Path


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
    def embedding_parameters(self) -> int:
        """Weights of embedding and output head; tied, they are one."""
        return (1 if self.tied else 2) * self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Weights of the whole model."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.layers * self.linear_parameters + self.embedding_parameters + norms

    def adapter_parameters(self, rank: int) -> int:
        """Weights of a LoRA adapter on all linear layers: `A` is `(rank, in)`, `B` is `(out, rank)`."""
        return self.layers * sum(rank * (out + into) for out, into in self.linears.values())


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 4, 256, 640, 8, 4, 32, 1024),
        Shape("smollm2", 30, 576, 1536, 9, 3, 64, 49152, tied=True),
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
