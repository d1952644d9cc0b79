"""The guard of FSDP 2's gather: what the first one brings is compared with what this rank put in."""

import bitsandbytes as bnb
import torch
from torch.distributed.fsdp import FSDPModule

from nbutils.adapters.pieces import piece_of

# The copy changes the few bytes that look like NaN, a cast nearly all of them.
COPY = (
    "The copy in the gather reads them as numbers (pytorch/pytorch#159333). Call "
    "nbutils.patches.fsdp2_gather.gather_as_bytes() before training, as the script does, or take FSDP 1."
)
CAST = (
    "A cast does that: FSDP gathers in another dtype than the one they are stored in (bnb_4bit_quant_storage). Set "
    "bf16, fp16 or mixed_precision to the dtype of the storage, or load with that storage."
)


class AlteredWeights(RuntimeError):
    """What FSDP 2 gathers is not what the ranks hold."""


def check_first_gather(model: torch.nn.Module) -> None:
    """Compare, in the first forward pass, what the gather of a layer brings with what this rank put into it.

    Args:
        model: sharded by FSDP 2; with any other nothing is done.

    Raises:
        AlteredWeights: in that forward pass, with the number of bytes that differ.
    """
    unit = next((module for module in model.modules() if _is_innermost_unit_of_packed(module)), None)
    if unit is None:
        return
    packed = [module for module in unit.modules() if isinstance(module, bnb.nn.Linear4bit)]
    pieces = [piece_of(module.weight.detach()) for module in packed]
    held = [_bytes(piece.held).to("cpu", copy=True) for piece in pieces]

    def compare(*_):
        handle.remove()
        brought = [_bytes(piece.cut(module.weight.detach())).cpu() for piece, module in zip(pieces, packed)]
        differ = sum((here != there).sum().item() for here, there in zip(held, brought))
        if differ:
            whole = sum(map(torch.numel, held))
            raise AlteredWeights(
                f"FSDP 2 gathered a layer with {differ:,} of this rank's {whole:,} packed bytes changed; none was "
                f"wanted. {CAST if differ > whole / 2 else COPY}"
            )

    handle = unit.register_forward_pre_hook(compare)  # behind FSDP's own hook, which gathers


def _is_innermost_unit_of_packed(module: torch.nn.Module) -> bool:
    units = [inner for inner in module.modules() if isinstance(inner, FSDPModule)]
    return units == [module] and any(isinstance(inner, bnb.nn.Linear4bit) for inner in module.modules())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
