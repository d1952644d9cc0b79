"""Read the progress file of a training run, from a process that imports nothing heavy; `progress` writes it."""

import json
from pathlib import Path

PROGRESS_FILE = "progress.jsonl"


def read_progress(folder: str | Path) -> list[dict]:
    """The lines written so far, oldest first; a last line that is still being written is left out.

    Args:
        folder: the output folder of the run.

    Returns:
        A list of dictionaries, empty if the run has not begun to train.
    """
    path = Path(folder) / PROGRESS_FILE
    if not path.exists():
        return []
    return [
        json.loads(line)
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
        if line.endswith("\n")
    ]
