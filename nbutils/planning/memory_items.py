"""The items of the memory plan: how many bytes each takes, and which are alive at the same moment."""

from dataclasses import dataclass

from nbutils.planning.run_setup import Choices, Setup
from nbutils.planning.shapes import Shape

GIB = 2**30
BF16 = 2  # bytes
FP32 = 4
# cuBLAS keeps 32 MiB a thread that multiplies (forward and backward) on an H200, 8 on a 4090.
WORKSPACES = 2 * 32 * 2**20
# Python, torch, transformers and the rest in host memory, a rank. Anonymous memory was recorded as 1.6 to 1.8 GiB with
# 8 layers and as 2.1 to 2.5 with 80 (`host` in the records): so a part belongs to the layers, Python's objects.
LIBRARIES = int(1.7 * GIB)
OBJECTS_OF_A_LAYER = 6 * 2**20
LIBRARIES_CPU = int(0.4 * GIB)  # the same with torch's CPU build, which a rehearsal needs no more than


def nf4_bytes(parameters: int) -> int:
    """Packed 4-bit weights: half a byte each."""
    return parameters // 2


def quantisation_state_bytes(parameters: int) -> int:
    """Scales of NF4 with double quantisation.

    One byte for each block of 64 weights, and one fp32 for each 256 of these bytes: 0.127 bits a weight
    (QLoRA, arXiv 2305.14314, section 3, "Double Quantization"). FSDP does not shard it: every rank has all of it.
    """
    return parameters // 64 + FP32 * parameters // (64 * 256)


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


def items_of(
    shape: Shape, setup: Setup, tokens: int, lora_r: int, choices: Choices, spare_host: bool
) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Bytes a rank, item by item; `nbutils.planning.memory_plan.plan` makes a plan of them.

    Args:
        shape: of the model.
        setup: from the accelerate config.
        tokens: a rank and step.
        lora_r: rank of the adapter, on all linear layers.
        choices: further settings of the script.
        spare_host: `nbutils.patches.fsdp1_pinned_memory.spare_host_memory` was called.

    Returns:
        The items on the GPU at each moment that can be its peak, and those in host memory.
    """
    sizes = _Sizes.of(shape, setup, tokens, lora_r, choices)
    if setup.fsdp_version == 0:
        moments = _one_process(sizes)
    elif setup.fsdp_version == 1:
        moments = _fsdp1(sizes, setup)
    else:
        moments = _fsdp2(sizes, setup)
    moments = {name: {what: size for what, size in items.items() if size} for name, items in moments.items()}
    return moments, _host(sizes, setup, spare_host)


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
    # With NO_SHARD the GPU keeps all of it, and the host has it too.
    offload = setup.offload and not setup.no_shard
    resident = sizes.resident(offload)
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
    if not offload:
        wrapping["4-bit shards"] = resident["4-bit shards"]
        wrapping["adapter"] = resident["adapter"]
    kept = 1 if setup.reshard or setup.no_shard else sizes.layers
    # BACKWARD_PRE fetches the next unit ahead; with PEFT's policy that is a small one, of the adapter.
    backward = resident | root | {"gathered layers": kept * (sizes.layer + sizes.adapter_layer)}
    moments = {"wrapping": wrapping, "backward of a layer": backward | sizes.one_layer_backward()}
    if offload:
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
    if sizes.on_host:
        moments["loss"] = resident | sizes.loss()
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
    host = {
        "Python and libraries": LIBRARIES,
        "modules and FSDP's notes, layer by layer": OBJECTS_OF_A_LAYER * sizes.layers,
    }
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
