"""Compile what stands inside a decoder layer, and leave FSDP and the checkpoint outside."""

import os
from types import MethodType

import torch
from torch import nn
from transformers import PreTrainedModel

from nbutils.patches.linear4bit_forward import make_linear4bit_traceable
from nbutils.training.stacked_adapters import (
    can_share,
    one_plain_adapter,
    stack_adapters,
    stacked,
    with_update,
)

# For measuring: 0 leaves each adapter to PEFT, as it was.
STACKED = os.environ.get("NBUTILS_STACKED_ADAPTERS", "1") == "1"


def compile_layers(model: PreTrainedModel) -> int:
    """Let torch.compile fuse the small operations of each decoder layer: LoRA's scaling and sums, norms, activations.

    The parts of a layer are compiled, not the layer: FSDP's gathering and the activation checkpoint stay around them,
    uncompiled, so both do exactly what they did. All layers share the same few graphs. Fused operations round to bf16
    elsewhere. Before the first step losses differ in the last digits; then by more, for a while: of what a young
    adapter adds, each way of rounding loses another part (`benchmarks/adapter_rounding.py`).

    Args:
        model: with its adapter, before FSDP wraps it; changed in place. Without one, or with one that comes later, the
            A's of q, k and v are not stacked.

    Returns:
        The number of layers.

    Raises:
        ValueError: the launch is FSDP 1's.
    """
    refuse_fsdp1()
    make_linear4bit_traceable()
    gated = torch.compile(_gated)  # one function for all layers
    layers = model.get_decoder().layers
    for layer in layers:
        if STACKED and hasattr(layer.self_attn.q_proj, "lora_A"):
            stack_adapters(layer.self_attn)
        for part in (layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm):
            part.compile()
        layer.mlp.forward = MethodType(lambda mlp, x: adapter_first(mlp.down_proj, gated(mlp, x)), layer.mlp)
    return len(layers)


def refuse_fsdp1() -> None:
    """Refuse to compile under FSDP 1; the environment of the launch tells the version.

    Raises:
        ValueError: the launch is FSDP 1's.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("FSDP_VERSION", "1") == "1":
        raise ValueError(
            "compile_layers wants FSDP 2. Under FSDP 1, PEFT's policy puts units inside attention and MLP, and "
            "torch.compile gives up after eight compilations of each. Launch with config_fsdp2.yaml, or leave it off."
        )


def _gated(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The MLP up to its last projection: `(..., hidden)` to `(..., intermediate)`."""
    if not (STACKED and can_share((mlp.gate_proj, mlp.up_proj), x)):
        return mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    gate, up = stacked((mlp.gate_proj, mlp.up_proj), x)
    return mlp.act_fn(with_update(mlp.gate_proj, x, gate)) * with_update(mlp.up_proj, x, up)


def adapter_first(projection: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A projection with LoRA, the adapter before the frozen weight.

    The sum is the same; the order saves time. When a checkpoint computes a layer again it stops as soon as it has
    everything that the backward pass wants. Nothing wants the output of a layer's last projection, and its frozen
    weight keeps nothing, so that multiplication, a quarter of the layer, is left out. It would not be if it came first.

    Whatever is not one plain adapter in the dtype of `x` is left to PEFT.

    Args:
        projection: `Linear4bit`, or PEFT's LoRA layer around one.
        x: `(..., in_features)`.

    Returns:
        `(..., out_features)`.
    """
    if not one_plain_adapter(projection, x.dtype):
        return projection(x)
    (name,) = projection.active_adapters
    inner = projection.lora_A[name](projection.lora_dropout[name](x))
    update = projection.lora_B[name](inner) * projection.scaling[name]
    return projection.base_layer(x) + update
