"""Short runs of the real script on forked ranks, for every test that wants several of them at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

from nbutils.common.paths import ROOT
from nbutils.launching.script_file import write_script
from nbutils.models.tiny import tiny_base

STEPS = 8  # two passes over the data, so that a resume must also find the order of the second


def arguments(folder: Path, out: str, **more) -> list[str]:
    """What the training script is told: few rows, dropout, a log line that spans a checkpoint."""
    settings = {
        "model": tiny_base(), "dataset": folder / "train.jsonl", "heldout_dataset": folder / "heldout.jsonl",
        "output_dir": folder / out, "max_steps": STEPS, "max_length": 64, "max_cut_share": 1,
        "per_device_train_batch_size": 2, "learning_rate": 2e-3, "warmup_steps": 2, "lora_r": 4, "lora_dropout": 0.1,
        "logging_steps": 3, "save_steps": 2, "eval_strategy": "no", "disable_tqdm": "true", "seed": 0,
    } | more  # fmt: skip
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def train(folder: Path, runs: list[dict]) -> dict[str, dict]:
    """Run the script on ranks once for each of `runs` (see tests/ranks/training.py); what came of each, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = (ROOT / "data/instructions/train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(rows[:16]))
    (folder / "heldout.jsonl").write_text("".join(rows[20:24]))
    plan = {"folder": str(folder), "script": str(write_script(folder)), "runs": runs}
    (folder / "plan.json").write_text(json.dumps(plan))
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(ROOT / "tests/ranks/training.py"), str(folder / "plan.json")]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60 + 60 * len(runs)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {run["name"]: json.loads((folder / f"{run['name']}.json").read_text()) for run in runs}


def run(
    folder: Path, name: str, out: str, fsdp: int = 1, world: int = 2, kill: dict | None = None, **more
) -> dict:
    return {
        "name": name,
        "out": out,
        "fsdp": fsdp,
        "world": world,
        "kill": kill,
        "args": arguments(folder, out, **more),
    }
