"""Who holds what: the adapter of a model that is spread over processes, gathered whole or looked at piece by piece.

Under FSDP each process (a *rank*) owns a piece of each tensor. `gather_adapter` brings the pieces of the adapter
together with the public calls of torch. `own_pieces` reads what this rank holds without talking to anybody, so that
a saved file can be checked against the source and not against a second copy of the same gather.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nbutils.common.ranks import agree, rank

WRAPPER_SEGMENTS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}


class SaveError(RuntimeError):
    """The adapter cannot be saved as it is. What was on disk before is still there."""


@dataclass
class Gathered:
    """The adapter on one rank after the gather.

    `tensors` maps the names of an adapter file to whole CPU tensors on rank 0, and is empty on the other ranks.
    `bytes_gathered` counts what the collectives put together on each rank; nothing moves without FSDP, so it is 0.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    bytes_gathered: int = 0


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


def gather_adapter(model: torch.nn.Module, adapter_name: str = "default") -> Gathered:
    """Bring the adapter together on rank 0, unit by unit, and nothing of the base. Every rank must call it.

    Args:
        model: the outermost model: FSDP 1 (either `use_orig_params`), FSDP 2, DDP or a plain `PeftModel`.
            The dtypes are those the parameters are kept in, not those they are computed in.
        adapter_name: PEFT's name for the adapter.

    Returns:
        The tensors on rank 0, and the bytes that each rank had to put together. A unit that holds base and adapter
        in one flat parameter is gathered whole, one such unit at a time; PEFT's wrap policy makes none.

    Raises:
        SaveError: the model is not the outermost one, holds another kind of adapter, trains a parameter that an
            adapter file has no place for, or has an adapter layer whose tensor was not found.
    """
    _reject_what_a_file_cannot_hold(model, adapter_name)
    gathered = Gathered()
    for prefix, unit in _fsdp1_units(model):
        flat = unit._handle.flat_param
        keys = [file_key(_join(prefix, fqn), adapter_name) for fqn in flat._fqns]
        if not any(keys):
            continue
        gathered.bytes_gathered += flat._unpadded_unsharded_size.numel() * flat.element_size()
        with FSDP.summon_full_params(unit, recurse=False, writeback=False, rank0_only=True):
            if rank() == 0:
                for key, info in zip(keys, flat._param_infos):
                    if key is not None:
                        gathered.tensors[key] = _cpu_copy(getattr(info.module, info.param_name))
    for key, parameter in _parameters_outside_fsdp1(model, adapter_name):
        whole = parameter.detach()
        if isinstance(whole, DTensor):
            # With offload the piece lies on the CPU, and NCCL moves bytes between GPUs only.
            whole = whole.to(compute_device(whole)).full_tensor()
            gathered.bytes_gathered += whole.numel() * whole.element_size()
        if rank() == 0:
            gathered.tensors[key] = _cpu_copy(whole)
    agree(_what_is_missing(model, gathered.tensors, adapter_name) if rank() == 0 else None, SaveError)
    return gathered


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
    for prefix, unit in _fsdp1_units(model):
        flat = unit._handle.flat_param
        shard = getattr(
            flat, "_local_shard", flat.detach()
        )  # set at the first forward; the same storage before it
        for fqn, shape, info in zip(flat._fqns, flat._shapes, flat._shard_param_infos):
            key = file_key(_join(prefix, fqn), adapter_name)
            if key is not None:
                pieces[key] = _flat_piece(shard.detach(), shape, info)
    for key, parameter in _parameters_outside_fsdp1(model, adapter_name):
        if isinstance(parameter, DTensor):
            pieces[key] = piece_of(parameter.detach())
        else:
            pieces[key] = Piece(parameter.detach(), tuple(parameter.shape))
    return pieces


def missing_keys(model: torch.nn.Module, keys: set[str], adapter_name: str = "default") -> list[str]:
    """Return the file names that the model's adapter layers ask for and `keys` lacks.

    The layers are asked, not the parameters: under FSDP 1 a layer can lose its parameters' names, never its place.
    """
    wanted = []
    for name, module in _named_modules(model):
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            if not any(key.startswith(f"{name}.") for key in keys):
                wanted.append(f"{name}.weight")
        elif isinstance(module, BaseTunerLayer):
            for kind in module.adapter_layer_names:
                holder = getattr(module, kind, ())
                if adapter_name in holder:
                    bare = kind == "lora_magnitude_vector" or isinstance(holder, torch.nn.ParameterDict)
                    wanted.append(f"{name}.{kind}" + ("" if bare else ".weight"))
    return [key for key in wanted if key not in keys]


