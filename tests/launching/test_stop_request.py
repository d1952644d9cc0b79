"""A launch that is asked to end lets its ranks save first, says so, and says how to go on."""

import io
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout

import pytest
from processes import as_in_a_terminal, ranks_of, wait_until

from nbutils.common.paths import ROOT
from nbutils.launching.launch import LaunchFailed, LaunchStopped, launch

CONFIG = ROOT / "configs/accelerate/rehearsal_fsdp1.yaml"
pytestmark = pytest.mark.launch

# What a trainer does: SIGTERM sets a flag; at the end of the step it saves and says with 75 "resume me".
SAVES = """
    import os, signal, sys, time
    from pathlib import Path

    from nbutils.common.exit_status import end_to_be_resumed

    folder, rank, asked = Path(sys.argv[1]), os.environ.get("RANK", "0"), []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    (folder / f"ready{rank}").touch()
    for step in range(600):
        time.sleep(0.1)
        if asked:
            time.sleep(2)  # the rest of the step
            (folder / f"saved{rank}").touch()
            end_to_be_resumed()
"""
HANGS = SAVES.replace("time.sleep(2)", "time.sleep(600)")


def script(folder, body=SAVES):
    path = folder / "script.py"
    path.write_text(textwrap.dedent(body))
    return path


def run(path, tmp_path, **options):
    options = {"rehearsal": False, "show": False, **options}
    return launch(path, [str(tmp_path)], CONFIG, log=tmp_path / "launch.log", **options)


FULL_DISK = SAVES.replace("end_to_be_resumed()\n", "raise OSError(28, 'No space left on device')\n")


@pytest.fixture(scope="module")
def time_is_up(tmp_path_factory):
    """Three launches whose time is up after 12 s, at once, for all that they do is wait: by name, what came of each.

    The folder, the error, the seconds that it took; and what was shown of the one that saves.
    """
    shown = io.StringIO()

    def let_run(name: str, body: str, **options) -> tuple:
        folder = tmp_path_factory.mktemp(name)
        started = time.monotonic()
        with pytest.raises(LaunchFailed) as failed:
            run(script(folder, body), folder, timeout=12, **options)
        return folder, failed.value, time.monotonic() - started

    with redirect_stdout(shown), ThreadPoolExecutor() as pool:
        launches = {
            "saves": pool.submit(let_run, "saves", SAVES, show=True),
            "hangs": pool.submit(let_run, "hangs", HANGS, save_grace=2),
            "full disk": pool.submit(let_run, "full_disk", FULL_DISK),
        }
    return {name: launch.result() for name, launch in launches.items()}, shown.getvalue()


def test_when_the_time_is_up_the_ranks_save_first(time_is_up):
    (folder, stopped, _), shown = time_is_up[0]["saves"], time_is_up[1]
    assert isinstance(stopped, LaunchStopped)
    assert sorted(file.name for file in folder.glob("saved*")) == ["saved0", "saved1"]
    assert stopped.saved
    assert "stopped and saved after 0:" in shown
    message = str(stopped)
    assert "The launch had not ended after 12 s, and its ranks were asked to end. They have saved" in message
    last = " ".join(" ".join(message.splitlines()[2:]).replace("\\", "").split())
    assert last.startswith("accelerate launch --config_file") and last.endswith("--resume true")


def test_ranks_that_do_not_come_to_an_end_are_ended(time_is_up):
    folder, stopped, seconds = time_is_up[0]["hangs"]
    assert isinstance(stopped, LaunchStopped)
    assert "did not say that they have saved within 2 s, and were ended" in str(stopped)
    assert seconds < 40
    assert ranks_of(folder / "script.py") == []


def test_an_error_while_saving_is_not_hidden_by_the_stop(time_is_up):
    _, failed, _ = time_is_up[0]["full disk"]
    assert re.search(r"(?s)^The launch had not ended after 12 s.*No space left", str(failed))
    assert not isinstance(failed, LaunchStopped) and failed.rank is not None


def typed(path, tmp_path):
    words = [
        "launch",
        "--config",
        str(CONFIG),
        "--log",
        str(tmp_path / "launch.log"),
        str(path),
        str(tmp_path),
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "nbutils", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True, preexec_fn=as_in_a_terminal,
    )  # fmt: skip


def test_a_sigterm_to_the_launch_is_a_chance_to_save(tmp_path):
    """What Slurm and clouds send before they take the machine."""
    path = script(tmp_path)
    launching = typed(path, tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("ready*"))) == 2, 60)
    launching.send_signal(signal.SIGTERM)
    _, said = launching.communicate(timeout=60)
    assert launching.returncode == 75
    assert len(list(tmp_path.glob("saved*"))) == 2
    assert "The launch was told to end (SIGTERM), and its ranks were asked to end. They have saved" in said
    assert "--resume true" in said and "Traceback" not in said
    assert ranks_of(path) == []


def asked_all_at_once(path, tmp_path) -> tuple[int, str]:
    """SIGTERM to torchrun and its ranks when both are ready, as Slurm sends it: the launch's status and words."""
    launching = typed(path, tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("ready*"))) == 2, 60)
    for process in ranks_of(path):
        process.send_signal(signal.SIGTERM)
    _, said = launching.communicate(timeout=60)
    return launching.returncode, said


def test_a_sigterm_to_all_processes_at_once_lets_them_save_too(tmp_path):
    """Slurm reaches torchrun as well, which then gives its ranks the same time, and not 30 s, and ends with 1."""
    path = script(tmp_path)
    status, said = asked_all_at_once(path, tmp_path)
    assert status == 75, said
    assert len(list(tmp_path.glob("saved*"))) == 2
    assert "They have saved" in said
    log = (tmp_path / "launch.log").read_text()
    assert "SignalException: Process" in log and "got signal: 15" in log, "torchrun heard it as well"
    assert "--resume true" in said and "Traceback" not in said
    assert ranks_of(path) == []


def test_a_rank_that_has_not_saved_is_no_run_to_resume(tmp_path):
    """All processes get SIGTERM, and one rank fails as it saves: the status is 1, and the error is shown."""
    path = script(
        tmp_path, SAVES.replace("end_to_be_resumed()\n", "end_to_be_resumed() if rank == '0' else 1 / 0\n")
    )
    status, said = asked_all_at_once(path, tmp_path)
    assert status == 1, said
    assert "They have saved" not in said
