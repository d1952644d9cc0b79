"""A model rounded as a GGUF file holds it, and back in torch: what another 4-bit base than NF4 makes of an adapter."""

import torch
from gguf import GGMLQuantizationType, quants


@torch.no_grad()
def round_as_gguf(model: torch.nn.Module, kind: str) -> torch.nn.Module:
    """Round the linear layers of a bf16 model, the head apart, to the values that a GGUF file of this kind can hold.

    Args:
        model: changed in place; each row is a multiple of 32 long.
        kind: `Q8_0`, `Q4_0` or another that the package gguf can write; the K-quants it can only read.

    Returns:
        The model.
    """
    form = GGMLQuantizationType[kind]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed = quants.quantize(module.weight.float().numpy(), form)
            module.weight.copy_(torch.from_numpy(quants.dequantize(packed, form)))
    return model
