"""The reading edition: committed notebooks carry the outputs of a tiny run; here they are refreshed and checked."""

import copy
import math
import re
import shutil
from pathlib import Path

import nbformat

from nbutils.common.paths import ROOT
from nbutils.publishing.runner import NOTEBOOKS, run_series

REFRESH_DIR = Path("runs/refresh")
MACHINE = "machine"  # tag of a cell whose output describes the machine: it is shown, and not compared
TOLERANCE = 0.05  # relative: another processor rounds otherwise

# What may stay in the metadata of a committed notebook.
NOTEBOOK_METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
CELL_METADATA = ("tags", "slideshow", "jupyter")

NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:[eE][-+]?\d+)?")
VARYING = [
    re.compile(r"\b\d{4}-\d\d-\d\d(?:[T ][\d:.-]+Z?)?"),  # a date, a run's name
    re.compile(r"\b\d+:\d\d(?::\d\d)?\b"),  # 1:05
    re.compile(r"[\d.,]+ ?(?:ms|s|min|seconds?|minutes?|it/s|tok/s|MB/s|GB/s)\b"),
    re.compile(r"0x[0-9a-f]+"),
    re.compile(r"\bRank \d+ (?=failed first)"),  # all ranks meet the same error
    # A hash: another processor rounds otherwise, and PEFT writes its config's sets in any order.
    re.compile(r"\b(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{12,64}\b"),
]


def refresh(folder: Path = NOTEBOOKS, check_only: bool = False) -> list[str]:
    """Execute the notebooks again with their own defaults and write the outputs back, or only compare.

    A notebook whose outputs say the same as before is left as it is.

    Args:
        folder: of the notebooks.
        check_only: write nothing.

    Returns:
        One sentence for each cell whose output has changed.

    Raises:
        SeriesFailed: a notebook could not be executed.
    """
    shutil.rmtree(ROOT / REFRESH_DIR, ignore_errors=True)
    run_dir = run_series(run_dir=REFRESH_DIR, folder=folder)
    changed = []
    for path in sorted(folder.glob("[0-9]*_*.ipynb")):
        before = nbformat.read(path, as_version=4)
        after = with_outputs(before, nbformat.read(run_dir / path.name, as_version=4), run_dir)
        differences = [f"{path.name}: {difference}" for difference in compare(before, after)]
        changed += differences
        if not check_only:
            nbformat.write(after if differences else with_outputs(before, before, run_dir), path)
    return changed


def with_outputs(
    source: nbformat.NotebookNode, executed: nbformat.NotebookNode, run_dir: Path
) -> nbformat.NotebookNode:
    """The source notebook with the outputs of its executed copy, fit to be committed.

    Args:
        source: the notebook as written.
        executed: the same one after a run; the cells are matched by their ids.
        run_dir: the run's folder, shown to readers as `runs/latest`.

    Returns:
        A new notebook: counts from 1 on, no private metadata, no machine path.
    """
    notebook = copy.deepcopy(source)
    outputs = {cell.id: cell.outputs for cell in executed.cells if cell.cell_type == "code"}
    notebook.metadata = nbformat.from_dict(NOTEBOOK_METADATA)
    count = 0
    for cell in notebook.cells:
        kept = {name: value for name, value in cell.metadata.items() if name in CELL_METADATA}
        cell.metadata = nbformat.from_dict(kept)
        if cell.cell_type != "code":
            continue
        count += bool(cell.source.strip())
        cell.execution_count = count if cell.source.strip() else None
        cell.outputs = [_presentable(output, count, str(run_dir)) for output in outputs.get(cell.id, [])]
    return notebook


def _presentable(output: nbformat.NotebookNode, count: int, run_dir: str) -> nbformat.NotebookNode:
    output = copy.deepcopy(output)
    output.pop("transient", None)
    if "execution_count" in output:
        output.execution_count = count
    if "metadata" in output:
        output.metadata = nbformat.from_dict({})
    if "text" in output:
        output.text = without_paths(output.text, run_dir)
    for kind, value in output.get("data", {}).items():
        if kind.startswith("text/"):
            output.data[kind] = without_paths(value, run_dir)
    return output


def without_paths(text: str, run_dir: str) -> str:
    """A text without what is private to this machine: the place of the clone, of the packages, of the user."""
    # Asked first: in the 100 kB of an image the search itself takes seconds, and finds nothing.
    if "/site-packages/" in text:
        text = re.sub(r"[^\s'\"=(]*/site-packages/", "", text)
    if "/ipykernel_" in text:
        text = re.sub(r"/[^\s'\"]*/ipykernel_\d+/\d+\.py", "this cell", text)
    text = text.replace(str(ROOT / run_dir), "runs/latest").replace(run_dir, "runs/latest")
    return text.replace(f"{ROOT}/", "").replace(str(ROOT), ".").replace(str(Path.home()), "~")


def compare(before: nbformat.NotebookNode, after: nbformat.NotebookNode) -> list[str]:
    """What the outputs of two executions say differently; times and hashes aside, numbers within `TOLERANCE`.

    Args:
        before: the notebook as committed.
        after: the same, executed again.

    Returns:
        One sentence for each cell that differs.
    """
    found = []
    for number, (old, new) in enumerate(zip(before.cells, after.cells), 1):
        if old.cell_type != "code" or MACHINE in old.metadata.get("tags", []):
            continue
        if old.execution_count is None and old.source.strip():
            found.append(f"cell {number} was never executed")
        elif difference := _difference(_said(old), _said(new)):
            found.append(f"cell {number} ({old.source.strip().splitlines()[0][:50]}): {difference}")
    return found


def _said(cell: nbformat.NotebookNode) -> str:
    """The text that a cell puts out; an image counts as one word."""
    parts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        parts += [
            output.get("text", ""),
            data.get("text/plain", ""),
            data.get("text/markdown", ""),
            *(f"<{k}>" for k in data if k.startswith("image/")),
        ]
    return "\n".join(part.rstrip("\n") for part in parts if part)


def _difference(old: str, new: str) -> str:
    """Where two texts part, or an empty string."""
    for pattern in VARYING:
        old, new = pattern.sub("<time>", old), pattern.sub("<time>", new)
    if "<time>" in old:  # bars and columns are as wide as their times
        old, new = re.sub(r" +", " ", old), re.sub(r" +", " ", new)
    if NUMBER.sub("#", old) != NUMBER.sub("#", new):
        for line, other in zip(old.splitlines() + ["(nothing)"], new.splitlines() + ["(nothing)"]):
            if NUMBER.sub("#", line) != NUMBER.sub("#", other):
                return f"said {line.strip()!r}, now says {other.strip()!r}"
    for a, b in zip(NUMBER.findall(old), NUMBER.findall(new)):
        x, y = float(a.replace(",", "")), float(b.replace(",", ""))
        if not math.isclose(x, y, rel_tol=TOLERANCE, abs_tol=0.01):
            return f"said {a}, now says {b}"
    return ""
