"""The reading edition: outputs that readers can trust, without what is private to the machine that made them."""

import re
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook, new_output

from nbutils.common.paths import ROOT
from nbutils.publishing import parameters
from nbutils.publishing import refresh as reading

COMMITTED = sorted((ROOT / "notebooks").glob("*.ipynb"))
PRIVATE = re.compile(
    r"/(?:home|root|Users|work|tmp|opt|mnt|var)/|[A-Z]:\\\\|hf_[A-Za-z0-9]{20,}|/site-packages/"
)


def texts(cell):
    for output in cell.get("outputs", []):
        yield output.get("text", "")
        yield from (value for kind, value in output.get("data", {}).items() if kind.startswith("text/"))
        yield from output.get("traceback", [])


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_notebook_was_executed_from_top_to_bottom(path):
    code = [
        cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code" and cell.source
    ]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "make notebooks"
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_no_output_holds_a_machine_path_a_secret_or_debris(path):
    for cell in nbformat.read(path, as_version=4).cells:
        for text in texts(cell):
            assert not PRIVATE.search(text), PRIVATE.search(text)
            assert "\r" not in text and "it/s]" not in text, text
            assert "Warning:" not in text, text


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_metadata_is_clean_and_images_are_small(path):
    notebook = nbformat.read(path, as_version=4)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert set(cell.metadata) <= set(reading.CELL_METADATA)
        for output in cell.get("outputs", []):
            sizes = [
                len(value) for kind, value in output.get("data", {}).items() if kind.startswith("image/")
            ]
            assert sum(sizes) < 150_000


def test_the_tiny_parameters_are_the_defaults_that_readers_see():
    values = yaml.safe_load((ROOT / "configs/params/tiny.yaml").read_text())
    for path in COMMITTED:
        for name, parameter in parameters.read_contract(path).items():
            if name in values and name != "time_limit":  # it shows in no output
                assert parameter.default == values[name], f"{path.name}: {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs/params").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_set_of_parameters_is_one_the_notebooks_understand(path):
    contracts = [parameters.read_contract(notebook) for notebook in COMMITTED]
    parameters.check(parameters.read_params_file(path), contracts)


def notebook_that_said(*outputs, source="print(1)"):
    cell = new_code_cell(source, execution_count=7, metadata={"papermill": {"duration": 1}, "tags": ["kept"]})
    cell.outputs = list(outputs)
    return new_notebook(cells=[cell], metadata={"papermill": {"input_path": str(ROOT)}})


def printed(text):
    return new_output("stream", name="stdout", text=text)


def test_outputs_are_written_back_without_what_is_private():
    source = notebook_that_said()
    executed = notebook_that_said(
        printed(
            f"in {ROOT}/runs/refresh/train and runs/refresh/x\n{ROOT}/nbutils/data/rows.py\n"
            f"/any/where/lib/python3.11/site-packages/torch/nn.py\n{Path.home()}/secret\n"
        ),
        new_output("execute_result", {"text/plain": "2"}, execution_count=9),
    )
    executed.cells[0].id = source.cells[0].id
    clean = reading.with_outputs(source, executed, Path("runs/refresh"))
    cell = clean.cells[0]
    assert cell.outputs[0].text == (
        "in runs/latest/train and runs/latest/x\nnbutils/data/rows.py\ntorch/nn.py\n~/secret\n"
    )
    assert (cell.execution_count, cell.outputs[1].execution_count) == (1, 1)
    assert cell.metadata == {"tags": ["kept"]} and set(clean.metadata) == {"kernelspec", "language_info"}


SAME = {
    "times": ("trained in 12.3 s, 0:14 left", "trained in 9 s, 1:02:14 left"),
    "dates": ("runs/2026-11-22T11-28-36Z/x", "runs/2027-01-02T01-02-03Z/x"),
    "who was first": ("Rank 0 failed first:", "Rank 1 failed first:"),
    "hashes": ("sha256 99f3df4cd630", "sha256 35a7f54a9896"),
    "rounding": ("loss 5.7312", "loss 5.7319"),
}
OTHER = {
    "a word": ("verified", "NOT verified"),
    "a number": ("loss 5.73", "loss 3.10"),
    "a count": ("56 tensors", "0 tensors"),
    "another word of hexadecimal letters": ("a face", "a facade"),
    "a line more": ("a\n", "a\nb\n"),
}


@pytest.mark.parametrize("old, new", SAME.values(), ids=SAME.keys())
def test_what_differs_from_run_to_run_is_no_change(old, new):
    assert reading.compare(notebook_that_said(printed(old)), notebook_that_said(printed(new))) == []


def test_two_outputs_do_not_run_into_one_word():
    before, after = (notebook_that_said(printed(f"after 0:1{n}"), printed(f"after 0:2{n}")) for n in (1, 2))
    assert reading.compare(before, after) == []


def test_an_image_does_not_slow_the_search_for_paths():
    """Base64 is one word of 100 kB; a search that begins anew at each letter would take a minute, so pytest's limit."""
    image = "A/" * 2_000_000
    assert reading.without_paths(image, "runs/refresh") == image


@pytest.mark.parametrize("old, new", OTHER.values(), ids=OTHER.keys())
def test_an_output_that_says_something_else_is_found(old, new):
    assert len(reading.compare(notebook_that_said(printed(old)), notebook_that_said(printed(new)))) == 1


def test_a_table_in_markdown_is_compared():
    def shown(text):
        data = {"text/plain": "<IPython.core.display.Markdown object>", "text/markdown": text}
        return notebook_that_said(new_output("display_data", data))

    assert reading.compare(shown("| a | b |"), shown("| a | b |")) == []
    assert len(reading.compare(shown("| a | b |"), shown("| a | b |\n| c | d |"))) == 1


@pytest.mark.notebook
def test_refreshing_writes_what_is_new_and_leaves_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "REFRESH_DIR", tmp_path / "run")
    parameters_cell = new_code_cell('run_dir: str = ""  # folder', metadata={"tags": ["parameters"]})
    shown = new_code_cell("import time\nprint('written to', run_dir, 'at', time.time_ns() % 97, 's')")
    notebook = new_notebook(cells=[parameters_cell, shown])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = tmp_path / "00_first.ipynb"
    nbformat.write(notebook, path)

    assert reading.refresh(tmp_path) == [
        "00_first.ipynb: cell 1 was never executed",
        "00_first.ipynb: cell 2 was never executed",
    ]
    first = path.read_text()
    assert "written to runs/latest at" in first and str(tmp_path) not in first
    assert reading.refresh(tmp_path) == []
    assert path.read_text() == first  # only a time differs

    path.write_text(first.replace("written to runs/latest", "never said"))
    (difference,) = reading.refresh(tmp_path, check_only=True)
    assert "said 'never said at" in difference
    assert "never said" in path.read_text()
