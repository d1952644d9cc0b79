"""What a whole run takes, said before it is launched: rows a step, steps, hours, and disk for what it keeps."""

import math
from dataclasses import dataclass
from pathlib import Path

from nbutils.common.disk import refuse_full_disk
from nbutils.planning.memory_items import BF16
from nbutils.planning.shapes import Shape

KEPT_NEED = "the checkpoints and the adapter need"
KEPT_ADVICE = "Set save_total_limit, save less often, or name an output_dir on a larger disk."


@dataclass(frozen=True)
class WholeRun:
    """A run from its first step to its last.

    Args:
        rows_a_step: the effective batch: rows, or packs, of all ranks in one optimizer step.
        tokens_a_step: of text in a step, on average; padding comes on top.
        steps_an_epoch: optimizer steps in one pass over the rows.
        steps: optimizer steps in all.
        epochs: passes over the rows.
        seconds: at the speed that was given; None if none was.
        checkpoints: how many lie on the disk at once, at most.
        disk_bytes: of them, and of the adapter with the one it replaces.
    """

    rows_a_step: int
    tokens_a_step: float
    steps_an_epoch: int
    steps: int
    epochs: float
    seconds: float | None
    checkpoints: int
    disk_bytes: int

    def refuse_small_disk(self, output_dir: str | Path) -> None:
        """Refuse the run if its checkpoints and its adapter would fill the disk.

        Raises:
            Refused: with what is needed and what is free, in GB.
        """
        refuse_full_disk(Path(output_dir), self.disk_bytes, KEPT_NEED, KEPT_ADVICE)

    def in_words(self, time_limit: float | None = None) -> str:
        """For a reader, a line each.

        Args:
            time_limit: seconds after which the launch saves and stops.
        """
        hours = "not known: a dry run on these rows tells the speed (python -m nbutils dryrun --data FILE)"
        if self.seconds is not None:
            hours = f"{self.seconds / 3600:.1f}"
            if time_limit and self.seconds > time_limit:
                stops = math.ceil(self.seconds / time_limit) - 1
                hours += f", so time_limit stops it {stops} time(s): it saves, and goes on when it is started again"
        small = self.disk_bytes < 1e8
        size = f"{self.disk_bytes / 1e6:,.1f} MB" if small else f"{self.disk_bytes / 1e9:,.2f} GB"
        lines = {
            "rows a step (effective batch)": f"{self.rows_a_step:,}",
            "tokens a step, about": f"{self.tokens_a_step:,.0f}",
            "steps an epoch": f"{self.steps_an_epoch:,}",
            "steps in all": f"{self.steps:,}, which are {self.epochs:.2f} epochs",
            "hours": hours,
            "checkpoints kept, at most": f"{self.checkpoints}",
            "disk for them and the adapter": size,
        }  # fmt: skip
        return "\n".join(f"{name:30} {value}" for name, value in lines.items())


def whole_run(
    settings: dict,
    rows: int,
    tokens: int,
    ranks: int,
    shape: Shape,
    tokens_per_second: float | None = None,
) -> WholeRun:
    """Work out what a run will do. Nothing is measured here.

    Args:
        settings: of the script, as in its YAML.
        rows: that the trainer takes one by one: rows, or packs with `packing`.
        tokens: in all of them, padding left out.
        ranks: over all machines.
        shape: of the model.
        tokens_per_second: over all ranks, from a dry run or a record.
    """
    passes = settings.get("gradient_accumulation_steps", 1)
    batches = -(-rows // (settings["per_device_train_batch_size"] * ranks))
    an_epoch = max(1, -(-batches // passes))
    steps = settings.get("max_steps", -1)
    steps = steps if steps > 0 else math.ceil(settings.get("num_train_epochs", 3) * an_epoch)
    a_step = tokens / an_epoch
    return WholeRun(
        rows_a_step=settings["per_device_train_batch_size"] * ranks * passes,
        tokens_a_step=a_step,
        steps_an_epoch=an_epoch,
        steps=steps,
        epochs=steps / an_epoch,
        seconds=steps * a_step / tokens_per_second if tokens_per_second else None,
        checkpoints=checkpoints_on_disk(settings, steps),
        disk_bytes=kept_bytes(settings, steps, shape),
    )


def kept_bytes(settings: dict, steps: int, shape: Shape) -> int:
    """What a run keeps on the disk, at most: its checkpoints, and the adapter with the one it replaces.

    A checkpoint holds the adapter and AdamW's two moments, in bf16 each.

    Args:
        settings: of the script, as in its YAML.
        steps: of the whole run; below 1 if they are not known yet.
        shape: of the model.
    """
    adapter = BF16 * shape.adapter_parameters(settings["lora_r"])
    return 3 * adapter * checkpoints_on_disk(settings, steps) + 2 * adapter


def checkpoints_on_disk(settings: dict, steps: int) -> int:
    """How many checkpoints lie on the disk at once, at most.

    Args:
        settings: of the script, as in its YAML.
        steps: of the whole run; below 1 if they are not known yet.
    """
    strategy, every = settings.get("save_strategy", "steps"), settings.get("save_steps", 500)
    if strategy == "no":
        return 1  # if it is asked to stop
    count = 2  # what any run that saves needs: the newest, and one that is being written
    if strategy == "steps" and steps > 0:
        every = math.ceil(every * steps) if every < 1 else every
        count = math.ceil(steps / every)  # the last step saves as well
    limit = settings.get("save_total_limit")
    return min(count, limit + 1) if limit else count  # the oldest goes when the newest is there
