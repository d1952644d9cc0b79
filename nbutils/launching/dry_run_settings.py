"""What a dry run is asked for, and the files that its training script is given."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml

from nbutils.launching.script_file import SCRIPT
from nbutils.planning.run_setup import LORA_RANK
from nbutils.planning.shapes import Shape

PREDICTION = "prediction.json"  # by it a dry run knows the folder of another one
REPLACED = ("train", "ranks", "model", "train.yaml", "train.jsonl", "heldout.jsonl", "train.log", SCRIPT)
# Settings of the script that decide about memory and speed, and what they are called here.
COUNTED = {
    "per_device_train_batch_size": "batch",
    "max_length": "length",
    "max_steps": "steps",
    "lora_r": "lora_r",
    "gradient_accumulation_steps": "accumulation",
}


@dataclass
class DryRun:
    """What is trained, and on what.

    Args:
        shape: of the model.
        config: for `accelerate launch`; None takes what fits this machine.
        batch: rows a rank and forward pass.
        length: tokens a row; every row has exactly so many, without padding. With `data`, where rows are cut.
        steps: optimizer steps, at least 3: the first two are left out of the speed.
        lora_r: rank of the adapter.
        accumulation: forward passes an optimizer step.
        cap_gib: cap of the GPU allocator in GiB; None means the whole card.
        world_size: ranks; None takes the config's.
        folder: where the random weights are kept between dry runs.
        run_dir: where this run writes: a new folder, or one of an earlier dry run, which is replaced.
        commit: of this repository, for the record; left out: as git says.
        extra: settings of the script, `name=value`. One that stands above, such as `max_length`, replaces it there, so
            that plan and speed count with it.
        changes: keys of the config, `key=value`, those of its `fsdp_config` too; the changed copy lies in `run_dir`.
        trace: also record what was in GPU memory at the peak, in `ranks/peak_rank0.json`; for few layers only.
        timeout: seconds.
        data: rows of your own: a file, or a hub id. They are read, split, cut, and packed or padded as in training; the
            speed is then that of their text, without padding.
        tokenizer: a folder with their tokenizer; needed with `data`.

    Raises:
        ValueError: a setting that is counted with is no whole number.
    """

    shape: Shape
    config: str | Path | None = None
    batch: int = 1
    length: int = 1024
    steps: int = 6
    lora_r: int = LORA_RANK
    accumulation: int = 1
    cap_gib: float | None = None
    world_size: int | None = None
    folder: str | Path | None = None
    run_dir: str | Path | None = None
    commit: str = ""
    extra: tuple[str, ...] | list[str] = ()
    changes: tuple[str, ...] | list[str] = ()
    trace: bool = False
    timeout: float = math.inf
    data: str | Path | None = None
    tokenizer: Path | None = None

    def __post_init__(self):
        for name, value in read_pairs(self.extra).items():
            if name in COUNTED:
                if not isinstance(value, int) or isinstance(value, bool):
                    raise ValueError(f"{name}={value!r}: a dry run counts with it; wanted a whole number.")
                setattr(self, COUNTED[name], value)

    def tokens_a_step(self, ranks: int) -> int:
        """Of an optimizer step, over all ranks."""
        return self.batch * self.length * self.accumulation * ranks


def read_pairs(pairs: list[str] | tuple[str, ...]) -> dict:
    """`name=value` each, the value as YAML reads it."""
    split = [pair.partition("=") for pair in pairs]
    return {name: yaml.safe_load(value) for name, _, value in split}


def claim(run_dir: Path) -> None:
    """Make the folder, or find that a dry run has written what is in it: anything else is somebody's work.

    Raises:
        FileExistsError: it holds what a dry run would replace and did not write.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    if not (run_dir / PREDICTION).is_file():
        for name in REPLACED:
            if (run_dir / name).exists():
                raise FileExistsError(
                    f"{run_dir} holds {name}, and no dry run has written it: a dry run would replace it. Name a new "
                    "folder with --run-dir, or leave it out."
                )
        (run_dir / PREDICTION).touch()  # from here on it is a dry run's, even if this one stops at once
    for name in ("train", "ranks", "model"):
        shutil.rmtree(run_dir / name, ignore_errors=True)


def write_settings(run: DryRun, run_dir: Path, weights: Path, ranks: int) -> dict:
    """Write the script's settings to `train.yaml`, and rows of exactly `length` tokens if there are none of one's own.

    Args:
        run: what is asked for.
        run_dir: where the files go, and where the script will write.
        weights: folder of the model.
        ranks: over all machines.

    Returns:
        The settings.
    """
    settings = {
        "model": str(weights),
        **(_own_rows(run, ranks) if run.data else _full_rows(run, run_dir, ranks)),
        "output_dir": str(run_dir / "train"),
        **{name: getattr(run, field) for name, field in COUNTED.items()},
        "lora_alpha": 2 * run.lora_r,
        "learning_rate": 1.0e-4,
        "logging_steps": 1,
        "eval_steps": 100000,
        "save_strategy": "no",
        "disable_tqdm": True,
        **read_pairs(run.extra),
    }
    (run_dir / "train.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return settings


def _full_rows(run: DryRun, run_dir: Path, ranks: int) -> dict:
    rows = max(8, run.steps * run.batch * run.accumulation * ranks)
    text = "a b c d e f g h " * (
        run.length // 8 + 2
    )  # at least one token a letter: the script cuts at `length`
    for name, letter, count in (("train.jsonl", "a", rows), ("heldout.jsonl", "A", ranks)):
        lines = [json.dumps({"text": f"{chr(ord(letter) + n % 26)} {text}"}) for n in range(count)]
        (run_dir / name).write_text("\n".join(lines) + "\n")
    return {
        "dataset": str(run_dir / "train.jsonl"),
        "heldout_dataset": str(run_dir / "heldout.jsonl"),
        "per_device_eval_batch_size": 1,
        "completion_only_loss": False,  # every token of a row counts
    }


def _own_rows(run: DryRun, ranks: int) -> dict:
    """One batch of held-out rows as large as those of training, so that its memory is seen as well."""
    return {
        "dataset": str(run.data),
        "heldout_dataset": None,
        "per_device_eval_batch_size": run.batch,
        "eval_rows": run.batch * ranks,
    }
