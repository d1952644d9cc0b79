"""Projections that read the same input multiply it with their adapters' A at once: q, k and v; gate and up.

A's of rank 16 are thin, and a product with one of them is little more than reading its input. Stacked, the input of
attention is read once in place of three times, that of the MLP once in place of twice, and so it is in the backward
pass. The sums are the same; a product of another width may round its last bit otherwise.
"""

from collections.abc import Sequence
from types import MethodType

import torch
from torch import nn
from torch.nn import functional as F


def stack_adapters(attention: nn.Module) -> None:
    """Let q, k and v of an attention layer share one product with their A's.

    Args:
        attention: with `q_proj`, `k_proj` and `v_proj` that carry an adapter already; changed in place.
    """
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    shared = SharedInput(projections)
    for place, projection in enumerate(projections):
        projection.forward = MethodType(_projected(shared, place), projection)


def _projected(shared: "SharedInput", place: int):
    plain = type(shared.projections[place]).forward

    def forward(projection: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if not can_share(shared.projections, x):
            return plain(projection, x)
        return with_update(projection, x, shared.take(place, x))

    return forward


class SharedInput:
    """The stacked product of the last input, until each projection has taken its part.

    Args:
        projections: that are called one after the other with the same input.
    """

    def __init__(self, projections: Sequence[nn.Module]):
        self.projections = tuple(projections)
        self.x, self.parts = None, []

    def take(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """This projection's part, `(..., r)`; the last one to come leaves nothing behind.

        Args:
            place: of the projection.
            x: `(..., in_features)`.
        """
        if self.x is not x:
            self.x, self.parts = x, list(stacked(self.projections, x))
        part, self.parts[place] = self.parts[place], None
        if all(left is None for left in self.parts):
            self.x, self.parts = None, []
        return part


def stacked(projections: Sequence[nn.Module], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`x` times each projection's A, scaled: one product.

    Args:
        projections: that `can_share`.
        x: `(..., in_features)`.

    Returns:
        `(..., r)` for each.
    """
    matrices = [projection.lora_A[_name(projection)].weight for projection in projections]
    parts = F.linear(x, torch.cat(matrices)).split([matrix.shape[0] for matrix in matrices], dim=-1)
    # Scaled here it is r columns that are multiplied, and not all outputs: no bit differs if the scale is a power of 2.
    return tuple(part * p.scaling[_name(p)] for part, p in zip(parts, projections, strict=True))


def with_update(projection: nn.Module, x: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """The frozen product and the adapter's, `(..., out_features)`.

    Args:
        projection: that `can_share`.
        x: `(..., in_features)`.
        inner: `(..., r)`, from `stacked`.
    """
    return projection.base_layer(x) + projection.lora_B[_name(projection)](inner)


def can_share(projections: Sequence[nn.Module], x: torch.Tensor) -> bool:
    """Whether each carries one plain adapter in the dtype of `x` and without dropout; else they are left to PEFT."""
    return all(
        one_plain_adapter(projection, x.dtype)
        and isinstance(projection.lora_dropout[_name(projection)], nn.Identity)
        for projection in projections
    )


def one_plain_adapter(projection: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the order can be changed without changing a bit: not with two sums, and not with a cast in between.

    Args:
        projection: `Linear4bit`, or PEFT's LoRA layer around one.
        dtype: of the input.
    """
    if not hasattr(projection, "lora_A") or projection.disable_adapters or projection.merged:
        return False
    names = projection.active_adapters
    if len(names) != 1 or names[0] not in projection.lora_A or projection.lora_variant:
        return False
    return projection.lora_A[names[0]].weight.dtype == dtype


def _name(projection: nn.Module) -> str:
    return projection.active_adapters[0]
