"""The parameter contract, read by us and by papermill, which executes the notebooks."""

import ast

import papermill
import pytest

from nbutils.common.paths import ROOT
from nbutils.publishing.parameters import parse_cell, read_contract


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_papermill_reads_the_same_parameters(notebook):
    ours = {name: (parameter.default, parameter.help) for name, parameter in read_contract(notebook).items()}
    seen = papermill.inspect_notebook(str(notebook)).values()
    assert {each["name"]: (ast.literal_eval(each["default"]), each["help"]) for each in seen} == ours


def test_what_papermill_passes_over_in_silence_is_read():
    """Why the contract has a reader of its own: papermill leaves out a line with two `=`, or a type of two."""
    cell = 'a: int = 1  # one\nb: str = "x=y"  # two\nc: str | None = None  # three'
    assert list(parse_cell(cell, "x.ipynb")) == ["a", "b", "c"]
    papermills = papermill.translators.PythonTranslator.inspect({"source": cell})
    assert [parameter.name for parameter in papermills] == ["a"]
