"""The MLP of a decoder layer, tile by tile over the tokens: it keeps its input alone, and the MLP's width counts once.

In a row of 65,536 tokens each tensor of the MLP's width is 3.5 GiB for 70B, and seven of them meet in the backward
pass. A token's MLP knows no other token. So the tokens are cut into tiles; a tile is computed, and its wide tensors are
freed before the next one begins. In the backward pass each tile is computed once more and sends its gradients at once.

The idea is that of Arctic Long Sequence Training (arXiv 2506.13996, "TiledMLP"). On GPUs it ran on
one (`benchmarks/results/one_gpu/`).
"""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import PreTrainedModel

from nbutils.common.refused import Refused


def tile_mlps(model: PreTrainedModel, tiles: int) -> int:
    """Compute the MLP of each decoder layer in tiles.

    Losses are those of the whole MLP, but for the last bits where a product of another height rounds otherwise. The
    gradients of the adapters are summed over the tiles in the adapters' own dtype, as those of several passes are.

    Under a non-reentrant checkpoint this costs no multiplication: the checkpoint stops at the MLP's input, and what it
    would have computed again is computed tile by tile.

    Args:
        model: with its adapter, before FSDP wraps it, and after `compile_layers`; changed in place.
        tiles: of the tokens of a batch; a batch of fewer tokens has fewer.

    Returns:
        The number of layers.
    """
    layers = model.get_decoder().layers
    for layer in layers:
        layer.mlp.forward = partial(tiled, layer.mlp.forward, tiles)
    return len(layers)


def refuse_tiles(tiles: int, compiled: bool, dropout: float) -> None:
    """Refuse a number of tiles that is none, and a setting beside which a tile is not computed twice alike.

    Args:
        tiles: 0 leaves the MLP whole.
        compiled: the script's `compile_layers`.
        dropout: the script's `lora_dropout`.

    Raises:
        Refused: with what was found and what to do.
    """
    if tiles < 0:
        raise Refused(
            f"mlp_tiles is {tiles}; wanted 0, which leaves the MLP whole, or a number of tiles, as 8."
        )
    if tiles and compiled and dropout:
        raise Refused(
            f"mlp_tiles is {tiles}, with compile_layers and lora_dropout {dropout}. A tile is compiled twice, with "
            "gradients and without, and nothing promises that both drop the same numbers. Set lora_dropout to 0, or "
            "leave compile_layers off."
        )


def tiled(mlp: Callable[[torch.Tensor], torch.Tensor], tiles: int, x: torch.Tensor) -> torch.Tensor:
    """What `mlp` makes of `x`, in tiles.

    Args:
        mlp: takes `(tokens, hidden)` and gives the same shape; no token may depend on another one.
        tiles: at most so many.
        x: `(..., hidden)`.

    Returns:
        As `x`, in shape and dtype.
    """
    if not torch.is_grad_enabled():
        return _by_tiles(mlp, tiles, x)
    if (
        not x.requires_grad
    ):  # an adapter of the MLP alone, in the first layer: its gradient is wanted all the same
        x = x.detach().requires_grad_()
    return _Compute.apply(_Keep.apply(x, mlp, tiles), mlp, tiles)


class _Keep(torch.autograd.Function):
    """Keeps the input, and does the whole backward pass; what it is given back is the gradient of the *output*.

    It stands apart from `_Compute` so that its input is the last thing a layer keeps: a checkpoint that computes the
    layer again stops here, before the MLP.
    """

    @staticmethod
    def forward(ctx, x, mlp, tiles):
        ctx.mlp, ctx.tiles = mlp, tiles
        ctx.random = torch.get_rng_state(), *get_device_states(x)  # dropout's, before the first tile
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        gradient_of_x = x.new_empty(x.shape)
        cut = partial(_cut, tiles=ctx.tiles)
        with _random(x, *ctx.random):
            for tile, coming, going in zip(cut(x), cut(gradient), cut(gradient_of_x), strict=True):
                tile = tile.detach().requires_grad_()
                with torch.enable_grad():
                    made = ctx.mlp(tile)
                # A pass of its own: FSDP's hooks see each adapter's gradient as they see that of any layer.
                torch.autograd.backward(made, coming)
                going.copy_(tile.grad)
        return gradient_of_x, None, None


class _Compute(torch.autograd.Function):
    """The output, tile by tile and without a graph. The output's gradient goes on to `_Keep` as it is."""

    @staticmethod
    def forward(ctx, x, mlp, tiles):
        return _by_tiles(mlp, tiles, x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None


def _by_tiles(mlp: Callable, tiles: int, x: torch.Tensor) -> torch.Tensor:
    made = x.new_empty(x.shape)
    for tile, place in zip(_cut(x, tiles), _cut(made, tiles), strict=True):
        place.copy_(mlp(tile))
    return made


def _cut(x: torch.Tensor, tiles: int) -> tuple[torch.Tensor, ...]:
    """Tiles of `(tokens, hidden)`, views of `x` if it is contiguous."""
    return x.reshape(-1, x.shape[-1]).chunk(tiles)


@contextmanager
def _random(x: torch.Tensor, on_cpu: torch.Tensor, devices: list[int], states: list[torch.Tensor]):
    """Random numbers as they were in the forward pass, and afterwards as if none had been drawn."""
    with torch.random.fork_rng(devices, device_type=x.device.type if devices else "cuda"):
        torch.set_rng_state(on_cpu)
        set_device_states(devices, states, device_type=x.device.type)
        yield
