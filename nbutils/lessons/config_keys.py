"""The measurement of lessons 01 and 01b: every variant of the config on two ranks, beside what GPUs recorded."""

import json
import os
from pathlib import Path
from unittest.mock import patch

from nbutils.common.devices import gpus_shown
from nbutils.launching.launch import choose_config, launch

SCRIPT = "benchmarks/measure_config_keys.py"


def measure(run_dir: Path, num_processes: int = 2) -> dict:
    """Launch the measurement: with two GPUs or more on them, else rehearsed on CPU processes.

    Args:
        run_dir: the report and the log are written below it.
        num_processes: ranks; one alone has nothing to share, so two are taken at least.

    Returns:
        What all ranks saw (`ranks[0]["variants"][name]` is one variant as rank 0 saw it).

    Raises:
        RuntimeError: the launch failed.
    """
    out, log = run_dir / "01_config_keys.json", run_dir / "logs" / "01_config_keys.log"
    rehearse = gpus_shown() < 2
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if rehearse else {}  # a launch that rehearses is shown no GPU
    how = {"log": log, "num_processes": max(2, num_processes), "rehearsal": rehearse}
    with patch.dict(os.environ, hidden):
        launch(SCRIPT, ["--out", out], choose_config(1, rehearse), **how)
    return json.loads(out.read_text(encoding="utf-8"))


def seen(report: dict | None, name: str) -> dict | None:
    """One variant as rank 0 saw it, or None if it was not recorded or ended in an error.

    Args:
        report: of `measure`, or recorded.
        name: of the variant.
    """
    variant = report and report["ranks"][0]["variants"].get(name)
    return None if not variant or "error" in variant else variant


def kib(size: float) -> str:
    """Bytes as whole KiB."""
    return f"{size / 1024:.0f}"


def step_row(report: dict, name: str) -> list:
    """GPUs, name of the variant, its units, milliseconds a step, MiB that a step adds at its peak.

    Args:
        report: recorded on GPUs.
        name: of a variant that it holds.
    """
    v = seen(report, name)
    adds = (v["gpu_peak_in_step"] - v["gpu_allocated_between_steps"]) / 2**20
    return [report["world_size"], name, len(v["units"]), f"{v['step_ms']:.0f}", f"{adds:.0f}"]