def compute_device(tensor: DTensor | None = None) -> torch.device:
    """Return the device on which this rank's collectives run: the GPU under NCCL, the CPU under gloo."""
    if tensor is not None:
        kind = tensor.device_mesh.device_type
    else:
        kind = "cuda" if dist.is_initialized() and "nccl" in dist.get_backend() else "cpu"
    return (
        torch.device("cpu") if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())
    )


def _reject_what_a_file_cannot_hold(model: torch.nn.Module, adapter_name: str) -> None:
    config = peft_model(model).peft_config.get(adapter_name)
    if config is None or config.peft_type.value != "LORA":
        kind = "no adapter" if config is None else f"a {config.peft_type.value} adapter"
        raise SaveError(f"Found {kind} under the name {adapter_name!r}; LoRA or DoRA was wanted.")
    for name in _trained_names(model):
        if file_key(name, adapter_name) is None:
            raise SaveError(
                f"{name} is trained, and an adapter file has no place for it: its training would be lost. "
                "Freeze it, or name its module in LoraConfig(modules_to_save=[...])."
            )


def _what_is_missing(
    model: torch.nn.Module, tensors: dict[str, torch.Tensor], adapter_name: str
) -> str | None:
    missing = missing_keys(model, set(tensors), adapter_name)
    if tensors and not missing:
        return None
    return (
        f"Gathered {len(tensors)} tensors, and {len(missing)} of the adapter are missing "
        f"(the first: {missing[0] if missing else 'all'}). Pass the outermost model, as the trainer wrapped it."
    )


def _trained_names(model: torch.nn.Module) -> Iterator[str]:
    for prefix, unit in _fsdp1_units(model):
        flat = unit._handle.flat_param
        originals = flat._params or [flat] * len(
            flat._fqns
        )  # None without use_orig_params: all share one flag
        for fqn, parameter in zip(flat._fqns, originals):
            if parameter.requires_grad:
                yield _join(prefix, fqn)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.endswith("_flat_param"):
            yield _clean(model, name)


def _fsdp1_units(model: torch.nn.Module) -> list[tuple[str, FSDP]]:
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
    return [(_clean(inner, name), unit) for name, unit in units if unit._handle is not None]


def _parameters_outside_fsdp1(
    model: torch.nn.Module, adapter_name: str
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    in_units = {
        _join(prefix, fqn) for prefix, unit in _fsdp1_units(model) for fqn in unit._handle.flat_param._fqns
    }
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation the root still shows whole parameters in the compute dtype
    for name, parameter in model.named_parameters():
        name = _clean(model, name)
        key = file_key(name, adapter_name)
        if key is not None and name not in in_units and not name.endswith("_flat_param"):
            yield key, parameter


def _flat_piece(shard: torch.Tensor, shape: torch.Size, info) -> Piece:
    if not info.in_shard:
        return Piece(shard[:0], tuple(shape))
    held = shard[info.offset_in_shard : info.offset_in_shard + info.numel_in_shard]
    return Piece(held, tuple(shape), info.intra_param_start_idx)


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


def _named_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, module in model.named_modules():
        yield _clean(model, name), module


def _clean(model: torch.nn.Module, name: str) -> str:
    """Drop what wrappers add to a name, so that it counts from the PeftModel: `base_model.model. ...`"""
    parts = [part for part in name.split(".") if part not in WRAPPER_SEGMENTS]
    if isinstance(model, torch.nn.parallel.DistributedDataParallel) and parts[:1] == ["module"]:
        parts = parts[1:]
    return ".".join(parts)


def _join(prefix: str, fqn: str) -> str:
    parts = [part for part in fqn.split(".") if part not in WRAPPER_SEGMENTS]
    return ".".join([prefix, *parts] if prefix else parts)


def _cpu_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
