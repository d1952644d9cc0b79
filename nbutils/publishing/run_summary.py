"""What is needed to repeat a run of the series, and what came out of it."""

import json
from pathlib import Path
from typing import Protocol

import nbformat
import yaml

from nbutils.common.provenance import commit, versions
from nbutils.common.versions import STACK, TOOLS

TRAINING_NOTEBOOK = "04_write_and_launch"
TRAINING = [
    *("distributed_type", "fsdp_version", "world_size", "quant_type", "quant_storage", "nf4_bytes_per_rank"),
    *("nf4_bytes_total", "loss_first", "loss_last", "held_out_loss_before", "held_out_loss_after"),
]
ADAPTER = ["path", "tensors", "sha256", "verified"]


class Executed(Protocol):
    """One notebook of the run."""

    name: str
    status: str
    seconds: float


def record_provenance(run_dir: Path, values: dict) -> None:
    """Write `params.yaml` and `versions.json`: what is needed to repeat the run."""
    (run_dir / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False) if values else "{}\n")
    record = {"commit": commit(), "versions": versions((*STACK, *TOOLS))}
    (run_dir / "versions.json").write_text(json.dumps(record, indent=2) + "\n")


def summarise(entries: list[Executed], run_dir: Path) -> dict:
    """Collect the summary from what lies in the run folder, not from what the notebooks were meant to do."""
    notebooks = []
    for entry in entries:
        counts = count_cells(run_dir / f"{entry.name}.ipynb") if entry.status != "not run" else (0, 0)
        notebooks.append(
            {
                "name": entry.name,
                "status": entry.status,
                "seconds": entry.seconds,
                "code_cells": counts[0],
                "executed_cells": counts[1],
            }
        )
    record = run_dir / "train" / "run.json"
    told = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    training, adapter = told.get("training", {}), told.get("adapter", {})
    return {
        "notebooks": notebooks,
        "training": {name: training.get(name) for name in TRAINING},
        "adapter": {name: adapter.get(name) for name in ADAPTER},
        "versions": versions((*STACK, *TOOLS)),
        "commit": commit(),
    }


def count_cells(notebook: Path) -> tuple[int, int]:
    """The code cells of an executed notebook, blank ones aside, and how many of them have an execution count."""
    if not notebook.exists():
        return 0, 0
    cells = nbformat.read(notebook, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]
    return len(code), sum(cell.execution_count is not None for cell in code)


def what_is_missing(summary: dict) -> list[str]:
    """What a run promised and did not bring: one sentence each, none if all is well."""
    missing = []
    for notebook in summary["notebooks"]:
        if notebook["status"] != "ok" or notebook["executed_cells"] != notebook["code_cells"]:
            missing.append(
                f"{notebook['name']}: {notebook['status']}, {notebook['executed_cells']} of "
                f"{notebook['code_cells']} code cells executed."
            )
    if any(notebook["name"] == TRAINING_NOTEBOOK for notebook in summary["notebooks"]):
        for part in ("training", "adapter"):
            unsaid = [name for name, value in summary[part].items() if value is None]
            if unsaid:
                missing.append(f"train/run.json says nothing about {part}: {', '.join(unsaid)}.")
        if summary["adapter"]["verified"] is not True:
            missing.append("The adapter was not verified.")
    return missing


def readable(summary: dict, run_dir: Path) -> str:
    """The summary as lines for a terminal."""
    lines = ["", f"{'notebook':<28} {'status':<8} {'cells':>7} {'seconds':>8}"]
    for row in summary["notebooks"]:
        cells = f"{row['executed_cells']}/{row['code_cells']}"
        lines.append(f"{row['name']:<28} {row['status']:<8} {cells:>7} {row['seconds']:>8.1f}")
    training, adapter = summary["training"], summary["adapter"]
    if training["distributed_type"] is not None:
        held = ", ".join(f"{count:,}" for count in training["nf4_bytes_per_rank"] or [])
        lines += [
            "",
            f"trained with   {training['distributed_type']} {training['fsdp_version']} on {training['world_size']} "
            f"processes, {training['quant_type']} stored as {training['quant_storage']}",
            f"4-bit bytes    {held} on the ranks, of {training['nf4_bytes_total']:,}",
            f"training loss  {_number(training['loss_first'])} -> {_number(training['loss_last'])}",
            f"held-out loss  {_number(training['held_out_loss_before'])} -> {_number(training['held_out_loss_after'])}",
        ]
    if adapter["path"] is not None:
        lines.append(
            f"adapter        {adapter['path']}: {adapter['tensors']} tensors, "
            f"{'verified' if adapter['verified'] else 'NOT verified'}"
        )
    return "\n".join([*lines, "", f"Everything is in {run_dir}/: open the executed notebooks there."])


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"
