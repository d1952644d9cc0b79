"""A training run writes its progress to a file of JSON lines; a notebook or a terminal follows the file."""

import json
import time
from pathlib import Path

from transformers import TrainerCallback

from nbutils.common.progress_file import PROGRESS_FILE


class ProgressLog(TrainerCallback):
    """Append one JSON line for each step and each log entry of the Trainer, from rank 0 only.

    A line holds `step`, `max_steps`, `seconds` since training began, and, when the Trainer logs, its figures
    (`loss`, `eval_loss`, `learning_rate`, ...).

    Args:
        folder: where to write `progress.jsonl`; made if missing.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / PROGRESS_FILE
        self.started = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.monotonic()
        self._write(state, {})

    def on_step_end(self, args, state, control, **kwargs):
        self._write(state, {})

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._write(
            state, {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        )

    def _write(self, state, figures: dict) -> None:
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        seconds = round(time.monotonic() - self.started, 3) if self.started else 0.0
        line = {**figures, "step": state.global_step, "max_steps": state.max_steps, "seconds": seconds}
        with self.path.open("a") as out:
            out.write(json.dumps(line) + "\n")
