"""The proof by running: the student edition, out of its archive, fails at its exercises and nowhere else."""

import os
import shutil
import zipfile
from pathlib import Path

import nbformat

from nbutils.common.paths import ROOT
from nbutils.publishing.runner import NOTEBOOKS, select
from nbutils.publishing.workshop import NAME, build, exercises

SHORT = {"max_steps": 12}  # the training of notebook 04; no exercise asks how well it learned
CELL_TIMEOUT = 900  # seconds


def prove(out: Path, scratch: Path, only: list[str] | None = None) -> list[str]:
    """Unpack the archive, run its notebooks in order, and compare the cells that fail with the exercises.

    Args:
        out: a folder that `build` has filled.
        scratch: folder for the unpacked archive; replaced.
        only: numbers of notebooks, as "01b"; None means all.

    Returns:
        One sentence for each cell that fails and should not, or should and does not; empty if all is well.

    Raises:
        BadParameters: a number that no notebook has.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    with zipfile.ZipFile(out / f"{NAME}.zip") as archive:
        archive.extractall(scratch)
    tree = scratch / NAME
    copy_tiny_bases(tree)
    wrong = []
    for path in (entry.source for entry in select(tree / NOTEBOOKS, only=only)):
        declared = exercises(nbformat.read(ROOT / NOTEBOOKS / path.name, as_version=4))
        failed = failing_cells(run_through(path, tree))
        wrong += [f"{path.name}: {sentence}" for sentence in compare(declared, failed)]
        print(f"{path.stem:<28} {len(declared)} exercises, {len(failed)} cells raise", flush=True)
    return wrong


def copy_tiny_bases(tree: Path) -> None:
    """Bring along the tiny base, which takes a minute to make; a cache may also hold an NF4 copy of 40 GB."""
    for done in (ROOT / "runs" / "cache").glob("tiny-*/tiny.json"):
        shutil.copytree(done.parent, tree / "runs" / "cache" / done.parent.name, dirs_exist_ok=True)


def run_through(path: Path, tree: Path, values: dict = SHORT) -> nbformat.NotebookNode:
    """Execute a notebook to its end, whatever fails, with the package that lies in `tree`.

    Args:
        path: of the notebook.
        tree: root of a copy of the repository; the executed notebook is kept in its `runs/`.
        values: parameters; one that the notebook does not know is left out.
    """
    from nbclient import NotebookClient
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    from nbutils.publishing.parameters import read_contract

    given = {name: value for name, value in values.items() if name in read_contract(path)}
    notebook = parameterize_notebook(load_notebook_node(str(path)), given)
    options = {"timeout": CELL_TIMEOUT, "kernel_name": "python3", "allow_errors": True}
    options["coalesce_streams"] = True  # as the runner does, whose outputs are the committed ones
    options["extra_arguments"] = ["--IPKernelApp.log_level=ERROR"]  # its warnings concern servers
    client = NotebookClient(notebook, resources={"metadata": {"path": str(tree)}}, **options)
    # What stood in front stays: `make newest` puts packages back that way.
    in_front = filter(None, [str(tree.resolve()), os.environ.get("PYTHONPATH")])
    client.execute(env={**os.environ, "PYTHONPATH": os.pathsep.join(in_front)})
    nbformat.write(notebook, tree / "runs" / path.name)  # kept, for whoever wants to know why
    return notebook


def failing_cells(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """The cells of an executed notebook that raised: id -> name of the error."""
    return {
        cell.id: output.ename
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    }


def compare(declared: list[str], failed: dict[str, str]) -> list[str]:
    """Sentences about each cell in which the declared exercises and the cells that raised differ."""
    wrong = [f"exercise {cell} raises nothing" for cell in declared if cell not in failed]
    for cell, error in failed.items():
        if cell not in declared:
            wrong.append(f"cell {cell} is no exercise and raises {error}")
        elif error != "NotImplementedError":
            wrong.append(f"exercise {cell} raises {error}, not NotImplementedError")
    return wrong


def main(out: Path, run: bool, only: list[str] | None = None) -> int:
    """Build the editions, and with `run` prove the student edition, or `only` some; return the exit status."""
    counts = build(out)
    print(f"{out}/student, {out}/solutions: {len(counts)} notebooks, {sum(counts.values())} exercises")
    print(f"{out}/{NAME}.zip to hand out, {(out / f'{NAME}.zip').stat().st_size / 1e6:.1f} MB")
    if not run:
        return 0
    wrong = prove(out, ROOT / "runs" / "workshop", only)
    some = f", in {', '.join(only)}" if only else ""
    print("\n".join(wrong) or f"The student edition fails at its exercises and nowhere else{some}.")
    return 1 if wrong else 0
