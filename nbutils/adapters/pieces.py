"""Who holds what: the parameters of a model that is spread over processes, by the names of an adapter's file.

Under FSDP each process (a *rank*) owns a piece of each tensor, and wrappers put segments of their own into the names.
`own_pieces` reads what this rank holds without talking to anybody, so that a saved file can be checked against the
source and not against a second copy of the same gather.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

WRAPPER_SEGMENTS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}


class SaveError(RuntimeError):
    """The adapter cannot be saved as it is. What was on disk before is still there."""


@dataclass
class Piece:
    """What this rank holds of one tensor: `held`, which is a run of the whole, flattened, from element `start` on.

    `held` keeps the shape it has in memory: flat under FSDP 1, some rows under FSDP 2, the whole without FSDP.
    """

    held: torch.Tensor
    shape: tuple[int, ...]
    start: int = 0

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the same part of a whole tensor of shape `shape`, in the shape of `held`."""
        return whole.flatten()[self.start : self.start + self.held.numel()].view(self.held.shape)


def peft_model(model: torch.nn.Module) -> PeftModel:
    """Return the `PeftModel` inside any wrapper (FSDP, DDP, torch.compile).

    Raises:
        SaveError: there is none.
    """
    for module in model.modules():
        if isinstance(module, PeftModel):
            return module
    raise SaveError(
        f"Found a {type(model).__name__} without a PeftModel inside; an adapter was wanted. "
        "Pass the model that get_peft_model made, or the wrapped one that the trainer holds."
    )


def file_key(name: str, adapter_name: str = "default") -> str | None:
    """Translate a parameter's name into its name in `adapter_model.safetensors`, or None for the base's parameters.

    PEFT leaves the adapter's own name out of the file, and DoRA's magnitude without `.weight`
    (`peft.utils.save_and_load.get_peft_model_state_dict`, `LoraModel._get_adapter_state_dict`).
    """
    adapter = re.escape(adapter_name)
    saved_module = re.search(rf"\.modules_to_save\.{adapter}\.", name)
    if saved_module:
        return name[: saved_module.start()] + "." + name[saved_module.end() :]
    lora = re.fullmatch(rf"(.*\.(lora_\w+))\.{adapter}(\.\w+)?", name)
    if lora is None:
        return None
    return lora[1] if lora[2] == "lora_magnitude_vector" else lora[1] + (lora[3] or "")


def own_pieces(model: torch.nn.Module, adapter_name: str = "default") -> dict[str, Piece]:
    """Return what this rank holds of the adapter, by file name, without any communication.

    Args:
        model: as for `gather_adapter`.
        adapter_name: PEFT's name for the adapter.

    Returns:
        For each tensor of the adapter this rank's piece of it, which is empty where a tensor is too small to reach
        every rank. The pieces are views: they change if training goes on.
    """
    pieces = {}
    for prefix, unit in fsdp1_units(model):
        flat = unit._handle.flat_param
        shard = getattr(
            flat, "_local_shard", flat.detach()
        )  # set at the first forward; the same storage before it
        for fqn, shape, info in zip(flat._fqns, flat._shapes, flat._shard_param_infos):
            key = file_key(join_name(prefix, fqn), adapter_name)
            if key is not None:
                pieces[key] = _flat_piece(shard.detach(), shape, info)
    for key, parameter in parameters_outside_fsdp1(model, adapter_name):
        if isinstance(parameter, DTensor):
            pieces[key] = piece_of(parameter.detach())
        else:
            pieces[key] = Piece(parameter.detach(), tuple(parameter.shape))
    return pieces


def piece_of(parameter: DTensor) -> Piece:
    """What this rank holds of a parameter of FSDP 2.

    Raises:
        SaveError: it is not sharded by whole rows.
    """
    sizes, offsets = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    if any(offsets[1:]) or tuple(sizes[1:]) != tuple(parameter.shape[1:]):
        raise SaveError(
            f"Found a tensor sharded as {parameter.placements}; whole rows a rank, Shard(0), were wanted. "
            "Let Accelerate shard the model, as configs/accelerate/config_fsdp2.yaml does."
        )
    row = torch.Size(parameter.shape[1:]).numel()
    return Piece(parameter.to_local(), tuple(parameter.shape), offsets[0] * row if sizes[0] else 0)


def fsdp1_units(model: torch.nn.Module) -> list[tuple[str, FSDP]]:
    """Return (cleaned name, unit) for each FSDP 1 unit that has parameters of its own."""
    inner = getattr(model, "_orig_mod", model)
    units = [(name, module) for name, module in inner.named_modules() if isinstance(module, FSDP)]
    if not units:
        return []
    if not isinstance(inner, FSDP):
        raise SaveError(
            f"Found FSDP units inside a {type(inner).__name__} that is not itself wrapped; the outermost model was "
            "wanted, because the root unit holds parameters too. Pass trainer.model_wrapped."
        )
    inner.check_is_root()  # settles who is root, so that opening a unit alone does not make it one
    return [(clean_name(inner, name), unit) for name, unit in units if unit._handle is not None]


def parameters_outside_fsdp1(
    model: torch.nn.Module, adapter_name: str
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The adapter's parameters that no unit of FSDP 1 holds, by file name: FSDP 2, DDP, or no wrapper at all."""
    in_units = {
        join_name(prefix, fqn) for prefix, unit in fsdp1_units(model) for fqn in unit._handle.flat_param._fqns
    }
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation the root still shows whole parameters in the compute dtype
    for name, parameter in model.named_parameters():
        name = clean_name(model, name)
        key = file_key(name, adapter_name)
        if key is not None and name not in in_units and not name.endswith("_flat_param"):
            yield key, parameter


def clean_name(model: torch.nn.Module, name: str) -> str:
    """Drop what wrappers add to a name, so that it counts from the PeftModel: `base_model.model. ...`"""
    parts = [part for part in name.split(".") if part not in WRAPPER_SEGMENTS]
    if isinstance(model, torch.nn.parallel.DistributedDataParallel) and parts[:1] == ["module"]:
        parts = parts[1:]
    return ".".join(parts)


def join_name(prefix: str, fqn: str) -> str:
    """The cleaned name of a unit, and that of a parameter inside it, as one."""
    parts = [part for part in fqn.split(".") if part not in WRAPPER_SEGMENTS]
    return ".".join([prefix, *parts] if prefix else parts)


def _flat_piece(shard: torch.Tensor, shape: torch.Size, info) -> Piece:
    if not info.in_shard:
        return Piece(shard[:0], tuple(shape))
    held = shard[info.offset_in_shard : info.offset_in_shard + info.numel_in_shard]
    return Piece(held, tuple(shape), info.intra_param_start_idx)
