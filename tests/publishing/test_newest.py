"""`make newest`: each state is told apart, the culprit is the package that heals, and nothing tested is touched."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook, new_output

from nbutils.common.paths import ROOT
from nbutils.common.versions import locked_versions
from nbutils.publishing import newest, newest_environment, newest_items, newest_report
from nbutils.publishing.newest_environment import Environment
from nbutils.publishing.newest_items import BROKEN, DRIFTED, NOT_REACHED, OBSOLETE, SAME, Item
from nbutils.publishing.refresh import NOTEBOOK_METADATA

NOTHING_RAISED = (
    "from nbutils.lessons.intended_failures import expect_failure\n"
    "with expect_failure(ValueError, 'uniform dtype'):\n    pass"
)
OTHER_WORDS = NOTHING_RAISED.replace("pass", "raise ValueError('one dtype, please')")
CELLS = {  # name of a notebook: source and committed output of its cells
    "10_same": [("print('loss 4.03')", "loss 4.01\n")],
    "11_drifted": [
        ("print('loss 4.50')", "loss 4.01\n")
    ],  # off by 12 %: more than another processor's rounding
    "12_nothing_raised": [(NOTHING_RAISED, ""), ("print('to the end')", "to the end\n")],
    "13_other_words": [(OTHER_WORDS, "")],
    "14_broken": [("import no_such_module", ""), ("print('to the end')", "changed\n")],
    "16_prints_around_a_figure": [("print('a')\ndisplay(1)\nprint('b')", "a\nb\n")],
    "17_looked_at_before": [
        ("print('Overwriting a.py'); print('torch 2.13.0')", "Writing a.py\ntorch 2.13.0+cpu\n")
    ],
    "15_waits_for_04": [(f"raise FileNotFoundError('x: {newest_items.NO_RUN}')", "")],
}
SLEEPS = """run_dir: str = ''  # folder
import os, pathlib, time
pathlib.Path('{}/pid').write_text(str(os.getpid()))
time.sleep(60)"""


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Environment:
    """The tested environment, in a copy of the repository whose notebooks are those of `CELLS`."""
    tree = tmp_path_factory.mktemp("newest") / "tree"
    newest_environment.copy_repository(tree)
    (tree / "runs").mkdir(exist_ok=True)
    for name, cells in CELLS.items():
        code = [new_code_cell(source, execution_count=1) for source, _ in cells]
        for cell, (_, said) in zip(code, cells):
            cell.outputs = [new_output("stream", name="stdout", text=said)] if said else []
            if "display(1)" in cell.source:  # the runner puts what a cell prints together, before its figures
                cell.outputs.append(new_output("display_data", data={"text/plain": "1"}))
        parameters = new_code_cell("run_dir: str = ''  # folder", metadata={"tags": ["parameters"]})
        parameters.execution_count = 1
        notebook = new_notebook(cells=[parameters, *code], metadata=NOTEBOOK_METADATA)
        nbformat.write(notebook, tree / "notebooks" / f"{name}.ipynb")
    return Environment(Path(sys.executable), tree)


@pytest.mark.parametrize(
    ("name", "state", "words"),
    [
        ("10_same", SAME, []),
        ("11_drifted", DRIFTED, ["said 4.01, now says 4.50"]),
        ("12_nothing_raised", OBSOLETE, ["nothing was raised"]),
        ("13_other_words", OBSOLETE, ["with other words"]),
        ("14_broken", BROKEN, ["cell 2: ModuleNotFoundError", "said 'changed', now says 'to the end'"]),
        ("15_waits_for_04", NOT_REACHED, ["cell 2: FileNotFoundError"]),
        ("16_prints_around_a_figure", SAME, []),
        ("17_looked_at_before", SAME, []),
    ],
)
def test_each_state_of_a_lesson_is_told_apart(here, name, state, words):
    item = newest_items.lesson(f"{name}.ipynb", here)
    assert item.state == state, item.details
    assert all(any(word in detail for detail in item.details) for word in words), item.details


def test_a_notebook_that_cannot_be_executed_is_broken(here):
    item = newest_items.lesson("99_nothing.ipynb", here)
    assert item.state == BROKEN and "99_nothing.ipynb" in item.details[0]


@pytest.mark.parametrize(
    ("body", "state"),
    [
        ("def check(): pass\ndef still_needed(): return True", SAME),
        ("def check(): pass\ndef still_needed(): return False", OBSOLETE),
        ("def check(): raise RuntimeError('save_on_cpu is gone')", BROKEN),
    ],
)
def test_a_patch_is_asked_for_its_target_and_its_need(here, body, state):
    (here.tree / "nbutils/patches/of_the_test.py").write_text(body + "\n")
    item = newest_items.patch("of_the_test", here)
    assert item.state == state
    assert state != BROKEN or "save_on_cpu is gone" in item.details[0]


def test_the_culprit_is_the_package_that_heals_when_it_is_put_back(here, tmp_path):
    """Both packages are new, and the fault is in one: what is put in front of it decides."""
    for place, answer in {"torch": 1, "transformers": 0, "new": 1, "tested": 0}.items():
        (tmp_path / place / "site-packages").mkdir(parents=True)
        (tmp_path / place / "site-packages/probe.py").write_text(f"faulty = {answer}\n")
    new, tested = (
        Environment(here.python, here.tree, (tmp_path / name / "site-packages",))
        for name in ("new", "tested")
    )

    def look(where: Environment) -> Item:
        done = where.run("-c", "import probe, sys; sys.exit(probe.faulty)", timeout=60)
        return Item("probe", BROKEN if done.returncode else SAME)

    def culprit(places: list[Environment], packages: list[str]) -> str:
        return newest.find_culprit(look(new), look, places, packages, tmp_path)

    assert culprit([tested, new], ["torch", "transformers"]) == "transformers"
    assert culprit([tested, new], ["torch"]) == newest.NO_SINGLE
    assert culprit([new, new], ["torch", "transformers"]) == newest.NO_PACKAGE


def test_outputs_that_are_stale_hide_no_fault(here, tmp_path):
    """With the tested stack one cell differs already; with the new ones a message has changed besides."""
    stale = Item("lesson", DRIFTED, ["cell 31"])
    (tmp_path / "peft/site-packages").mkdir(parents=True)
    places = [Environment(here.python, here.tree, (Path("tested"),)), Environment(here.python, here.tree)]

    def look(where: Environment) -> Item:
        return stale if where.in_front else Item("lesson", OBSOLETE, ["cell 11", "cell 31"])

    assert newest.find_culprit(look(places[1]), look, places, ["peft"], tmp_path) == "peft"
    assert newest.find_culprit(stale, lambda _: stale, places, ["peft"], tmp_path) == newest.NO_PACKAGE


def test_a_package_that_is_put_back_reaches_the_cells_of_a_notebook(here, tmp_path):
    (tmp_path / "only_in_front.py").write_text("")
    code = new_code_cell("import only_in_front\nprint('reached')", execution_count=2)
    code.outputs = [new_output("stream", name="stdout", text="reached\n")]
    parameters = new_code_cell(
        "run_dir: str = ''  # folder", metadata={"tags": ["parameters"]}, execution_count=1
    )
    nbformat.write(
        new_notebook(cells=[parameters, code], metadata=NOTEBOOK_METADATA),
        here.tree / "notebooks/18_in_front.ipynb",
    )
    assert newest_items.lesson("18_in_front.ipynb", here).state == BROKEN
    in_front = Environment(here.python, here.tree, (tmp_path,))
    assert newest_items.lesson("18_in_front.ipynb", in_front).state == SAME


def test_what_runs_out_of_time_is_not_broken_and_leaves_no_process(here, monkeypatch, tmp_path):
    """A kernel that sleeps, ended by our clock; a cell that nbclient's clock ended; ranks that ran out of time."""
    cells = [
        new_code_cell(source, execution_count=n)
        for n, source in enumerate(SLEEPS.format(tmp_path).split("\n", 1), 1)
    ]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(
        new_notebook(cells=cells, metadata=NOTEBOOK_METADATA), here.tree / "notebooks/19_sleeps.ipynb"
    )
    monkeypatch.setattr(newest_items, "LESSON_TIMEOUT", 8)
    item = newest_items.lesson("19_sleeps.ipynb", here)
    assert item.state == NOT_REACHED and item.details[0] == "It took more than 8 s and was ended."
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
    stopped = {"cell": 3, "name": "LaunchStopped", "said": "Its time is over."}
    assert (
        newest_items.judge_lesson("x", {"errors": [stopped], "differences": [], "not_reached": 0}).state
        == NOT_REACHED
    )


