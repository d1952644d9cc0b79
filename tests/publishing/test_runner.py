"""The runner: parameters are refused before anything runs, runs leave what repeats them, failures are shown."""

import json
import os
import signal
import subprocess
import sys

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from processes import as_in_a_terminal, ranks_of, wait_until

from nbutils.__main__ import main
from nbutils.common import paths as course
from nbutils.common.paths import ROOT
from nbutils.publishing import parameters, run_summary, runner
from nbutils.publishing.cell_progress import CellProgress

PARAMETERS = """\
model: str = "tiny"  # the tiny base, a folder, or a hub id
dataset: str = "README.md"  # file or hub id
learning_rate: float = 1.0e-3  # of the adapter
max_steps: int = 4  # optimizer steps; -1 means whole epochs
packing: bool = False  # put several examples into one row
fsdp_version: int = 1  # 1 or 2
heldout_dataset: str | None = None  # None splits a share off
report_to: str = "none"  # where the loss goes
run_dir: str = ""  # filled in by the runner
"""


def write_notebook(folder, name, *sources, cell=PARAMETERS):
    first = new_code_cell(cell, metadata={"tags": ["parameters"]})
    notebook = new_notebook(cells=[new_markdown_cell(f"# {name}"), first, *map(new_code_cell, sources)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / f"{name}.ipynb")


@pytest.fixture
def series(tmp_path):
    """Two small notebooks, and a run of them: `series(...)` calls the command line and returns the exit status."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    write_notebook(folder, "00_first", "print('first', max_steps)", "x = 1")
    write_notebook(folder, "01_second", "print('second', model)", cell='model: str = "tiny"  # which\n')

    def run(*arguments, run_dir=tmp_path / "run"):
        words = ["run", "--notebooks", str(folder), "--run-dir", str(run_dir), *map(str, arguments)]
        return main(words)

    run.folder, run.run_dir = folder, tmp_path / "run"
    return run


def params(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return path


def test_what_a_cell_says_for_the_terminal_stands_there_before_the_next_cell_runs(series, capsys):
    path = series.folder / "00_first.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[2].metadata.tags = ["terminal"]
    notebook.cells[3].source = "raise ValueError('later')"
    nbformat.write(notebook, path)
    assert series() == 1
    said = capsys.readouterr().out
    assert "\n    first 4\n" in said  # the cell with the tag, and no other one
    assert "later" not in said.split("first 4")[0]


def test_the_cell_that_counts_steps_hours_and_disk_is_shown_so():
    notebook = nbformat.read(ROOT / "notebooks/04_write_and_launch.ipynb", as_version=4)
    (counts,) = [cell for cell in notebook.cells if "ahead.in_words(" in cell.source]
    assert CellProgress.SHOWN in counts.metadata.tags


BAD = {
    "unknown name": (
        "max_step: 20",
        "max_step: no notebook has a parameter of this name. Did you mean max_steps?",
    ),
    "unknown name, nothing near": (
        "zebra: 1",
        "zebra: no notebook has a parameter of this name. Known: dataset, ",
    ),
    "exponent without a point": ("learning_rate: 1e-4", "YAML reads 1e-4 as text; write 1.0e-4."),
    "quoted false": (
        "packing: 'false'",
        "packing: found 'false' (str), wanted bool. Write false without quotes.",
    ),
    "number for bool": ("packing: 1", "packing: found 1 (int), wanted bool."),
    "bool for int": ("max_steps: yes", "max_steps: found True (bool), wanted int."),
    "float for int": ("max_steps: 2.5", "max_steps: found 2.5 (float), wanted int."),
    "text for int": ("max_steps: many", "max_steps: found 'many' (str), wanted int."),
    "number for text": ("model: 70", "model: found 70 (int), wanted str."),
    "list for text": ("model: [a, b]", "model: found ['a', 'b'] (list), wanted str."),
    "null where none is allowed": ("model:", "model: found None (NoneType), wanted str."),
    "missing data file": (
        "dataset: data/my_own.jsonl",
        "dataset: there is no file or folder data/my_own.jsonl.",
    ),
    "missing model folder": ("model: ./models/llama", "model: there is no file or folder ./models/llama."),
    "outside its limits": ("fsdp_version: 3", "fsdp_version: found 3, and it must be 1 or 2."),
    "outside its choices": (
        "report_to: wandb",
        "report_to: found 'wandb', and it must be none or tensorboard.",
    ),
    "no steps": ("max_steps: 0", "max_steps: found 0, and it must be at least 1, or -1 for whole epochs."),
    "no number": ("learning_rate: .nan", "learning_rate: found nan, and it must lie between 0 and 1."),
    "filled in by the runner": (
        "run_dir: runs/mine",
        "run_dir: found it given, and the runner fills it in itself.",
    ),
    "name given twice": ("max_steps: 3\nmax_steps: 4", "cannot be read as YAML: max_steps is given twice"),
    "no YAML": ("model: [tiny", "cannot be read as YAML: "),
    "no mapping": ("- max_steps", "must hold lines `name: value`; found list."),
}


@pytest.mark.parametrize("text, sentence", BAD.values(), ids=BAD.keys())
def test_bad_parameters_are_refused_before_anything_runs(series, tmp_path, capsys, text, sentence):
    assert series("--params", params(tmp_path, text)) == 2
    assert sentence in capsys.readouterr().err
    assert not series.run_dir.exists()


def test_bad_parameters_on_the_command_line_are_refused_alike(series, capsys):
    for words in (
        ("max_step", "3"),
        ("max_steps", "many"),
        ("learning_rate", "1e400"),
        ("model", "./nowhere"),
    ):
        assert series("-p", *words) == 2
        assert capsys.readouterr().err.strip().startswith(f"{words[0]}: ")
    assert not series.run_dir.exists()


def test_a_missing_parameters_file_is_refused_with_the_nearest_name(series, tmp_path, capsys):
    params(tmp_path, "")
    assert series("--params", tmp_path / "parms.yaml") == 2
    assert f"There is no parameters file {tmp_path}/parms.yaml. Did you mean {tmp_path}/params.yaml?" in (
        capsys.readouterr().err
    )


def test_tensorboard_is_asked_for_early_where_it_is_missing(series, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert series("--params", params(tmp_path, "report_to: tensorboard")) == 2
    assert "report_to: tensorboard is not installed in this environment." in capsys.readouterr().err
    assert not series.run_dir.exists()


@pytest.mark.parametrize(("value", "installed"), [("tensorboard", True), ("none", False)])
def test_tensorboard_is_no_fault_where_it_is_there_or_not_asked_for(value, installed, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    parameters.check({"report_to": value}, [parameters.parse_cell(PARAMETERS, "x.ipynb")])


def test_every_fault_is_named_at_once_and_within_seconds_of_typing(tmp_path):
    path = params(tmp_path, "max_stepz: 3\nlearnin_rate: 1\n")
    words = [
        sys.executable,
        "-m",
        "nbutils",
        "run",
        "--params",
        str(path),
        "--run-dir",
        str(tmp_path / "run"),
    ]
    write_notebook(tmp_path, "00_first", "1 / 0")
    done = subprocess.run([*words, "--notebooks", str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "Did you mean max_steps?" in done.stderr and "Did you mean learning_rate?" in done.stderr


def test_parameters_are_checked_before_anything_heavy_is_imported():
    """Torch and transformers take seconds to import; a typing mistake need not wait for them."""
    code = "import sys, nbutils.publishing.runner; print({'torch', 'transformers', 'papermill'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_a_notebook_number_that_does_not_exist_is_refused(series, capsys):
    assert series("--only", "00,09") == 2
    assert "There is no notebook 09" in capsys.readouterr().err


BROKEN_CONTRACTS = {
    "no annotation": "max_steps = 4",
    "a call": "max_steps: int = int(4)",
    "two equal signs": "a = b = 4",
    "an import": "import os",
    "an unknown type": "max_steps: Steps = 4",
    "a default of another type": 'max_steps: int = "4"',
}


@pytest.mark.parametrize("cell", BROKEN_CONTRACTS.values(), ids=BROKEN_CONTRACTS.keys())
def test_a_notebook_that_breaks_the_contract_is_refused(series, capsys, cell):
    write_notebook(series.folder, "02_third", cell=cell)
    assert series() == 2
    assert "02_third.ipynb, parameters cell" in capsys.readouterr().err
    assert not series.run_dir.exists()


def test_one_name_has_one_type_in_the_whole_series(series, capsys):
    write_notebook(series.folder, "02_third", cell="model: int = 4")
    assert series() == 2
    assert "model: 00_first.ipynb declares it as str, 02_third.ipynb as int." in capsys.readouterr().err


def test_a_parameter_on_the_command_line_takes_the_type_that_is_declared():
    contract = parameters.parse_cell(PARAMETERS, "x.ipynb")
    typed = {
        "packing": "false",
        "learning_rate": "1e-4",
        "max_steps": "20",
        "model": "1234",
        "heldout_dataset": "null",
    }
    values = {name: parameters.from_command_line(name, text, [contract]) for name, text in typed.items()}
    assert values == {
        "packing": False,
        "learning_rate": 1e-4,
        "max_steps": 20,
        "model": "1234",
        "heldout_dataset": None,
    }


def test_the_help_of_a_parameter_is_its_comment():
    contract = parameters.parse_cell(PARAMETERS, "x.ipynb")
    assert contract["max_steps"].help == "optimizer steps; -1 means whole epochs"
    assert (contract["learning_rate"].default, contract["learning_rate"].type) == (1e-3, float)


@pytest.mark.notebook
def test_a_run_leaves_what_is_needed_to_repeat_it(series, tmp_path, capfd):
    assert series("--params", params(tmp_path, "model: README.md"), "-p", "max_steps", "7") == 0

    run = series.run_dir
    assert yaml.safe_load((run / "params.yaml").read_text()) == {"model": "README.md", "max_steps": 7}
    assert json.loads((run / "versions.json").read_text())["versions"]["papermill"]
    first = nbformat.read(run / "00_first.ipynb", as_version=4)
    assert [output.text for cell in first.cells for output in cell.get("outputs", [])] == ["first 7\n"]
    assert f'run_dir = "{run}"' in first.cells[2].source  # injected, because the notebook declares it
    second = nbformat.read(run / "01_second.ipynb", as_version=4)
    assert "run_dir" not in "".join(cell.source for cell in second.cells)

    summary = json.loads((run / "summary.json").read_text())
    assert [(n["name"], n["status"], n["code_cells"], n["executed_cells"]) for n in summary["notebooks"]] == [
        ("00_first", "ok", 4, 4),
        ("01_second", "ok", 3, 3),
    ]
    assert set(summary) == {"notebooks", "training", "adapter", "versions", "commit"}
    printed = capfd.readouterr()
    assert "01_second" in printed.out and "\r" not in printed.out
    assert printed.err == ""  # no noise from the kernels either


@pytest.mark.notebook
def test_a_failing_cell_stops_the_run_and_is_shown(series, capsys):
    write_notebook(series.folder, "00_first", "print('so far')", "1 / 0  # here", "print('never')")
    assert series() == 1
    printed = capsys.readouterr()
    assert "00_first.ipynb: cell In [4] failed with ZeroDivisionError: division by zero" in printed.err
    assert "    1 / 0  # here" in printed.err
    kept = nbformat.read(series.run_dir / "00_first.ipynb", as_version=4)
    assert "so far\n" in [
        output.text for cell in kept.cells for output in cell.get("outputs", []) if "text" in output
    ]
    summary = json.loads((series.run_dir / "summary.json").read_text())
    assert [notebook["status"] for notebook in summary["notebooks"]] == ["failed", "not run"]


@pytest.mark.notebook
def test_a_cell_that_takes_too_long_ends_the_run_and_its_ranks(series, tmp_path, capsys):
    script = tmp_path / "sleeper.py"
    script.write_text("import sys, pathlib, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)")
    cell = (
        "from nbutils.launching.launch import launch\n"
        f"launch({str(script)!r}, [{str(tmp_path / 'ready')!r}], 'configs/accelerate/rehearsal_fsdp1.yaml', "
        f"log={str(tmp_path / 'log')!r}, rehearsal=False)"
    )
    write_notebook(series.folder, "00_first", cell)
    assert series("--cell-timeout", "12") == 1
    assert (
        "CellTimeoutError in this cell:\n    from nbutils.launching.launch import launch"
        in capsys.readouterr().err
    )
    assert (tmp_path / "ready").exists()
    wait_until(lambda: ranks_of(script) == [], 10)


@pytest.mark.notebook
def test_an_interrupt_on_the_terminal_ends_the_series_and_its_ranks(series, tmp_path):
    script = tmp_path / "sleeper.py"
    script.write_text("import sys, pathlib, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)")
    cell = (
        "from nbutils.launching.launch import launch\n"
        f"launch({str(script)!r}, [{str(tmp_path / 'ready')!r}], 'configs/accelerate/rehearsal_fsdp1.yaml', "
        f"log={str(tmp_path / 'log')!r}, rehearsal=False)"
    )
    write_notebook(series.folder, "00_first", cell)
    words = [sys.executable, "-m", "nbutils", "run", "--notebooks", str(series.folder)]
    running = subprocess.Popen(
        [*words, "--run-dir", str(series.run_dir)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=as_in_a_terminal,
    )
    wait_until((tmp_path / "ready").exists, 60)
    os.killpg(running.pid, signal.SIGINT)  # what Ctrl-C does
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 130 and "Interrupted." in errors
    wait_until(lambda: ranks_of(script) == [], 10)


SAVES = """
import os, pathlib, signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
pathlib.Path(sys.argv[1] + os.environ["RANK"]).touch()
while not asked:
    time.sleep(0.1)
sys.exit(75)
"""


@pytest.mark.notebook
def test_a_sigterm_lets_a_training_save_and_the_series_says_resume_me(series, tmp_path):
    """What a cluster sends before it takes the machine, to a run of the night."""
    script = tmp_path / "saves.py"
    script.write_text(SAVES)
    cell = (
        "from nbutils.launching.launch import launch\n"
        f"launch({str(script)!r}, [{str(tmp_path / 'ready')!r}], 'configs/accelerate/rehearsal_fsdp1.yaml', "
        f"log={str(tmp_path / 'log')!r}, rehearsal=False)"
    )
    write_notebook(series.folder, "00_first", cell)
    words = [sys.executable, "-m", "nbutils", "run", "--notebooks", str(series.folder)]
    running = subprocess.Popen(
        [*words, "--run-dir", str(series.run_dir)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=as_in_a_terminal,
    )  # fmt: skip
    wait_until(lambda: len(list(tmp_path.glob("ready?"))) == 2, 90)  # before, a rank would just end
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 75, errors
    assert "They have saved (exit status 75). Go on with:" in errors and "--resume true" in errors
    assert errors.rstrip().endswith(f"python -m nbutils run --from 00 --run-dir {series.run_dir}")
    summary = json.loads((series.run_dir / "summary.json").read_text())
    assert [notebook["status"] for notebook in summary["notebooks"]] == ["failed", "not run"]
    wait_until(lambda: ranks_of(script) == [], 10)


@pytest.mark.notebook
def test_a_run_without_the_promised_adapter_fails(series, capsys):
    write_notebook(series.folder, "04_write_and_launch", "print('I trained nothing')")
    assert series("--only", "04") == 1
    assert (
        "train/run.json says nothing about adapter: path, tensors, sha256, verified."
        in capsys.readouterr().err
    )


@pytest.mark.notebook
def test_going_on_from_a_notebook_keeps_the_folder_and_its_parameters(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    write_notebook(folder, "00_first", "x = 1")
    write_notebook(folder, "01_second", "print(max_steps)")
    monkeypatch.setattr(runner, "RUNS", tmp_path / "runs")
    monkeypatch.setattr("nbutils.common.paths.RUNS", tmp_path / "runs")
    run = runner.run_series(params(tmp_path, "max_steps: 9"), folder=folder)
    assert (tmp_path / "runs/latest").resolve() == run.resolve()
    assert runner.run_series(begin="01", folder=folder).resolve() == run.resolve()
    again = nbformat.read(run / "01_second.ipynb", as_version=4)
    assert again.cells[-1].outputs[0].text == "9\n"


@pytest.mark.ci  # refresh executes every lesson; this one starts papermill by itself
@pytest.mark.notebook
def test_plain_papermill_does_it_too(tmp_path):
    """With a file and a word of the command line, which has the last say; in the shortest lesson."""
    (tmp_path / "steps.yaml").write_text("step_seconds: 20.0\nstep_tokens: 2048\n")
    words = [sys.executable, "-m", "papermill", "notebooks/07b_more_than_one_machine.ipynb"]
    words += [str(tmp_path / "out.ipynb"), "-f", str(tmp_path / "steps.yaml")]
    words += ["-p", "step_seconds", "33.0", "-p", "run_dir", str(tmp_path / "run"), "--no-progress-bar"]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    said = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))
    assert "Your cards: one step takes 33 s" in said


def test_going_back_to_an_earlier_lesson_does_not_hide_what_was_trained(tmp_path, monkeypatch):
    """Lessons 01 to 03 make run folders as well; 05 must find the newest one that has trained."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="Run notebooks/04_write_and_launch"):
        course.latest()
    for name, trained in (("2026-01-01", True), ("2026-01-02", True), ("2026-01-03", False), ("other", True)):
        (tmp_path / "runs" / name / "train").mkdir(parents=True)
        if trained:
            (tmp_path / "runs" / name / "train" / "run.json").touch()
        course.point_latest_to(course.RUNS / name)
    assert course.latest() == course.RUNS / "other"  # the latest one has trained
    course.point_latest_to(course.RUNS / "2026-01-03")
    assert course.latest() == course.RUNS / "2026-01-02"
    assert course.latest("runs/2026-01-01") == course.RUNS / "2026-01-01"
    with pytest.raises(FileNotFoundError, match="runs/nowhere does not exist"):
        course.latest("runs/nowhere")


def test_the_summary_names_every_part_that_is_missing():
    entry = runner.Entry("04_write_and_launch", None, {}, status="ok")
    summary = run_summary.summarise([entry], ROOT / "no_such_run")
    assert len(run_summary.what_is_missing(summary)) == 3
    complete = {
        "notebooks": [{"name": "04_write_and_launch", "status": "ok", "code_cells": 3, "executed_cells": 3}],
        "training": dict.fromkeys(run_summary.TRAINING, 1),
        "adapter": {"path": "x", "tensors": 56, "sha256": "0", "verified": True},
    }
    assert run_summary.what_is_missing(complete) == []
    complete["notebooks"][0]["executed_cells"] = 2
    assert "2 of 3 code cells" in run_summary.what_is_missing(complete)[0]


def test_the_terminal_follows_the_training_in_a_notebook(tmp_path):
    write_notebook(tmp_path, "04_write_and_launch", "x = 1")
    lines = CellProgress("[1/1] 04", tmp_path / "04_write_and_launch.ipynb", tmp_path)
    (tmp_path / "train").mkdir()
    progress = tmp_path / "train" / "progress.jsonl"
    progress.write_text('{"step": 9, "max_steps": 9, "seconds": 1, "loss": 0.0}\n')  # of an older launch
    lines.begin(new_code_cell("launch()"), 2)
    assert lines.line() == "[1/1] 04  cell 3/3  0 s"
    with progress.open("a") as out:
        out.write('{"step": 1, "max_steps": 4, "seconds": 2, "loss": 5.25}\n')
    assert lines.line() == "[1/1] 04  cell 3/3  [#####...............] step 1/4 | loss 5.2500 | 0:06 left"
