"""The troubleshooting table: every entry is shown by a cell or a test that exists, or says that it is not."""

import ast
import json
import re
from pathlib import Path

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
    is_silent,
    look_up,
    messages_as_markdown,
    read_troubles,
    show_trouble,
    silent_as_markdown,
)


def fragments(message: str) -> list[str]:
    """The words of a message that stand in every instance of it."""
    return [part.strip(" `") for part in re.split(r"\.\.\.|`", message) if part.strip(" `")]


def text_of(file: Path, tree: ast.Module) -> str:
    """A test, and the tables in `tests/` that it imports."""
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    tables = [ROOT / "tests" / f"{module.replace('.', '/')}.py" for module in modules]
    return "".join(path.read_text() for path in (file, *tables) if path.is_file())


def said_by_cell(notebook: str, tag: str) -> str:
    (path,) = (ROOT / "notebooks").glob(f"{notebook.removeprefix('notebook ')}_*.ipynb")
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if tag in cell.metadata.get("tags", [])]
    assert len(cells) == 1, f"{len(cells)} cells have the tag {tag}"
    return "".join(output.get("text", "") for output in cells[0].outputs)


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.message[:40])
def test_each_proof_exists_and_shows_the_message(trouble):
    if trouble.proof.startswith("tests/"):
        file, _, name = trouble.proof.partition("::")
        tree = ast.parse((ROOT / file).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        if not trouble.message.startswith("("):  # the test wants these words, in a pattern or as they are
            text = text_of(ROOT / file, tree).replace("\\", "")
            assert all(part in text for part in fragments(trouble.message)), trouble.message
    elif cell := CELL.fullmatch(trouble.proof):
        said = said_by_cell(*cell.groups())
        assert said
        if not trouble.message.startswith("("):
            assert all(part in said.replace("`", "") for part in fragments(trouble.message)), said
    elif trouble.proof.startswith(RECORDED):
        file = recorded.FOLDER / trouble.proof.removeprefix(RECORDED)
        assert trouble.message in json.dumps(json.loads((ROOT / file).read_text()))
    else:
        assert trouble.proof == NOT_REPRODUCED


def test_most_of_it_is_reproduced_and_reports_are_named_in_full():
    reproduced = [
        trouble for trouble in TROUBLES if trouble.proof.startswith("tests/") or CELL.match(trouble.proof)
    ]
    assert len(reproduced) >= 0.75 * len(TROUBLES)
    for trouble in TROUBLES:
        assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", report) for report in trouble.reports)


def test_the_page_is_made_of_the_data():
    assert (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8") == PAGE + as_markdown() + "\n"


def test_the_two_tables_of_the_lesson_hold_each_trouble_once():
    rows = [
        line for line in (messages_as_markdown() + silent_as_markdown()).splitlines() if "---" not in line
    ]
    assert sum(line.startswith("| ") and not line.startswith("| you see") for line in rows) == len(TROUBLES)


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.message[:40])
def test_each_message_is_found_by_its_own_words_and_in_a_line_of_a_log(trouble):
    assert trouble in look_up(trouble.message)
    if not is_silent(trouble):
        line = f"[rank1]: SomeError: {trouble.message.replace('...', '17').upper()} and more"
        assert look_up(line) == [trouble]


def test_what_is_looked_up_is_printed_or_said_to_be_unknown(capsys):
    show_trouble("signal 9")
    said = capsys.readouterr().out
    assert "SIGKILL" in said and "  cause: " in said and "  do:    " in said
    for unknown in ("no such words", "", "  `"):
        show_trouble(unknown)
        assert "not in the table" in capsys.readouterr().out


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
