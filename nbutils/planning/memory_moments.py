"""The moments of the memory plan: which items are alive at the same time, under FSDP 1, FSDP 2 and without FSDP."""

from nbutils.planning.memory_items import LIBRARIES, OBJECTS_OF_A_LAYER, pinned_bytes
from nbutils.planning.memory_sizes import Sizes
from nbutils.planning.run_setup import Choices, Setup
from nbutils.planning.shapes import Shape


def items_of(
    shape: Shape,
    setup: Setup,
    tokens: int,
    evaluated: int,
    lora_r: int,
    choices: Choices,
    spare_host: bool,
) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Bytes a rank, item by item; `nbutils.planning.memory_plan.plan` makes a plan of them.

    Args:
        shape: of the model.
        setup: from the accelerate config.
        tokens: a rank and forward pass.
        evaluated: the same in an evaluation.
        lora_r: rank of the adapter, on all linear layers.
        choices: further settings of the script.
        spare_host: `nbutils.patches.fsdp1_pinned_memory.spare_host_memory` was called.

    Returns:
        The items on the GPU at each moment that can be its peak, and those in host memory.
    """
    sizes = Sizes.of(shape, setup, tokens, evaluated, lora_r, choices)
    if setup.fsdp_version == 0:
        moments = _one_process(sizes)
    elif setup.fsdp_version == 1:
        moments = _fsdp1(sizes, setup)
    else:
        moments = _fsdp2(sizes, setup)
    moments = {name: {what: size for what, size in items.items() if size} for name, items in moments.items()}
    return moments, _host(sizes, setup, spare_host)


def _fsdp1(sizes: Sizes, setup: Setup) -> dict[str, dict[str, int]]:
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
    layers = {"gathered layers": kept * (sizes.layer + sizes.adapter_layer)}
    backward = resident | root | layers
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
    return moments | sizes.evaluation(resident | root, layers, sizes.embedding if sizes.on_host else 0)


def _fsdp2(sizes: Sizes, setup: Setup) -> dict[str, dict[str, int]]:
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
        return moments | sizes.evaluation(resident, layers | ahead, sizes.embedding)
    # After the first layer the embedding is next, although nothing in it is trained.
    embedding = {"embedding on its way": sizes.embedding}
    moments["backward of the first layer"] = (
        resident | layers | embedding | sizes.one_layer_backward(first=True)
    )
    # An evaluation leaves the head gathered, and the embedding's buffer is freed only after the first layer has come.
    left = resident | {"head": sizes.embedding, "embedding": sizes.embedding}
    moments["first step after an evaluation"] = left | dict.fromkeys(("gradients", "optimizer states"), 0)
    moments["first layer of an evaluation"] = left | {"gradients": 0, "next layer on its way": layer}
    return moments | sizes.evaluation(resident | {"head": sizes.embedding}, layers | ahead, sizes.embedding)


def _one_process(sizes: Sizes) -> dict[str, dict[str, int]]:
    resident = sizes.resident(offload=False)
    moments = {"backward of a layer": resident | sizes.one_layer_backward()}
    if sizes.on_host:
        moments["loss"] = resident | sizes.loss()
    return moments | sizes.evaluation(resident, {}, sizes.embedding if sizes.on_host else 0)


def _host(sizes: Sizes, setup: Setup, spare_host: bool) -> dict[str, int]:
    """Host memory of a rank, memory-mapped checkpoints apart: the system can take their pages back."""
    host = {
        "Python and libraries": LIBRARIES,
        "modules and FSDP's notes, layer by layer": OBJECTS_OF_A_LAYER * sizes.layers,
    }
    if sizes.on_host:
        host["head, pinned"] = pinned_bytes(sizes.embedding)
    if sizes.offloaded:
        host["layer inputs, pinned"] = sizes.offloaded
    if sizes.checkpoint:
        host["a checkpoint on its way to the disk"] = sizes.checkpoint
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
