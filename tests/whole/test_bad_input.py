"""Bad input as a reader types it: the sentence is the last line in the terminal. `make matrix` sends every row through.

The rows stand in tests/bad_input; test_bad_config, _model, _data and _machine hold each to its sentence.
"""

import re
import socket
import statistics
import subprocess
import sys

import pytest
from bad_input.case import environment, snapshot, typed
from bad_input.config import CONFIGS, GPUS
from bad_input.every import BAD
from recording import record

from nbutils.common.paths import ROOT
from nbutils.launching.config_files import variant
from nbutils.launching.launch import choose_config

pytestmark = pytest.mark.launch

COMMAND = "python -m pytest -m matrix -s tests/whole/test_bad_input.py"


def test_a_bad_config_is_the_last_line_in_the_terminal(tmp_path, hub, script):
    file = variant(choose_config(1, rehearsal=True), tmp_path, fsdp_sharding_stratgy="FULL_SHARD")
    done, _ = typed(hub, tmp_path, "--config_file", str(file), script, "--config", "train.yaml")
    assert done.returncode == 1
    assert "knows no key fsdp_sharding_stratgy" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "launch.log").exists()


def test_a_port_in_use_is_the_last_line_in_the_terminal(tmp_path, hub, script):
    """One machine takes any free port; several must agree on one, and accelerate says if it is taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        file = variant(
            choose_config(1, rehearsal=True),
            tmp_path,
            num_machines=2,
            machine_rank=0,
            main_process_ip="127.0.0.1",
            main_process_port=port,
        )
        done, _ = typed(hub, tmp_path, "--config_file", str(file), script, "--config", "train.yaml")
    assert done.returncode == 1
    assert (
        f"port `{port}`, but another process is utilizing it. Please specify" in done.stderr.splitlines()[-1]
    )
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("cause", ["broken line", "empty row"])  # before a rank starts, and by the ranks
def test_bad_input_is_the_last_line_in_the_terminal(answered, tmp_path, hub, script, cause):
    case = answered[0][cause]
    done, _ = typed(hub, tmp_path, script, "--config", str(case.file), path=case.path)
    assert done.returncode == 1
    assert re.search(BAD[cause][1], done.stderr.splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert snapshot(case.folder / "out") == case.before


def test_the_runner_looks_before_it_executes_a_notebook(answered, tmp_path, hub):
    """Its parameters name a model and a file; notebook 04 would find them bad after all notebooks before it."""
    for cause, name in (("broken line", "dataset"), ("gated model", "model")):
        value = answered[0][cause].settings[name]
        done = subprocess.run(
            [sys.executable, "-m", "nbutils", "run", "--run-dir", str(tmp_path / "run"), "-p", name, value],
            env=environment(hub, tmp_path / "home"), cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 2
        assert re.search(BAD[cause][1], done.stderr.splitlines()[-1]), done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        assert not (tmp_path / "run").exists()


@pytest.mark.matrix
def test_the_whole_table_in_the_terminal(answered, tmp_path, hub, script):
    """Every row through a launch of its own, with the seconds that a reader waits."""
    rows = []

    def answer(cause, expected, *arguments, path=None):
        done, seconds = typed(hub, tmp_path, *arguments, path=path)
        last = done.stderr.splitlines()[-1]
        said = re.sub(r"/[^ ]*/pytest-of-[^/]+/pytest-\d+/[^/]+/", "", last).replace(
            f"{ROOT}/", ""
        )  # no machine's paths
        rows.append({"cause": cause, "status": done.returncode, "seconds": round(seconds, 1), "said": said})
        print(f"{seconds:6.1f}  {cause}: {last}", flush=True)
        assert done.returncode == 1 and re.search(expected, last), (cause, done.stderr)
        assert "Traceback" not in done.stdout + done.stderr

    for cause, (file, changes, expected) in CONFIGS.items():
        if cause not in GPUS:
            config = variant(ROOT / file, tmp_path, **changes)
            answer(cause, expected, "--config_file", str(config), script, "--config", "train.yaml")
    for cause, case in answered[0].items():
        if case.variables:  # of more machines than a terminal has
            continue
        answer(cause, BAD[cause][1], script, "--config", str(case.file), path=case.path)
        assert snapshot(case.folder / "out") == case.before
    median = round(statistics.median(row["seconds"] for row in rows), 1)
    record("refusals in the terminal", COMMAND, rows=rows, median_seconds=median)
    print(f"{median:6.1f}  median")
