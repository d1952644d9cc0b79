"""What really runs: read after wrapping, compared with what was asked for, before the first step."""

import os

import bitsandbytes as bnb
import torch
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from nbutils.common.versions import not_tested_together
from nbutils.patches.hybrid_timeout import give_its_groups_the_timeout
from nbutils.planning.hybrid_shard import is_hybrid
from nbutils.training.first_gather import check_first_gather


class NotAsPromised(RuntimeError):
    """The run that started is not the run that was asked for."""


def nf4_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """Count the packed 4-bit weights that this rank holds, and those of the whole model.

    Args:
        model: wrapped by FSDP 1, sharded by FSDP 2, or not sharded at all.

    Returns:
        `(here, everywhere)` in bytes. The quantisation state (scales) is not counted: FSDP does not shard it.
    """
    here = everywhere = 0
    for handle in _flat_handles(model):
        flat = handle.flat_param
        for info, shard, numel in zip(flat._param_infos, flat._shard_param_infos, flat._numels):
            if isinstance(info.module, bnb.nn.Linear4bit) and info.param_name == "weight":
                here += (shard.numel_in_shard or 0) * flat.element_size()
                everywhere += numel * flat.element_size()
    if everywhere:
        return here, everywhere
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = module.weight
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            here += local.numel() * local.element_size()
            everywhere += weight.numel() * weight.element_size()
    return here, everywhere


