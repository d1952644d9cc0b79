"""Compile what stands inside a decoder layer, and leave FSDP and the checkpoint outside."""

import os

import bitsandbytes as bnb
import torch
from transformers import PreTrainedModel

PARTS = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")


def compile_layers(model: PreTrainedModel) -> int:
    """Let torch.compile fuse the small operations of each decoder layer: LoRA's scaling and sums, norms, activations.

    The parts of a layer are compiled, not the layer: FSDP's gathering and the activation checkpoint stay around them,
    uncompiled, so both do exactly what they did. All layers share the same few graphs. Fused operations round to bf16
    less often, so losses differ in the last digits.

    Args:
        model: with or without an adapter, before FSDP wraps it; changed in place.

    Returns:
        The number of parts that will be compiled at their first use.

    Raises:
        ValueError: the launch is FSDP 1's.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("FSDP_VERSION", "1") == "1":
        raise ValueError(
            "compile_layers wants FSDP 2. Under FSDP 1, PEFT's policy puts units inside attention and MLP, and "
            "torch.compile gives up after eight compilations of each. Launch with config_fsdp2.yaml, or leave it off."
        )
    bnb.nn.Linear4bit.forward = multiply  # for the whole process; a second call changes nothing
    compiled = 0
    for layer in model.get_decoder().layers:
        for name in PARTS:
            getattr(layer, name).compile()
            compiled += 1
    return compiled


def multiply(self: bnb.nn.Linear4bit, x: torch.Tensor) -> torch.Tensor:
    """`Linear4bit.forward` with the quantisation state read from the module.

    FSDP 2 puts a plain tensor in the place of the weight, and the original method then repairs the tensor: something
    torch.compile cannot trace, so each of the seven projections would end a graph.

    Args:
        x: `(..., in_features)` in bf16.

    Returns:
        `(..., out_features)`.
    """
    return bnb.matmul_4bit(x, self.weight, bias=self.bias, quant_state=self.quant_state)