@pytest.mark.parametrize(("second_time", "state"), [("passes", SAME), ("fails", BROKEN)])
def test_a_test_that_passes_alone_is_no_fault(here, tmp_path, second_time, state):
    """And if it fails again, only it is looked at for the culprit."""
    tree = tmp_path / "tree"
    (tree / "tests").mkdir(parents=True)
    counts = f"open({str(tmp_path / 'runs')!r}, 'a').write(__file__)"
    once = f"import os\ndef test_it():\n    seen = os.path.exists({str(tmp_path / 'seen')!r})\n    {counts}\n"
    once += f"    open({str(tmp_path / 'seen')!r}, 'w').close()\n    assert seen and {second_time == 'passes'}, 'why'\n"
    (tree / "tests/test_once.py").write_text(once)
    (tree / "tests/test_fine.py").write_text(f"def test_fine():\n    {counts}\n")
    where = Environment(here.python, tree)
    item = newest_items.tests(where)
    assert item.state == state and "tests/test_once.py::test_it" in item.details[1], item.details
    ran = (tmp_path / "runs").read_text()
    assert (ran.count("test_fine"), ran.count("test_once")) == (1, 2)
    if item.again:
        assert item.again(where).state == BROKEN
    assert (item.again is None) == (state == SAME) and (tmp_path / "runs").read_text().count("test_fine") == 1


