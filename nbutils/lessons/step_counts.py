"""What a step costs that can be counted on any machine: bytes kept for the backward pass, runs of the 4-bit layers."""

from collections.abc import Callable
from dataclasses import dataclass

import bitsandbytes as bnb
import torch


@dataclass(frozen=True)
class Step:
    """What was counted in one step.

    Args:
        kept: bytes that the forward pass kept for the backward pass, weights aside.
        forward: how often a 4-bit layer ran in the forward pass.
        again: how often in the backward pass.
        gradients: of all trained parameters, one after the other.
    """

    kept: int
    forward: int
    again: int
    gradients: torch.Tensor


def counted_step(model: torch.nn.Module, batch: torch.Tensor) -> Step:
    """Run one step, and count.

    Args:
        model: with an adapter.
        batch: token ids, (rows, length).
    """
    runs = []
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.register_forward_pre_hook(lambda *_: runs.append(1))
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    loss, kept = kept_for_backward(lambda: model(input_ids=batch, labels=batch).loss, weights)
    forward = len(runs)
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return Step(kept, forward, len(runs) - forward, gradients)


def kept_for_backward(
    forward: Callable[[], torch.Tensor], weights: set[int] = frozenset()
) -> tuple[torch.Tensor, int]:
    """The result of a forward pass, and the bytes that it keeps for the backward pass.

    Args:
        forward: the pass.
        weights: addresses of tensors that are in memory in any case.
    """
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return forward(), sum(kept.values())


def gradients_apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, float]:
    """How far two sets of gradients are apart, as a share of the length of ours, and the cosine between them.

    Args:
        ours: name -> gradient.
        theirs: the same names.
    """
    a, b = (torch.cat([gradients[name].flatten() for name in sorted(ours)]) for gradients in (ours, theirs))
    return ((a - b).norm() / a.norm()).item(), torch.cosine_similarity(a, b, 0).item()
