"""Results recorded on other machines: read them, and say where they come from."""

import json
from pathlib import Path

FOLDER = Path("benchmarks/results")


def load(name: str) -> dict | None:
    """A recorded result.

    Args:
        name: the file in benchmarks/results, without `.json`.

    Returns:
        The report with its provenance, or None if it has not been recorded yet.
    """
    file = FOLDER / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def label(report: dict | None) -> str:
    """One line that says that a result was not measured here: machine, versions, date, commit.

    Args:
        report: what `load` returned.
    """
    if report is None:
        return "recorded: not recorded yet"
    gpus = report["machine"]["gpus"]
    machine = f"{len(gpus)} x {gpus[0]}" if gpus else report["machine"]["cpu"]
    versions = ", ".join(f"{name} {report['versions'][name]}" for name in ("torch", "accelerate", "peft"))
    return f"recorded on {machine}, {versions}, {report['date']}, commit {report['commit'] or 'unknown'}"