def what_runs(trainer: Trainer) -> dict:
    """Read from a wrapped trainer what is really in force. Every rank must call it.

    Args:
        trainer: after `train()` has wrapped the model, for example in `on_train_begin`.

    Returns:
        A dictionary that JSON can hold: `distributed_type`, `fsdp_version` (None without FSDP), `world_size`,
        `quant_type`, `quant_storage`, `nf4_bytes_per_rank` (a list), `nf4_bytes_total`, `mixed_precision`,
        `frozen_dtypes`, `trainable_dtypes`, `activation_checkpointing`, `use_reentrant`, `not_tested_together` (a
        sentence about versions, or None).
    """
    accelerator, model = trainer.accelerator, trainer.model_wrapped
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    quantisation = trainer.model.config.quantization_config
    here, everywhere = nf4_bytes(model)
    per_rank = [None] * accelerator.num_processes
    if accelerator.num_processes > 1:
        torch.distributed.all_gather_object(per_rank, here)
    else:
        per_rank = [here]
    layers = [m for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    functions = [layer._gradient_checkpointing_func for layer in layers if layer.gradient_checkpointing]
    return {
        "distributed_type": accelerator.distributed_type.value,
        "fsdp_version": plugin.fsdp_version if plugin else None,
        "world_size": accelerator.num_processes,
        "device": accelerator.device.type,
        "quant_type": quantisation.bnb_4bit_quant_type,
        "quant_storage": str(quantisation.bnb_4bit_quant_storage).removeprefix("torch."),
        "nf4_bytes_per_rank": per_rank,
        "nf4_bytes_total": everywhere,
        "mixed_precision": accelerator.mixed_precision,
        "frozen_dtypes": _dtypes(model, trainable=False),
        "trainable_dtypes": _dtypes(model, trainable=True),
        "activation_checkpointing": bool(functions),
        "use_reentrant": functions[0].keywords.get("use_reentrant") if functions else None,
        "not_tested_together": not_tested_together(),
    }


def refuse_surprises(facts: dict, trainer: Trainer) -> None:
    """Compare what runs with what was asked for.

    Args:
        facts: from `what_runs`.
        trainer: the same trainer; its arguments and the launcher's environment say what was asked for.

    Raises:
        NotAsPromised: with one sentence for each difference.
    """
    asked, wrong = trainer.args, []
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if facts["world_size"] != launched:
        wrong.append(
            f"{launched} processes were launched, but this one sees a world of {facts['world_size']}."
        )
    wants_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" or launched > 1
    if wants_fsdp and facts["distributed_type"] != "FSDP":
        wrong.append(
            f"FSDP was asked for, but the run is {facts['distributed_type']}: every rank would hold the whole model. "
            "Launch with one of configs/accelerate/, and on a machine without GPUs through nbutils.launching.rehearsal."
        )
    with_fsdp = facts["distributed_type"] == "FSDP"
    if with_fsdp and (sharing := _ranks_that_share(trainer, facts["world_size"])):
        share = facts["nf4_bytes_total"] / sharing
        uneven = [b for b in facts["nf4_bytes_per_rank"] if abs(b - share) > 0.05 * share]
        if uneven or share == 0:
            wrong.append(
                f"The ranks hold {facts['nf4_bytes_per_rank']} bytes of 4-bit weights; wanted about {share:.0f} each."
            )
    if facts["mixed_precision"] != "no":
        wrong.append(
            f"Mixed precision is {facts['mixed_precision']}, wanted 'no': the weights are bf16 already. "
            "Leave bf16 and fp16 off in the training arguments."
        )
    if facts["frozen_dtypes"] != ["bfloat16"]:
        wrong.append(
            f"Frozen parameters are {facts['frozen_dtypes']}, wanted bfloat16 alone: was something cast?"
        )
    if facts["activation_checkpointing"] != bool(asked.activation_checkpointing):
        wrong.append(
            f"Activation checkpointing is {facts['activation_checkpointing']}, "
            f"asked for {asked.activation_checkpointing}."
        )
    wanted = (asked.activation_checkpointing_kwargs or {}).get("use_reentrant")
    if facts["activation_checkpointing"] and wanted is not None and facts["use_reentrant"] != wanted:
        wrong.append(f"The checkpoints run with use_reentrant={facts['use_reentrant']}, asked for {wanted}.")
    if wrong:
        raise NotAsPromised(" ".join(wrong))


class CheckWhatRuns(TrainerCallback):
    """Print what really runs when training begins, and stop at once if it is not what was asked for.

    Args:
        trainer: the trainer this callback is added to. After the start, `facts` holds what `what_runs` returned.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.facts: dict = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.facts = what_runs(self.trainer)
        plugin = getattr(self.trainer.accelerator.state, "fsdp_plugin", None)  # one process has no such name
        if plugin and plugin.fsdp_version == 1 and is_hybrid(plugin.sharding_strategy.name):
            give_its_groups_the_timeout(self.trainer.model_wrapped, args.ddp_timeout_delta)
        if state.is_world_process_zero:
            print(describe(self.facts), flush=True)
        refuse_surprises(self.facts, self.trainer)
        check_first_gather(self.trainer.model_wrapped)


def describe(facts: dict) -> str:
    """One line for a reader: what runs, on how many processes, with how many bytes each.

    Args:
        facts: from `what_runs`.

    Returns:
        A line of text.
    """
    kind = f"FSDP {facts['fsdp_version']}" if facts["fsdp_version"] else facts["distributed_type"]
    shares = " + ".join(f"{b:,}" for b in facts["nf4_bytes_per_rank"])
    return (
        f"{kind} on {facts['world_size']} {facts['device']} process(es); {facts['quant_type']} weights stored as "
        f"{facts['quant_storage']}: {shares} of {facts['nf4_bytes_total']:,} bytes; trains "
        f"{'/'.join(facts['trainable_dtypes'])}; mixed precision {facts['mixed_precision']}"
    )


def _flat_handles(model: torch.nn.Module) -> list:
    units = [m for m in model.modules() if isinstance(m, FSDP)]
    return [unit._handle for unit in units if unit._handle is not None]


def _dtypes(model: torch.nn.Module, trainable: bool) -> list[str]:
    found = {p.dtype for p in model.parameters() if p.requires_grad == trainable and p.numel()}
    return sorted(str(dtype).removeprefix("torch.") for dtype in found)


def _ranks_that_share(trainer: Trainer, world_size: int) -> int:
    """Among how many ranks the model is to be divided; 0 if it is not."""
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version == 2:
        return world_size
    strategy = plugin.sharding_strategy.name
    if is_hybrid(strategy):
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return world_size if strategy in ("FULL_SHARD", "SHARD_GRAD_OP") else 0
