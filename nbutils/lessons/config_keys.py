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


def step_rows(reports: list[dict], settings: dict[str, str]) -> list[list]:
    """Setting, units, milliseconds a step in each report, and the MiB that a step adds at its peak in the first.

    Args:
        reports: recorded on GPUs, the first of which holds every setting.
        settings: variants of the measurement, and what to call them.
    """
    rows = []
    for name, called in settings.items():
        found = [step_row(report, name) for report in reports if seen(report, name)]
        if len(found) == len(reports) > 0:
            rows.append([called, found[0][2], *(row[3] for row in found), found[0][4]])
    return rows


def loaded_share(report: dict | None, model: str) -> str:
    """How much of the model rank 1 loaded itself: the share of its bytes that rank 0 has as well.

    Args:
        report: of `measure`, or recorded.
        model: and key, as the measurement names them: "NF4, key on".
    """
    v = report["ranks"][1]["cpu_ram_efficient_loading"][model] if report else {"error": "not recorded"}
    if "error" in v:
        return v["error"][:40]
    return f"{v['bytes_equal_to_rank0'] / v['bytes']:.0%}" if v["bytes"] else "0%"


def saved_rows(report: dict, on_gpus: dict | None) -> list[list]:
    """What a checkpoint takes: FSDP, type, where it was measured, KiB of the adapter alone and of the whole, files.

    Args:
        report: of `measure`.
        on_gpus: recorded; its rows stand for what cannot be tried on this machine.
    """
    here = report["ranks"][0]["state_dict_type"]
    there = on_gpus["ranks"][0]["state_dict_type"] if on_gpus else {}
    rows = []
    for name in sorted(here.keys() | there.keys()):
        source, v = ("measured", here[name]) if name in here else ("recorded", there[name])
        adapter, whole = v["adapter only"], v["whole model"]
        version, kind = name.removeprefix("fsdp").split(" ", 1)
        rows.append([version, kind, source, _together(adapter), _together(whole), _names(whole)])
    return rows


def _together(files: dict) -> str:
    return "fails" if "error" in files else kib(sum(files.values()))


def _names(files: dict) -> str:
    return ", ".join(sorted(Path(file).name for file in files if file != "error"))
