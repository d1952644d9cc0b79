"""The minutes of the map are those of the words and figures that stand in the notebooks, and no lesson is too long."""

import math
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from nbutils.common.paths import ROOT
from nbutils.lessons.course_map import LESSONS

WORDS_A_MINUTE, FIGURE = 200, 0.5  # minutes a figure
LONGEST = 40  # minutes


def reading_minutes(notebook) -> float:
    """Minutes for the words of text and code, and for the figures; the section of the exercises has its own minutes.

    Printed tables are not counted: they are looked into and not read.
    """
    words = figures = 0
    section = ""
    for cell in notebook.cells:
        headings = re.findall(r"^## (.*)$", cell.source, flags=re.MULTILINE) if is_text(cell) else []
        text = cell.source
        if section == "Check yourself" or "Check yourself" in headings:
            text = outside_the_exercises(text, section)
        section = headings[-1] if headings else section
        words += len(re.findall(r"\w+(?:[.,'-]\w+)*", re.sub(r"\]\(\S+\)", "]", text)))
        for output in cell.get("outputs", []):
            figures += output.get("data", {}).get("text/html", "").count("<img")
    return words / WORDS_A_MINUTE + figures * FIGURE


def is_text(cell) -> bool:
    return cell.cell_type == "markdown"


def outside_the_exercises(text: str, section: str) -> str:
    """What of a cell does not belong to the section "Check yourself"."""
    kept = []
    for line in text.splitlines():
        section = line[3:] if line.startswith("## ") else section
        if section != "Check yourself":
            kept.append(line)
    return "\n".join(kept)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_the_minutes_of_reading_are_those_of_its_words(lesson):
    path = ROOT / "notebooks" / f"{lesson.name}.ipynb"
    if not path.exists():
        pytest.skip("not written yet")
    minutes = reading_minutes(nbformat.read(path, as_version=4))
    assert minutes <= LONGEST, f"{minutes:.1f} minutes: a lesson has at most {LONGEST}. Take something out"
    assert lesson.reading == math.ceil(minutes), (
        f"counted {minutes:.1f} minutes: write reading {math.ceil(minutes)} in the map and in the notebook's first cell"
    )


def test_words_and_figures_are_counted_and_exercises_are_not():
    figure = new_output("display_data", data={"text/html": '<img src="data:" alt="a figure">'})
    cells = [
        new_markdown_cell("word " * 200 + "\n\n## Check yourself\n\n" + "asked " * 400),
        new_code_cell("x = 1\n" * 300),
        new_markdown_cell("asked\n\n## Recap\n\n" + "[word](https://far.away/not/read) " * 200),
        new_code_cell("draw()", outputs=[figure, figure]),
    ]
    assert reading_minutes(new_notebook(cells=cells)) == pytest.approx(3.0, abs=0.02)
    cells[0].source = cells[0].source.replace("## Check yourself", "## Another section")
    assert reading_minutes(new_notebook(cells=cells)) == pytest.approx(8.0, abs=0.05)
