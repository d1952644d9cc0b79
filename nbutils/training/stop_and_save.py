"""SIGTERM to a rank that trains: finish the step, save a checkpoint, and end with a status that says "resume me".

Slurm sends it before a job's time is up (`#SBATCH --signal=TERM@300`), a cloud before it takes a machine back, and
`nbutils.launching.launch` when `time_limit` is over. The ranks get it at different moments, or only one gets it. All
must stop behind the same step, for a checkpoint has a part of each: so they ask each other after every step.
"""

import signal

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from nbutils.common.exit_status import RESUME_ME, end_to_be_resumed
from nbutils.common.ranks import rank


class StopEvaluation(Exception):
    """Raised on every rank between two batches of an evaluation: it may take longer than the time that is left."""


class StopAndSave(TrainerCallback):
    """From the first step to the last, a SIGTERM to any rank ends training on all of them, with a checkpoint.

    Before, while the model is loaded, and after, while the adapter is saved, SIGTERM ends a process as it always does.
    An evaluation that is under way is given up; the resumed run goes on with the next step.
    """

    def __init__(self):
        self.asked = False  # this rank
        self.stopped_at: int | None = None  # the step behind which all ranks have stopped
        self._before = None
        self._training = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._before = signal.signal(signal.SIGTERM, self._hear)
        self._training = True

    def on_step_end(self, args, state, control, **kwargs):
        if self._anyone_was_asked(args.device):
            self.stopped_at = state.global_step
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False

    def on_prediction_step(self, args, state, control, **kwargs):
        if self._training and self._anyone_was_asked(args.device):
            self.stopped_at = state.global_step
            raise StopEvaluation

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False
        signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def exit_if_stopped(self) -> None:
        """End this process with status 75 if training was stopped. Every rank must call it, after `train()`.

        Raises:
            SystemExit: with the status that says that a checkpoint was saved, to go on from.
        """
        if self.stopped_at is None:
            return
        if rank() == 0:
            print(
                f"Asked to stop: checkpoint-{self.stopped_at} is saved, and no adapter yet. Start the run again as it "
                f"was started, and it goes on from there (exit status {RESUME_ME}).",
                flush=True,
            )
        if dist.is_initialized():
            dist.barrier()  # a launcher ends the other ranks when the first one has gone
        end_to_be_resumed()

    def _hear(self, *_) -> None:
        self.asked = True

    def _anyone_was_asked(self, device: torch.device) -> bool:
        if not dist.is_initialized():
            return self.asked
        asked = torch.tensor(int(self.asked), device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())
