"""The memory plan: bytes a rank, item by item, on the GPU and in host memory, before anything is bought or started."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from nbutils.hybrid import is_hybrid

GIB = 2**30
BF16 = 2  # bytes
FP32 = 4
WORKSPACES = (
    2 * 32 * 2**20
)  # cuBLAS keeps 32 MiB a thread that multiplies (forward and backward) on an H200, 8 on a 4090
LIBRARIES = int(
    1.75 * GIB
)  # Python, torch, transformers and the rest in host memory, a rank; recorded: 1.70 to 1.71
LIBRARIES_CPU = int(0.4 * GIB)  # the same with torch's CPU build, which a rehearsal needs no more than
OUTSIDE = int(2.3 * GIB)  # CUDA context and NCCL, a rank; recorded on two H200s: 2.18 to 2.26
# What a card of a nominal size shows to programs, in GiB, as nvidia-smi tells its total.
CARDS = {16: 15.6, 24: 23.6, 40: 39.4, 48: 47.4, 80: 79.1, 141: 139.8}


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
    """What an accelerate config decides about memory; `fsdp_version` 0 is one process without FSDP."""

    world_size: int = 2
    fsdp_version: int = 1
    offload: bool = True
    reshard: bool = True

    @classmethod
    def read(cls, path: str | Path, world_size: int | None = None) -> "Setup":
        """Read an accelerate config file.

        Args:
            path: YAML for `accelerate launch`. Under HYBRID_SHARD the ranks of one machine share the model.
            world_size: ranks of all machines, if they differ from the file's `num_processes`.
        """
        config = yaml.safe_load(Path(path).read_text())
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


def nf4_bytes(parameters: int) -> int:
    """Packed 4-bit weights: half a byte each."""
    return parameters // 2


def quantisation_state_bytes(parameters: int) -> int:
    """Scales of NF4 with double quantisation.

    One byte for each block of 64 weights, and one fp32 for each 256 of these bytes: 0.127 bits a weight
    (QLoRA, arXiv 2305.14314, section 3, "Double Quantization"). FSDP does not shard it: every rank has all of it.
    """
    return parameters // 64 + FP32 * parameters // (64 * 256)


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
    sizes = _Sizes.of(shape, setup, batch * length, lora_r, choices)
    if setup.fsdp_version == 0:
        moments = _one_process(sizes)
    elif setup.fsdp_version == 1:
        moments = _fsdp1(sizes, setup)
    else:
        moments = _fsdp2(sizes, setup)
    moments = {name: {what: size for what, size in items.items() if size} for name, items in moments.items()}
    return Plan(moments, _host(sizes, setup, spare_host))


@dataclass(frozen=True)
class _Sizes:
    """Bytes of everything the moments are made of; `layer` and so on are whole, `shard` divides by the ranks."""

    layers: int
    layer: int  # packed weights of one decoder layer and its two norms
    unit_tensors: list[int]  # its packed weights one by one, the smallest first
    adapter_layer: int
    scales: int
    embedding: int  # one of embedding and output head
    root: int  # what FSDP 1 leaves to the root unit: embedding, output head, last norm
    ranks: int
    checkpoints: int  # inputs of the checkpointed layers that are on the GPU
    one_checkpoint: int
    kept: int  # what layers without a checkpoint keep
    offloaded: int  # inputs that wait in host memory
    final_norm: int  # its input in fp32 and its output, kept for the backward pass of the loss
    computed_again: int
    unpacked: int  # weights in bf16 while they are multiplied
    passing: int  # gradients on their way through the down projection
    tied: bool
    on_host: bool  # embedding and head

    @classmethod
    def of(cls, shape: Shape, setup: Setup, tokens: int, lora_r: int, choices: Choices) -> "_Sizes":
        embedding = BF16 * shape.vocab * shape.hidden
        saved = saved_bytes_per_token(shape, choices.compile_layers)
        kept = saved + BF16 * shape.hidden  # with the layer's input, which elsewhere counts as a checkpoint
        largest = BF16 * max(out * into for out, into in shape.linears.values())
        checkpointed = -(-shape.layers // choices.every_n_layers) if choices.checkpointing else 0
        layer_input = tokens * shape.hidden * BF16
        waiting = choices.offload_activations and checkpointed
        return cls(
            layers=shape.layers,
            layer=nf4_bytes(shape.linear_parameters) + BF16 * 2 * shape.hidden,
            unit_tensors=sorted(nf4_bytes(out * into) for out, into in shape.linears.values()),
            adapter_layer=BF16 * shape.adapter_parameters(lora_r) // shape.layers,
            scales=shape.layers * quantisation_state_bytes(shape.linear_parameters),
            embedding=embedding,
            root=(0 if choices.embeddings_on_host else (1 if shape.tied else 2) * embedding)
            + BF16 * shape.hidden,
            ranks=setup.world_size,
            # Of inputs that wait in host memory, two are on the GPU: this layer's and the next one's.
            # And the embedding's output, which is the first of them, never leaves.
            checkpoints=min(3, checkpointed) * layer_input if waiting else checkpointed * layer_input,
            one_checkpoint=layer_input if checkpointed else 0,
            kept=(shape.layers - checkpointed) * tokens * kept,
            offloaded=checkpointed * layer_input if waiting else 0,
            final_norm=tokens * shape.hidden * (FP32 + BF16),
            computed_again=tokens * saved if checkpointed else 0,
            unpacked=0 if choices.compile_layers else largest,  # compiled, it comes when most else is gone
            passing=tokens * passing_bytes_per_token(shape, choices.compile_layers),
            tied=shape.tied,
            on_host=choices.embeddings_on_host,
        )

    @property
    def adapter(self) -> int:
        return self.layers * self.adapter_layer

    def resident(self, offload: bool) -> dict[str, int]:
        """What stays on a GPU all through training."""
        items = {"quantisation state": self.scales, "cuBLAS workspaces": WORKSPACES}
        if offload:
            return items
        share = self.adapter // self.ranks
        return items | {
            "4-bit shards": self.layers * self.layer // self.ranks,
            "shard of embedding and head": self.root // self.ranks,
            "adapter": share,
            "gradients": share,
            "optimizer states": 2 * share,  # AdamW: two moments, in the adapter's dtype
        }

    def one_layer_backward(self, first: bool = False) -> dict[str, int]:
        """The backward pass of a checkpointed layer: everything computed again is alive.

        Args:
            first: the model's first layer, whose turn comes last: the other checkpoints are gone by then.
        """
        return {
            "checkpointed layer inputs": self.one_checkpoint if first else self.checkpoints,
            "layers that keep everything": 0 if first else self.kept,
            "one layer computed again": self.computed_again,
            "its gradients": self.passing,
            "weights in bf16": self.unpacked,  # bitsandbytes multiplies by the unpacked weight
        }

    def loss(self) -> dict[str, int]:
        """The moment of the loss, when the head has come from the host and no layer is gathered."""
        return {
            "checkpointed layer inputs": self.checkpoints,
            "layers that keep everything": self.kept,
            "head": self.embedding,
            "last norm": self.final_norm,
        }


def _fsdp1(sizes: _Sizes, setup: Setup) -> dict[str, dict[str, int]]:
    resident = sizes.resident(setup.offload)
    root = {
        "embedding and head": sizes.root
    }  # gathered from the first forward to the last backward of a step
    share = sizes.root // sizes.ranks
    # FSDP 1 copies a unit's tensors into one flat tensor and cuts its shard: for a moment there are 2.5 of the root.
    wrapping = {
        "quantisation state": sizes.scales,
        "embedding and head": sizes.root,
        "their flat copy": sizes.root,
        "shard of embedding and head": share,
    }
    if not setup.offload:
        wrapping["4-bit shards"] = resident["4-bit shards"]
        wrapping["adapter"] = resident["adapter"]
    kept = sizes.layers if not setup.reshard else 1
    # BACKWARD_PRE fetches the next unit ahead; with PEFT's policy that is a small one, of the adapter.
    backward = resident | root | {"gathered layers": kept * (sizes.layer + sizes.adapter_layer)}
    moments = {"wrapping": wrapping, "backward of a layer": backward | sizes.one_layer_backward()}
    if setup.offload:
        # Before the backward pass FSDP asks for the root again, and copies its shard once more from host memory.
        moments["between forward and backward"] = (
            resident
            | root
            | {
                "shard of embedding and head, on its way": share,
                "checkpointed layer inputs": sizes.checkpoints,
                "last norm": sizes.final_norm,
            }
        )
    return moments


def _fsdp2(sizes: _Sizes, setup: Setup) -> dict[str, dict[str, int]]:
    resident = sizes.resident(setup.offload)
    layer = sizes.layer + sizes.adapter_layer
    # Accelerate makes units of the embedding, and of the last norm with the output head.
    wrapping = {
        "quantisation state": sizes.scales,
        "embedding and head": sizes.root,
        "shard of embedding and head": sizes.root // sizes.ranks,
    }
    if sizes.on_host:
        wrapping["the layer that is being wrapped"] = sizes.layer
    if not setup.offload:
        wrapping["4-bit shards"] = sizes.layers * sizes.layer // sizes.ranks
        wrapping["adapter"] = sizes.adapter // sizes.ranks
    elif sizes.on_host:
        wrapping["shard on its way to the host"] = sizes.unit_tensors[-1] // sizes.ranks
    layers = {"gathered layers": (sizes.layers if not setup.reshard else 1) * layer}
    # The next unit is gathered ahead, if there is anything to gather; from host memory its shard comes first.
    on_its_way = layer + (layer // sizes.ranks if setup.offload else 0)
    ahead = {"next layer on its way": on_its_way if setup.reshard and sizes.ranks > 1 else 0}
    moments = {
        "wrapping": wrapping,
        "backward of a layer": resident | layers | ahead | sizes.one_layer_backward(),
    }
    if sizes.on_host:
        moments["loss"] = resident | ahead | sizes.loss()
        return moments
    # After the first layer the embedding is next, although nothing in it is trained.
    embedding = {"embedding on its way": sizes.embedding}
    moments["backward of the first layer"] = (
        resident | layers | embedding | sizes.one_layer_backward(first=True)
    )
    # An evaluation leaves the head gathered, and the embedding's buffer is freed only after the first layer has come.
    left = resident | {"head": sizes.embedding, "embedding": sizes.embedding}
    untrained = dict.fromkeys(("gradients", "optimizer states"), 0)
    moments["first step after an evaluation"] = left | untrained
    moments["evaluation"] = left | {"next layer on its way": layer}
    return moments


def _one_process(sizes: _Sizes) -> dict[str, dict[str, int]]:
    resident = sizes.resident(offload=False)
    moments = {"backward of a layer": resident | sizes.one_layer_backward()}
    if sizes.on_host:
        moments["loss"] = resident | sizes.loss()
    return moments


def _host(sizes: _Sizes, setup: Setup, spare_host: bool) -> dict[str, int]:
    """Host memory of a rank, memory-mapped checkpoints apart: the system can take their pages back."""
    host = {"Python and libraries": LIBRARIES}
    if sizes.on_host:
        host["head, pinned"] = pinned_bytes(sizes.embedding)
    if sizes.offloaded:
        host["layer inputs, pinned"] = sizes.offloaded
    if setup.offload and setup.fsdp_version == 2:  # tensor by tensor
        host["layers, pinned"] = sizes.layers * sum(
            pinned_bytes(size // sizes.ranks) for size in sizes.unit_tensors
        )
        host["embedding and head, pinned"] = pinned_bytes(sizes.root // sizes.ranks)
        host["adapter, gradients, optimizer"] = 4 * sizes.adapter // sizes.ranks
    elif setup.offload:
        layers = sizes.layers * pinned_bytes(sizes.layer // sizes.ranks)
        root = pinned_bytes(sizes.root // sizes.ranks)
        host["layers, pinned"] = layers
        host["embedding and head, pinned"] = root
        host["adapter, gradients, optimizer"] = 4 * sizes.adapter // sizes.ranks
        if spare_host:
            host["a pinned block as large as the root's, once reserved for a gradient"] = root
        else:
            host["pinned gradients of frozen weights"] = layers + root
            host["unpinned originals"] = (sizes.layers * sizes.layer + sizes.root) // sizes.ranks
    return host


def saved_bytes_per_token(shape: Shape, compiled: bool = False) -> int:
    """What one decoder layer keeps for its backward pass while it is computed again, in bytes a token.

    Counted in `LlamaDecoderLayer` with LoRA on all linear layers and no dropout: each of the two norms keeps its input
    in fp32 and its result in bf16 (the input of `lora_A`); attention keeps rotated queries and keys, values and its
    output (keys and values of the few key-value heads only: the kernel shares them between query heads); the MLP keeps
    gate, activated gate, up, and their product (the input of the last `lora_A`). Frozen weights ask for no input to be
    kept.

    Compiled, there is one tensor of the hidden width for each norm and for the attention's output and queries, and the
    MLP keeps gate, up and product.
    """
    keys = BF16 * shape.head_dim * 2 * shape.kv_heads
    queries = BF16 * shape.head_dim * 2 * shape.heads
    if compiled:
        return 3 * BF16 * shape.intermediate + 3 * BF16 * shape.hidden + queries + keys
    norms = 2 * (FP32 + BF16) * shape.hidden
    mlp = 4 * BF16 * shape.intermediate
    return norms + queries + keys + mlp


def passing_bytes_per_token(shape: Shape, compiled: bool = False) -> int:
    """Gradients that are alive at once in the backward pass of a layer, in bytes a token.

    Eager: the gradient that came in and that of the down projection's input. Compiled, the peak is a moment later, in
    the graph that holds gate and up: four tensors of the MLP's width more than what the layer kept, and the gradient
    that came in.
    """
    if compiled:
        return BF16 * (shape.hidden + 4 * shape.intermediate)
    return BF16 * (shape.hidden + shape.intermediate)


def pinned_bytes(wanted: int) -> int:
    """What PyTorch's pinned allocator takes for a request: the next power of two."""
    return 1 << max(0, wanted - 1).bit_length()


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
