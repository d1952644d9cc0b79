"""A trainer whose checkpoints hold everything, and that goes on from one as if nothing had happened.

The Trainer's own checkpoints ask FSDP for a state dict and PEFT for the adapter in it; with FSDP 1 that comes out
empty. Here each rank writes what it holds (see `nbutils.adapters.checkpoint_folder`) and puts it
back into the same memory.
"""

from functools import cached_property
from pathlib import Path

import torch

from nbutils.adapters.checkpoint_folder import (
    CheckpointError,
    delete_old,
    put_pieces_back,
    rank_file,
    read_rank,
    save_pieces,
    write_checkpoint,
)
from nbutils.adapters.pieces import SaveError
from nbutils.adapters.save import config_for_file
from nbutils.common.ranks import on_every_rank, rank
from nbutils.models.base_digest import base_digest
from nbutils.training.held_out_loss import TokenMeanTrainer
from nbutils.training.nan_guard import stop_at_no_number
from nbutils.training.optimizer_state import optimizer_pieces, put_optimizer_back, put_schedule_back
from nbutils.training.resume import choose_checkpoint, refuse_what_checkpoints_do_not_serve
from nbutils.training.run_facts import run_facts
from nbutils.training.stop_and_save import StopEvaluation


class ResumableTrainer(TokenMeanTrainer):
    """TRL's `SFTTrainer` with checkpoints from which a resumed run gives the losses of the uninterrupted one.

    A resumed run must share the facts of `nbutils.training.run_facts` with the run that wrote the checkpoint; anything
    else is refused: each rank puts its own pieces back, and nothing is sharded anew. Learning rate, schedule and the
    number of steps may change. `nbutils.adapters.export.export_adapter` takes the adapter out of a checkpoint on any
    machine.

    Args:
        base: folder or hub id of the base, whose digest goes into each checkpoint.
    """

    def __init__(self, *args, base: str | None = None, **kwargs):
        self._given = kwargs["train_dataset"], kwargs.get("eval_dataset")
        super().__init__(*args, **kwargs)
        refuse_what_checkpoints_do_not_serve(self.args)
        self._base = base
        self._evaluated: tuple[int, float] | None = None  # step and held-out loss of the last evaluation here

    @cached_property
    def facts(self) -> dict:
        """Of this run, for its checkpoints."""
        return run_facts(self, self._base and base_digest(self._base), *self._given)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        try:
            metrics = super().evaluate(*args, **kwargs)
        except StopEvaluation:  # asked to stop while it trains: save first
            self.control.should_save = self.control.should_training_stop = True
            self.control.should_evaluate = False  # or the Trainer would begin it again, and save again
            return {}
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
        # Now, and not at the first checkpoint: the base may lie on a hub that cannot be reached hours later.
        on_every_rank(lambda: rank() == 0 and self.facts, CheckpointError)
        folder = choose_checkpoint(self.args.output_dir, resume, lambda: self.facts, say=print)
        # A resumed run has its held-out loss of the beginning already.
        self.args.eval_on_start = self.args.eval_on_start and folder is None
        return folder

    def _save_checkpoint(self, model, trial):
        self.store_flos()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        write_checkpoint(folder, self._write_own_files, self.facts if rank() == 0 else {})
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
        schedule = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
        put_schedule_back(self.lr_scheduler, schedule, notes["groups"])
        # The Trainer takes from the checkpoint how often to log, to evaluate and to save.
        self.state.compute_steps(self.args, self.state.max_steps)
        if self.state.global_step > self.state.max_steps:
            raise CheckpointError(
                f"{checkpoint} has {self.state.global_step} steps behind it, and this run ends at "
                f"{self.state.max_steps}. Raise num_train_epochs or max_steps."
            )

    def _run_epoch(self, **kwargs):
        if (
            self.state.global_step >= self.state.max_steps
        ):  # resumed at its end: the Trainer would take one step more
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _load_rng_state(self, checkpoint):
        # The Trainer calls this when the next batch is the first new one, after it has set its loss to zero.
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            tensors, _, notes = read_rank(checkpoint, rank())
            self._tr_loss = tensors["loss_since_log"].to(self._tr_loss.device)
            self._globalstep_last_logged = notes["last_logged"]
            self._metrics["train"].update(notes["metrics"])
            self._total_train_tokens = notes["tokens"]
