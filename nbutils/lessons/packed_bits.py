"""Packed 4-bit weights, looked at: all of a model's, and two bytes read in three ways."""

import torch
from bitsandbytes.nn import Linear4bit

from nbutils.lessons import plots


def packed_weights(model: torch.nn.Module) -> list[torch.Tensor]:
    """The packed values of all 4-bit layers, in the storage dtype; changing them changes the model."""
    return [module.weight.data for module in model.modules() if isinstance(module, Linear4bit)]


def print_readings(values: dict[str, torch.Tensor]) -> None:
    """Print values of 16 bits as bits, as the number that their dtype declares, and as four 4-bit codes.

    Args:
        values: what it is -> a tensor of one element.
    """
    rows = []
    for what, value in values.items():
        low, high = value.reshape(1).view(torch.uint8).tolist()
        codes = (low >> 4, low & 15, high >> 4, high & 15)
        kind = str(value.dtype).removeprefix("torch.")
        rows.append((what, f"{high:08b} {low:08b}", kind, f"{value.item():.4g}", " ".join(map(str, codes))))
    plots.table(["two bytes", "bits", "declared", "as a number", "as 4-bit codes"], rows)
