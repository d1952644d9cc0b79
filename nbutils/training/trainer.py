"""A trainer whose checkpoints hold everything, and that goes on from one as if nothing had happened.

The Trainer's own checkpoints ask FSDP for a state dict and PEFT for the adapter in it; with FSDP 1 that comes out
empty. Here each rank writes what it holds (see `nbutils.adapters.checkpoint_folder`) and puts it
back into the same memory.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from trl import SFTTrainer

from nbutils.adapters.checkpoint_folder import (
    CheckpointError,
    checkpoints_in,
    delete_old,
    newest_complete,
    put_pieces_back,
    rank_file,
    read_manifest,
    read_rank,
    save_pieces,
    write_checkpoint,
)
from nbutils.adapters.pieces import SaveError, peft_model
from nbutils.adapters.save import config_for_file
from nbutils.common.ranks import in_step, on_every_rank, rank
from nbutils.training.nan_guard import stop_at_no_number

OPTIMIZER = "optimizer."  # what stands before the name of an optimizer's tensor in a rank's file


class ResumableTrainer(SFTTrainer):
    """TRL's `SFTTrainer` with checkpoints from which a resumed run gives the losses of the uninterrupted one.

    A resumed run must have the number of processes, the FSDP version, the adapter's settings and the data order of the
    run that wrote the checkpoint. Anything else is refused: each rank puts its own pieces back, and nothing is sharded
    anew. `nbutils.adapters.export.export_adapter` takes the adapter out of a checkpoint on any machine.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        refuse_what_checkpoints_do_not_serve(self.args)
        self._evaluated: tuple[int, float] | None = None  # step and held-out loss of the last evaluation here

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        if "eval_loss" in metrics:  # not so under another `metric_key_prefix`
            self._evaluated = self.state.global_step, metrics["eval_loss"]
        return metrics

    def held_out_loss(self) -> float:
        """The held-out loss of the model as it is now, in nats a token. Every rank must call it.

        The Trainer evaluates after the last step by itself, if `eval_strategy` is steps: that is not done twice.

        Raises:
            ValueError: the evaluation gave no loss: no held-out row was left, or none keeps a token to learn from.
        """
        if not self._evaluated_now():
            self.evaluate()
        if not self._evaluated_now():
            raise ValueError(
                f"The evaluation of {len(self.eval_dataset)} held-out rows gave no loss; wanted at least one row that "
                "keeps a token of its answer within max_length. Raise max_length, or name another held-out set."
            )
        return self._evaluated[1]

    def _evaluated_now(self) -> bool:
        return self._evaluated is not None and self._evaluated[0] == self.state.global_step

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        stop_at_no_number(loss, self.state.global_step + 1, self.args.learning_rate)
        return loss

    def checkpoint_to_resume(self, resume: bool) -> str | None:
        """Choose what `train(resume_from_checkpoint=...)` begins with. Every rank must call it.

        Args:
            resume: go on from the newest complete checkpoint in `output_dir`.

        Returns:
            The checkpoint's folder, or None to begin at step 0.

        Raises:
            CheckpointError: nothing to resume from is complete; it belongs to a run of another kind; or `resume` is
                False and the folder holds checkpoints, which a new run would mix with its own.
        """
        folder = _choose(self.args.output_dir, resume, run_facts(self), say=print)
        # A resumed run has its held-out loss of the beginning already.
        self.args.eval_on_start = self.args.eval_on_start and folder is None
        return folder

    def _save_checkpoint(self, model, trial):
        self.store_flos()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        write_checkpoint(folder, self._write_own_files, run_facts(self))
        on_every_rank(
            lambda: rank() == 0 and delete_old(folder.parent, self.args.save_total_limit), SaveError
        )

    def _write_own_files(self, folder: Path) -> None:
        tensors, notes = optimizer_pieces(self.optimizer)
        # What has gathered since the last line of the log: without it the next line would miss these steps.
        tensors["loss_since_log"] = self._tr_loss
        notes["last_logged"] = self._globalstep_last_logged
        notes["metrics"], notes["tokens"] = self._metrics["train"], self._total_train_tokens
        save_pieces(folder / rank_file(rank()), self.model_wrapped, tensors, notes)
        self._save_rng_state(str(folder))
        if rank() == 0:
            config_for_file(self.model_wrapped).save_pretrained(str(folder))
            self.state.save_to_json(str(folder / "trainer_state.json"))
            torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
            self._save_scaler(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        tensors, where, _ = read_rank(resume_from_checkpoint, rank())
        on_every_rank(lambda: put_pieces_back(model or self.model, tensors, where), CheckpointError)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            return
        tensors, _, notes = read_rank(checkpoint, rank())
        on_every_rank(lambda: put_optimizer_back(self.optimizer, tensors, notes), CheckpointError)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _load_rng_state(self, checkpoint):
        # The Trainer calls this when the next batch is the first new one, after it has set its loss to zero.
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            tensors, _, notes = read_rank(checkpoint, rank())
            self._tr_loss = tensors["loss_since_log"].to(self._tr_loss.device)
            self._globalstep_last_logged = notes["last_logged"]
            self._metrics["train"].update(notes["metrics"])
            self._total_train_tokens = notes["tokens"]


def refuse_what_checkpoints_do_not_serve(args) -> None:
    """Refuse settings of the Trainer that want checkpoints of another kind.

    Raises:
        ValueError: naming them.
    """
    names = ("load_best_model_at_end", "save_only_model", "push_to_hub")
    if found := [name for name in names if getattr(args, name)]:
        raise ValueError(
            f"Found {', '.join(found)}; these checkpoints are made to resume from and do not serve that. Leave it "
            "off, and export the adapter of any checkpoint afterwards."
        )


def refuse_what_cannot_be_resumed(output_dir: str | Path, resume: bool) -> None:
    """Refuse before a large model is loaded what `checkpoint_to_resume` would refuse after it, as far as one can see.

    Every rank must call it, with the process group there (`PartialState()` makes it).

    Args:
        output_dir: the folder of the run.
        resume: as for `checkpoint_to_resume`.

    Raises:
        CheckpointError: as `checkpoint_to_resume`; of the run's settings the number of processes and the FSDP version.
    """
    with_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    launched = {
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        "fsdp_version": int(os.environ.get("FSDP_VERSION", "1")) if with_fsdp else None,
    }
    _choose(output_dir, resume, launched, say=lambda *words, **_: None)


def _choose(output_dir: str | Path, resume: bool, facts: dict, say: Callable) -> str | None:
    """Rank 0 looks for a checkpoint that fits these facts, and every rank gets its name or its error."""
    output, chosen = Path(output_dir), []

    def choose():
        if not resume and (old := checkpoints_in(output)):
            raise CheckpointError(
                f"{output} holds {old[-1].name} of an earlier run. Go on from it with --resume true, or name "
                "another output_dir: a new run would mix its checkpoints with those."
            )
        folder = newest_complete(output, say) if resume else None
        if folder is not None:
            refuse_another_run(read_manifest(folder)["facts"], facts, folder)
            say(f"Resuming from {folder}.", flush=True)
        elif resume:
            say(f"{output} holds no checkpoint; beginning at step 0.", flush=True)
        chosen.append(folder and str(folder))

    on_every_rank(lambda: rank() == 0 and choose(), CheckpointError)
    return in_step(chosen[0] if chosen else None)


def run_facts(trainer: ResumableTrainer) -> dict:
    """What a resumed run must share with the run that wrote the checkpoint, as JSON can hold it."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    config = peft_model(trainer.model).peft_config["default"]
    return {
        "world_size": trainer.accelerator.num_processes,
        "fsdp_version": plugin.fsdp_version if plugin else None,
        "seed": trainer.args.seed,
        "data_seed": trainer.args.data_seed,
        "per_device_train_batch_size": trainer.args.per_device_train_batch_size,
        "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
        "training_rows": len(trainer.train_dataset),
        "optim": str(trainer.args.optim.value),
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }


def refuse_another_run(written: dict, now: dict, folder: Path) -> None:
    """Compare the facts of the run that wrote a checkpoint with those of this run.

    Raises:
        CheckpointError: naming each fact that differs.
    """
    different = [
        f"{name} was {written.get(name)} and is {now[name]}" for name in now if written.get(name) != now[name]
    ]
    if different:
        raise CheckpointError(
            f"{folder} cannot be resumed from: {'; '.join(different)}. Each rank puts back exactly what it wrote, so "
            "launch as the run was launched, with its settings. The adapter alone can be had on any machine: "
            f"python -m nbutils export {folder} FOLDER"
        )


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
    """Give the optimizer back what `optimizer_pieces` took.

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
        group.update(
            {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        )  # JSON has no tuples
    for label, value in {**tensors, **notes["numbers"]}.items():
        if not label.startswith(OPTIMIZER):
            continue
        parameter, name = _named(parameters, label)
        if isinstance(value, torch.Tensor):
            value = _as_it_was(value, parameter, label in notes["on_cpu"])
        optimizer.state[parameter][name] = value


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