def test_items_are_chosen_by_part_or_by_a_piece_of_their_name():
    names = ["patch a", "lesson 03_x", "lesson 03b_y", "tests", "training FSDP 1", "training FSDP 2"]
    assert newest.chosen(names, ["patches", "FSDP 2"]) == ["patch a", "training FSDP 2"]
    assert newest.chosen(names, ["03_", "tests"]) == ["lesson 03_x", "tests"]
    with pytest.raises(ValueError, match="nothing is called 04; wanted some of patches"):
        newest.chosen(names, ["04", "tests"])
    everything = list(newest.looks(Environment(Path(sys.executable), Path())))
    assert newest.chosen(everything, list(newest.PARTS)) == everything


def test_training_is_the_same_only_with_the_same_adapter():
    one = {"sha256": "a" * 64, "losses": {"loss_last": 3.5}, "warnings": ["UserWarning: old"]}
    other = one | {"sha256": "b" * 64, "losses": {"loss_last": 3.6}, "warnings": ["UserWarning: new"]}
    assert newest_items.compare_training("t", one, one).state == SAME
    drifted = newest_items.compare_training("t", one, other)
    assert drifted.state == DRIFTED and "3.5 → 3.6" in drifted.details[0]
    assert drifted.details[1:] == ["New warning: UserWarning: new"]


def test_what_is_newer_than_the_lock_is_named_whatever_the_build(tmp_path):
    locked = locked_versions()
    installed = {"torch": f"{locked['torch']}+cpu", "peft": "99.0", "no-such-package": "1.0"}
    assert newest_environment.changed(installed) == {"peft": (locked["peft"], "99.0")}
    newest.write_lock(installed, tmp_path)
    assert "+peft==99.0" in (tmp_path / "lock.diff").read_text().splitlines()
    assert "torch==2" in (tmp_path / "lock.txt").read_text()


def test_the_report_says_the_same_to_people_and_programs(tmp_path):
    about = {
        "provenance": {"date": "2026-01-01", "commit": "abc", "machine": {"cpu": "a CPU", "cpus": 2}},
        "changed": {"peft": ("0.21", "99.0")},
        "torch_build": "2.15.0+cpu",
        "pip_check": ["x needs y"],
    }
    items = [Item("lesson 10", SAME), Item("lesson 11", DRIFTED, ["said a | b, now says c"], "peft")]
    text = newest_report.write(tmp_path, about, items).read_text()
    assert "| lesson 11 | DRIFTED | peft |" in text and "| peft | 0.21 | 99.0 |" in text
    assert "said a \\| b, now says c" in text and "x needs y" in text
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["state"] for row in report["items"]] == [SAME, DRIFTED]
    assert newest_report.fingerprint(report) == [["lesson 10", SAME, ""], ["lesson 11", DRIFTED, "peft"]]
    assert not list(tmp_path.glob(".report*"))
    assert list(newest_report.earlier(tmp_path, about)) == ["lesson 10", "lesson 11"]
    assert newest_report.earlier(tmp_path, about)["lesson 11"] == items[1]
    assert not newest_report.earlier(tmp_path, about | {"changed": {"peft": ("0.21", "99.1")}})


def test_from_the_command_line_nothing_tested_is_touched(tmp_path, monkeypatch, capsys):
    """With the tested packages standing for the newest. A second call looks at one item again and keeps the other."""
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    place = Path(sys.prefix) / "lib"

    def tested() -> list:
        status = subprocess.run(
            ["git", "-C", str(ROOT), "status", "--porcelain"], capture_output=True, text=True
        )
        packages = [p for p in place.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        return [status.stdout, [(p, p.stat().st_size, p.stat().st_mtime_ns) for p in packages]]

    before = tested()
    words = ["--keep", "--venv", str(tmp_path / "venv"), "--out", str(tmp_path / "out"), "--only"]
    assert newest.main([*words, "hybrid_timeout,fsdp2_gather"]) == 0
    shutil.copy(tmp_path / "out/report.json", tmp_path / "before.json")
    again = newest.main([*words, "fsdp2_gather", "--beside", str(tmp_path / "before.json")])
    assert tested() == before
    report = json.loads((tmp_path / "out/report.json").read_text())
    names = ["patch fsdp2_gather", "patch hybrid_timeout"]
    assert [(row["name"], row["state"]) for row in report["items"]] == [(name, SAME) for name in names]
    assert report["torch_build"] == torch.__version__
    assert again == 3 and "It says the same as" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        newest.main([*words, "lesson 99"])
    assert "nothing is called lesson 99" in capsys.readouterr().err
