"""A launch that is asked to end lets its ranks save first, says so, and says how to go on."""

import os
import signal
import subprocess
import sys
import textwrap
import time

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


def test_when_the_time_is_up_the_ranks_save_first(tmp_path, capsys):
    path = script(tmp_path)
    with pytest.raises(LaunchStopped) as stopped:
        run(path, tmp_path, timeout=12, show=True)
    assert sorted(file.name for file in tmp_path.glob("saved*")) == ["saved0", "saved1"]
    assert stopped.value.saved
    assert "stopped and saved after 0:" in capsys.readouterr().out
    message = str(stopped.value)
    assert "The launch had not ended after 12 s, and its ranks were asked to end. They have saved" in message
    last = " ".join(" ".join(message.splitlines()[2:]).replace("\\", "").split())
    assert last.startswith("accelerate launch --config_file") and last.endswith("--resume true")


@pytest.mark.ci  # a quarter of a minute
def test_ranks_that_do_not_come_to_an_end_are_ended(tmp_path):
    path = script(tmp_path, HANGS)
    started = time.monotonic()
    with pytest.raises(LaunchStopped, match=r"did not say that they have saved within 2 s, and were ended"):
        run(path, tmp_path, timeout=12, save_grace=2)
    assert time.monotonic() - started < 40
    assert ranks_of(path) == []


@pytest.mark.ci  # a quarter of a minute
def test_an_error_while_saving_is_not_hidden_by_the_stop(tmp_path):
    path = script(
        tmp_path, SAVES.replace("end_to_be_resumed()\n", "raise OSError(28, 'No space left on device')\n")
    )
    with pytest.raises(
        LaunchFailed, match=r"(?s)^The launch had not ended after 12 s.*No space left"
    ) as failed:
        run(path, tmp_path, timeout=12)
    assert not isinstance(failed.value, LaunchStopped) and failed.value.rank is not None


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
