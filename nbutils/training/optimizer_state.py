"""What this rank's optimizer remembers, taken apart for a checkpoint and put back into the same memory."""

import torch
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from nbutils.adapters.checkpoint_folder import CheckpointError
from nbutils.adapters.pieces import SaveError

OPTIMIZER = "optimizer."  # what stands before the name of an optimizer's tensor in a rank's file
SET_BY_LAUNCH = (
    "lr",
    "initial_lr",
    "betas",
    "eps",
    "weight_decay",
    "momentum",
)  # settings of a group, not memory


def optimizer_pieces(optimizer) -> tuple[dict[str, torch.Tensor], dict]:
    """Take apart what this rank's optimizer remembers.

    Args:
        optimizer: torch's, or Accelerate's around it. Its tensors may be DTensors; this rank's part is taken.

    Returns:
        Tensors by name, and notes that JSON can hold: the settings of each group and the state that is no tensor.

    Raises:
        SaveError: the optimizer remembers something that is neither a tensor nor a number.
    """
    tensors, numbers = {}, {}
    for index, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            label = f"{OPTIMIZER}{index}.{name}"
            if isinstance(value, torch.Tensor):
                tensors[label] = value.to_local() if isinstance(value, DTensor) else value
            elif value is None or isinstance(value, bool | int | float):
                numbers[label] = value
            else:
                raise SaveError(
                    f"The optimizer keeps {name} as {type(value).__name__}; a tensor or a number was wanted."
                )
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    beside = [label for label in tensors if not _lies_with_its_parameter(optimizer, label)]
    return tensors, {
        "groups": groups,
        "numbers": numbers,
        "on_cpu": beside,
        "parameters": len(_parameters(optimizer)),
    }


@torch.no_grad()
def put_optimizer_back(optimizer, tensors: dict[str, torch.Tensor], notes: dict) -> None:
    """Give the optimizer back what `optimizer_pieces` took; the learning rate and its kin are this launch's.

    What the schedule has made of the learning rate by now comes from `put_schedule_back`.

    Raises:
        CheckpointError: the optimizer steps over another number of parameters.
    """
    parameters = _parameters(optimizer)
    if len(parameters) != notes["parameters"]:
        raise CheckpointError(
            f"The optimizer has {len(parameters)} parameters on this rank and the checkpoint {notes['parameters']}. "
            "Launch with the configuration that the run began with."
        )
    for group, saved in zip(optimizer.param_groups, notes["groups"]):
        kept = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}  # JSON has no tuples
        group.update({k: v for k, v in kept.items() if k not in SET_BY_LAUNCH})
    for label, value in {**tensors, **notes["numbers"]}.items():
        if not label.startswith(OPTIMIZER):
            continue
        parameter, name = _named(parameters, label)
        if isinstance(value, torch.Tensor):
            value = _as_it_was(value, parameter, label in notes["on_cpu"])
        optimizer.state[parameter][name] = value


def put_schedule_back(scheduler, saved: dict, groups: list[dict]) -> None:
    """Put this launch's schedule where the checkpoint's stood: its learning rates, at that step.

    Args:
        scheduler: torch's, or Accelerate's around it, fresh.
        saved: its `state_dict` in the checkpoint.
        groups: settings of the optimizer's groups in the checkpoint, for a schedule that follows the losses: that one
            keeps its learning rate nowhere else. It comes back as it was.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)
    if not isinstance(scheduler, LambdaLR):  # of transformers: reduce_lr_on_plateau, greedy
        scheduler.load_state_dict(saved)
        for group, was in zip(scheduler.optimizer.param_groups, groups):
            group["lr"] = was["lr"]
        return
    rates = [
        base * factor(saved["last_epoch"]) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)
    ]
    this_launch = {"base_lrs": scheduler.base_lrs, "lr_lambdas": [None] * len(rates), "_last_lr": rates}
    scheduler.load_state_dict(saved | this_launch)
    for group, rate in zip(scheduler.optimizer.param_groups, rates):
        group["lr"] = rate


def _parameters(optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _named(parameters: list[torch.nn.Parameter], label: str) -> tuple[torch.nn.Parameter, str]:
    index, name = label.removeprefix(OPTIMIZER).split(".", 1)
    return parameters[int(index)], name


def _lies_with_its_parameter(optimizer, label: str) -> bool:
    parameter, name = _named(_parameters(optimizer), label)
    return optimizer.state[parameter][name].device == parameter.device


def _as_it_was(value: torch.Tensor, parameter: torch.nn.Parameter, on_cpu: bool) -> torch.Tensor:
    value = value if on_cpu else value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.to_local().shape and value.dim():
        # Not DTensor.from_local: it moves a piece to the mesh's devices, and with offload the piece belongs on the CPU.
        state = torch.zeros_like(parameter, dtype=value.dtype)
        state.to_local().copy_(value)
        return state
    return value
