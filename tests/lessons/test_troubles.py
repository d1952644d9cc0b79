"""The troubleshooting table: every entry is shown by a cell or a test that exists, or says that it is not."""

import ast
import json
import re

import nbformat
import pytest

from nbutils.common.paths import ROOT
from nbutils.lessons import records as recorded
from nbutils.lessons.troubles import (
    CELL,
    NOT_REPRODUCED,
    PAGE,
    RECORDED,
    TROUBLES,
    as_markdown,
    read_troubles,
)

NOTEBOOK = ROOT / "notebooks/07_when_it_breaks.ipynb"


def fragments(message: str) -> list[str]:
    """The words of a message that stand in every instance of it."""
    return [part.strip(" `") for part in re.split(r"\.\.\.|`", message) if part.strip(" `")]


def said_by_cell(tag: str) -> str:
    cells = [
        cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if tag in cell.metadata.get("tags", [])
    ]
    assert len(cells) == 1, f"{len(cells)} cells have the tag {tag}"
    return "".join(output.get("text", "") for output in cells[0].outputs)


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.message[:40])
def test_each_proof_exists_and_shows_the_message(trouble):
    if trouble.proof.startswith("tests/"):
        file, _, name = trouble.proof.partition("::")
        functions = {
            node.name
            for node in ast.walk(ast.parse((ROOT / file).read_text()))
            if isinstance(node, ast.FunctionDef)
        }
        assert name in functions
        if not trouble.message.startswith("("):  # the test wants these words, in a pattern or as they are
            text = (ROOT / file).read_text().replace("\\", "")
            assert all(part in text for part in fragments(trouble.message)), trouble.message
    elif trouble.proof.startswith(CELL):
        said = said_by_cell(trouble.proof.removeprefix(CELL))
        assert said
        if not trouble.message.startswith("("):
            assert all(part in said.replace("`", "") for part in fragments(trouble.message)), said
    elif trouble.proof.startswith(RECORDED):
        file = recorded.FOLDER / trouble.proof.removeprefix(RECORDED)
        assert trouble.message in json.dumps(json.loads((ROOT / file).read_text()))
    else:
        assert trouble.proof == NOT_REPRODUCED


def test_most_of_it_is_reproduced_and_reports_are_named_in_full():
    reproduced = [trouble for trouble in TROUBLES if trouble.proof.startswith(("tests/", CELL))]
    assert len(reproduced) >= 0.75 * len(TROUBLES)
    for trouble in TROUBLES:
        assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", report) for report in trouble.reports)


def test_the_page_is_made_of_the_data():
    assert (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8") == PAGE + as_markdown() + "\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "saving:\n- {message: a, where: b, cause: c, fix: d}\n",
            "missing 1 required positional argument: 'proof'",
        ),
        ("saving:\n- {message: a, cure: d}\n", "unexpected keyword argument 'cure'"),
    ],
)
def test_a_key_that_is_wrong_is_named(tmp_path, text, said):
    (tmp_path / "troubles.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"troubles.yaml, a: .*{said}"):
        read_troubles(tmp_path / "troubles.yaml")
