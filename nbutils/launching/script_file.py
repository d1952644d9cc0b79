"""The training script stands once, as the `%%writefile` cell of notebook 04; here it is taken out."""

import json
from pathlib import Path

from nbutils.common.paths import ROOT

NOTEBOOK = ROOT / "notebooks" / "04_write_and_launch.ipynb"
SCRIPT = "fine_tuning_FSDP_QLoRA.py"


def script_text(notebook: Path = NOTEBOOK) -> str:
    """The text of the script, exactly as the cell writes it.

    Args:
        notebook: the notebook that holds the cell.

    Returns:
        The cell without its first line.

    Raises:
        ValueError: the notebook has no `%%writefile` cell, or several.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))[
        "cells"
    ]  # a notebook is JSON; a cell's source is a list of lines
    sources = ["".join(cell["source"]) for cell in cells]
    found = [source for source in sources if source.startswith("%%writefile")]
    if len(found) != 1:
        raise ValueError(
            f"{notebook.name} has {len(found)} cells that begin with %%writefile; it must have exactly one, "
            f"the one that writes {SCRIPT}."
        )
    _, _, body = found[0].partition("\n")
    return body if body.endswith("\n") else body + "\n"


def write_script(folder: str | Path, notebook: Path = NOTEBOOK) -> Path:
    """Write the training script into a folder, as the cell of notebook 04 does.

    Args:
        folder: made if missing.
        notebook: the notebook that holds the cell.

    Returns:
        The path of the script.

    Raises:
        ValueError: the notebook has no `%%writefile` cell, or several.
    """
    path = Path(folder) / SCRIPT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script_text(notebook), encoding="utf-8")
    return path


def is_recipe(script: str | Path) -> bool:
    """Is it the course's script, as written or edited? By the check before loading, which it calls.

    A script that puts the checks out of action, as a benchmark does, is another one.
    """
    path = Path(script)
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    return "refuse_before_loading(" in text and "refuse_surprises =" not in text
