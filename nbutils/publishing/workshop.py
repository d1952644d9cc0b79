"""The workshop, made from the one master of each notebook: a student edition, a solutions edition, an archive.

A solution stands in the master between two lines, `# solution begin` and `# solution end`. The cell that holds them is
the exercise.
"""

import copy
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import nbformat

from nbutils.common.paths import ROOT
from nbutils.publishing.runner import NOTEBOOKS
from nbutils.publishing.solution_names import uses_of_solutions

BEGIN, END = "# solution begin", "# solution end"
SOLUTION = re.compile(rf"^([ \t]*){BEGIN}\n.*?^\1{END}\n?", re.MULTILINE | re.DOTALL)
NOTES = ROOT / "docs" / "teachers_notes.md"
NAME = "fsdp-qlora-workshop"
# What a participant needs beside the notebooks. The tests and the teacher's notes stay here.
HANDED_OUT = [
    *("Makefile", "pyproject.toml", "requirements.lock", "environment.yml"),
    *("README.md", "CONTRIBUTING.md", "LICENSE"),
    *("nbutils", "configs", "data", "benchmarks", "docs", f":!docs/{NOTES.name}"),
]
START = """\
This is the student edition of the workshop. Two commands, on Linux with Python 3.11 to 3.13, make and pip:

    make lab                             installs into .venv (2 GB and more: before the day) and opens the notebooks
    .venv/bin/python -m nbutils doctor   says whether this machine will do

Begin with 00_start_here. Each exercise is a cell that raises NotImplementedError: put your answer where the `...`
stands, delete the line that raises, and run the cell. Its checker says OK, or why the answer is not right. `make
tutorial` stops at the first exercise that you have not solved.

The README is that of the whole repository: `make test` and `make workshop` work there, and not in this archive.
"""


class BadMaster(ValueError):
    """A master notebook, or the teacher's notes, from which no edition can be made."""


def exercises(notebook: nbformat.NotebookNode) -> list[str]:
    """The ids of the cells that hold an exercise, in their order.

    Args:
        notebook: a master.

    Raises:
        BadMaster: a solution has a begin without an end, or the other way round.
    """
    found = []
    for cell in notebook.cells:
        marks = [cell.source.count(BEGIN), cell.source.count(END)]
        if cell.cell_type != "code" or not any(marks):
            continue
        if marks != [1, 1] or not SOLUTION.search(cell.source):
            raise BadMaster(
                f"Cell {cell.id}: found {marks[0]} lines `{BEGIN}` and {marks[1]} lines `{END}`, "
                "wanted one of each, in this order and indented alike."
            )
        found.append(cell.id)
    return found


def student(master: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The edition to work in: no outputs, and a line that raises in place of each solution.

    Args:
        master: the notebook with its solutions.

    Returns:
        A new notebook with the same cell ids.
    """
    notebook = copy.deepcopy(master)
    numbers = {cell: number for number, cell in enumerate(exercises(master), 1)}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs, cell.execution_count = [], None
        if cell.id in numbers:
            line = (
                f'raise NotImplementedError("Exercise {numbers[cell.id]}: put your answer where the `...` stands, '
                'delete this line, and run the cell again.")'
            )
            cell.source = SOLUTION.sub(lambda found, line=line: f"{found[1]}{line}\n", cell.source).rstrip(
                "\n"
            )
    return notebook


def solutions(master: nbformat.NotebookNode, notes: str) -> nbformat.NotebookNode:
    """The teacher's edition: the master as it is, code and outputs, with the notes after the title.

    So the run that proves the master (`python -m nbutils refresh --check`) proves this edition as well.

    Args:
        master: the notebook with its solutions.
        notes: Markdown, without a heading.
    """
    notebook = copy.deepcopy(master)
    note = nbformat.v4.new_markdown_cell(f"## For the teacher\n\n{notes}", id="teachers-notes")
    notebook.cells.insert(1, note)
    return notebook


def teachers_notes(path: Path = NOTES) -> dict[str, str]:
    """The teacher's notes: name of a notebook -> Markdown.

    Args:
        path: a file with a section `## NN_name` for each notebook.

    Raises:
        BadMaster: there is no such file.
    """
    if not path.is_file():
        raise BadMaster(
            f"There is no {path.name}: the archive of a workshop has none, so make it in a whole clone."
        )
    pieces = re.split(r"^## (\d\db?_\w+)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: text.strip() for name, text in zip(pieces[1::2], pieces[2::2])}


def build(out: Path, folder: Path = NOTEBOOKS) -> dict[str, int]:
    """Write `student/`, `solutions/` and the archive that is handed out.

    Args:
        out: folder; made if missing, and its editions are replaced.
        folder: of the masters.

    Returns:
        Name of a notebook -> number of its exercises.

    Raises:
        BadMaster: a notebook has no teacher's notes, its marks of solutions do not pair, or one of its cells needs a
            solution.
    """
    notes, counts = teachers_notes(), {}
    for edition in ("student", "solutions"):
        shutil.rmtree(out / edition, ignore_errors=True)
        (out / edition).mkdir(parents=True)
    for path in sorted((ROOT / folder).glob("[0-9]*_*.ipynb")):
        if path.stem not in notes:
            raise BadMaster(f"{NOTES.name} has no section `## {path.stem}`; each notebook needs one.")
        master = nbformat.read(path, as_version=4)
        counts[path.stem] = len(exercises(master))
        shown = student(master)
        for cell, name, exercise in uses_of_solutions(master, shown):
            raise BadMaster(
                f"{path.name}: cell {cell} uses `{name}`, which only the solution in cell {exercise} makes. "
                "In the student edition it would fail; make the name before the exercise, or give it another."
            )
        nbformat.write(shown, out / "student" / path.name)
        nbformat.write(solutions(master, notes[path.stem]), out / "solutions" / path.name)
    pack(out / f"{NAME}.zip", out / "student")
    return counts


def pack(archive: Path, notebooks: Path) -> None:
    """Write one archive with the student edition and what it needs; the same files give the same bytes.

    Raises:
        BadMaster: this is no clone, so nothing says which files belong to the course.
    """
    words = ["git", "-C", str(ROOT), "ls-files", "-z", "--", *HANDED_OUT]
    try:
        listed = subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise BadMaster(
            "The archive is made of the files that git tracks; this folder is no clone, or git is not installed."
        ) from None
    files = {name: (ROOT / name).read_bytes() for name in listed.stdout.split("\0") if name}
    files |= {f"notebooks/{path.name}": path.read_bytes() for path in notebooks.glob("*.ipynb")}
    files["START.txt"] = START.encode()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
        for name in sorted(files):
            entry = zipfile.ZipInfo(f"{NAME}/{name}", (1980, 1, 1, 0, 0, 0))  # no time of this day
            entry.external_attr, entry.compress_type = 0o100644 << 16, zipfile.ZIP_DEFLATED
            out.writestr(entry, files[name])
