"""One notebook, executed to its end in the environment that this runs in, and compared with its committed outputs.

Run as: python -m nbutils.publishing.newest_lesson notebooks/03_custom_prep.ipynb REPORT.json RUN_DIR
`nbutils.publishing.newest` starts it with the Python of another virtual environment.
"""

import json
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nbformat

from nbutils.common.paths import ROOT
from nbutils.common.versions import locked_versions
from nbutils.publishing.parameters import read_contract
from nbutils.publishing.refresh import compare, with_outputs
from nbutils.publishing.workshop_proof import run_through

BUILD = re.compile(r"(?<=\d)\+(?:cpu|cu\d+)\b")  # as of torch 2.13.0+cpu


def look_at(path: Path, run_dir: str) -> dict:
    """Execute a notebook, whatever fails in it, and say what it says differently.

    Args:
        path: of the notebook as committed.
        run_dir: the parameter `run_dir` of the notebook: one folder for the whole series, as 05 reads what 04 made.

    Returns:
        `errors`: one `{cell, name, said}` for each cell that raised; `differences`: sentences; `not_reached`: the
        number of code cells that have no execution count.
    """
    committed = nbformat.read(path, as_version=4)
    given = {"run_dir": run_dir} if "run_dir" in read_contract(path) else {}
    executed = run_through(path, ROOT, given)
    after = with_outputs(committed, executed, Path(run_dir))
    errors = [
        {"cell": number, "name": output.ename, "said": str(output.evalue)}
        for number, cell in enumerate(after.cells, 1)
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    ]
    counted = [cell for cell in executed.cells if cell.cell_type == "code" and cell.source.strip()]
    return {
        "errors": errors,
        "differences": compare(_without(_plain(committed), errors), _without(_plain(after), errors)),
        "not_reached": sum(cell.execution_count is None for cell in counted),
    }


def _without(notebook: nbformat.NotebookNode, errors: list[dict]) -> nbformat.NotebookNode:
    """Cells that raised are reported as errors, so their outputs are not compared."""
    for error in errors:
        notebook.cells[error["cell"] - 1]["outputs"] = []
    return notebook


def _plain(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The outputs with each installed version written as the lock's, without its build, and files written once.

    A version string is no drift; and a lesson that is looked at again finds the files of the look before.
    """
    text = BUILD.sub("", json.dumps(notebook)).replace("Overwriting ", "Writing ")
    for package, locked in locked_versions().items():
        try:
            installed = version(package).partition("+")[0]
        except PackageNotFoundError:
            continue
        if installed != locked and installed.count(".") > 1:
            text = text.replace(installed, locked)
    return nbformat.from_dict(json.loads(text))


if __name__ == "__main__":
    report = look_at(Path(sys.argv[1]), sys.argv[3])
    Path(sys.argv[2]).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
