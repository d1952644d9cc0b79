"""Gather the adapter of a model that is spread over processes, whole and on rank 0, and nothing of the base."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor

from nbutils.adapters.pieces import (
    SaveError,
    clean_name,
    file_key,
    fsdp1_units,
    join_name,
    parameters_outside_fsdp1,
    peft_model,
)
from nbutils.common.ranks import agree, rank


@dataclass
class Gathered:
    """The adapter on one rank after the gather.

    `tensors` maps the names of an adapter file to whole CPU tensors on rank 0, and is empty on the other ranks.
    `bytes_gathered` counts what the collectives put together on each rank; nothing moves without FSDP, so it is 0.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    bytes_gathered: int = 0


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
    for prefix, unit in fsdp1_units(model):
        flat = unit._handle.flat_param
        keys = [file_key(join_name(prefix, fqn), adapter_name) for fqn in flat._fqns]
        if not any(keys):
            continue
        gathered.bytes_gathered += flat._unpadded_unsharded_size.numel() * flat.element_size()
        with FSDP.summon_full_params(unit, recurse=False, writeback=False, rank0_only=True):
            if rank() == 0:
                for key, info in zip(keys, flat._param_infos):
                    if key is not None:
                        gathered.tensors[key] = _cpu_copy(getattr(info.module, info.param_name))
    for key, parameter in parameters_outside_fsdp1(model, adapter_name):
        whole = parameter.detach()
        if isinstance(whole, DTensor):
            # With offload the piece lies on the CPU, and NCCL moves bytes between GPUs only.
            whole = whole.to(compute_device(whole)).full_tensor()
            gathered.bytes_gathered += whole.numel() * whole.element_size()
        if rank() == 0:
            gathered.tensors[key] = _cpu_copy(whole)
    agree(_what_is_missing(model, gathered.tensors, adapter_name) if rank() == 0 else None, SaveError)
    return gathered


def missing_keys(model: torch.nn.Module, keys: set[str], adapter_name: str = "default") -> list[str]:
    """Return the file names that the model's adapter layers ask for and `keys` lacks.

    The layers are asked, not the parameters: under FSDP 1 a layer can lose its parameters' names, never its place.
    """
    wanted = []
    for name, module in model.named_modules():
        name = clean_name(model, name)
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
    for prefix, unit in fsdp1_units(model):
        flat = unit._handle.flat_param
        originals = flat._params or [flat] * len(
            flat._fqns
        )  # None without use_orig_params: all share one flag
        for fqn, parameter in zip(flat._fqns, originals):
            if parameter.requires_grad:
                yield join_name(prefix, fqn)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.endswith("_flat_param"):
            yield clean_name(model, name)


def _cpu_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
