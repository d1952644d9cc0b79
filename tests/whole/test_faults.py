"""A fault at each stage of a run: every rank ends, the cause comes last, and the last good checkpoint can be used."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import as_in_a_terminal, ranks_of, wait_until

from nbutils.adapters.checkpoint_folder import newest_complete
from nbutils.adapters.export import export_adapter
from nbutils.common.paths import ROOT
from nbutils.launching.launch import LaunchFailed, choose_config, launch
from nbutils.launching.script_file import write_script
from nbutils.models.tiny import tiny_base

pytestmark = [pytest.mark.launch, pytest.mark.ci]

BOUND = 90  # seconds in which every launch here must have ended by itself; one that works takes 15
SETTINGS = {
    "dataset": "data/instructions/train.jsonl",
    "heldout_dataset": "data/instructions/heldout.jsonl",
    "max_steps": 6,
    "max_length": 64,
    "max_cut_share": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "lora_r": 4,
    "logging_steps": 1,
    "save_steps": 2,
    "eval_strategy": "no",
    "eval_on_start": "false",
    "disable_tqdm": "true",
}


def arguments(folder: Path, **more) -> list[str]:
    told = {"model": folder / "base", "output_dir": folder / "out", **SETTINGS, **more}
    return [word for name, value in told.items() for word in (f"--{name}", str(value))]


def prepared(folder: Path) -> Path:
    """A copy of the tiny base, which a fault may spoil, and the script."""
    shutil.copytree(tiny_base(), folder / "base")
    return write_script(folder)


def start(folder: Path, fault: dict, monkeypatch, **more):
    script = folder / "fine_tuning_FSDP_QLoRA.py"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests/ranks"), str(ROOT)]))
    monkeypatch.setenv("FAULT", json.dumps(fault))
    return launch(
        script, arguments(folder, **more), choose_config(1, rehearsal=True), module="faults",
        log=folder / "launch.log", output_dir=folder / "out", timeout=BOUND, show=False,
    )  # fmt: skip


def assert_usable(out: Path, step: int, folder: Path) -> None:
    """The newest complete checkpoint is that of this step, and its adapter comes out of it."""
    newest = newest_complete(out)
    assert newest is not None and newest.name == f"checkpoint-{step}"
    assert export_adapter(newest, folder / "exported")["tensors"] == 56


# stage and fault -> what the last line says, and the step of the checkpoint that is left
FAULTS = {
    "load: killed": (
        {"stage": "load", "rank": 1, "what": "kill"},
        r"Rank 1 was killed by signal 9 \(SIGKILL\)\. .* host memory",
        None,
    ),
    "load: the file goes away": (
        {"stage": "load", "rank": 0, "what": "truncate", "count": 3},
        r"Rank \d was killed by signal 7 \(SIGBUS\)\. A file that it had mapped became shorter",
        None,
    ),
    "wrap: killed": ({"stage": "wrap", "rank": 0, "what": "kill"}, r"Rank 0 was killed by signal 9", None),
    "step: killed": (
        {"stage": "step", "rank": 1, "what": "kill", "count": 5},
        r"Rank 1 was killed by signal 9",
        4,
    ),
    "step: no number": (
        {"stage": "step", "rank": 1, "what": "poison", "count": 4},
        r"LossIsNoNumber: The loss of step 4 is no number on rank \d .*newest checkpoint with --resume true\.",
        2,
    ),
    "checkpoint: killed": (
        {"stage": "checkpoint", "rank": 1, "what": "kill", "count": 2},
        r"Rank 1 was killed by signal 9",
        2,
    ),
    "final save: killed": ({"stage": "save", "rank": 0, "what": "kill"}, r"Rank 0 was killed by signal 9", 6),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_rank_ends_with_the_cause_and_the_last_checkpoint_is_good(name, tmp_path, monkeypatch):
    fault, words, step = FAULTS[name]
    script = prepared(tmp_path)
    with pytest.raises(LaunchFailed) as failed:
        start(tmp_path, fault, monkeypatch)
    assert re.search(words, str(failed.value).splitlines()[-1]), failed.value
    assert ranks_of(script) == []
    assert not (tmp_path / "out/adapter").exists()
    if step is None:
        assert newest_complete(tmp_path / "out") is None
    else:
        assert_usable(tmp_path / "out", step, tmp_path)


@pytest.mark.matrix  # a minute; each commit loses a whole host, in tests/whole/test_two_hosts.py
def test_a_rank_that_hangs_ends_the_run(tmp_path, monkeypatch):
    """A rank that waits for a dead file system says nothing. The others wait as long as `ddp_timeout` allows.

    Half a minute passes until torchrun kills a rank that does not end when it is asked to.
    """
    script = prepared(tmp_path)
    with pytest.raises(LaunchFailed) as failed:
        start(
            tmp_path, {"stage": "step", "rank": 1, "what": "freeze", "count": 4}, monkeypatch, ddp_timeout=6
        )
    assert failed.value.rank == 0
    assert "Timed out waiting 6000ms" in str(failed.value).splitlines()[-1], failed.value
    assert ranks_of(script) == []
    assert_usable(tmp_path / "out", 2, tmp_path)


def test_a_closed_terminal_ends_every_rank(tmp_path, monkeypatch):
    script = prepared(tmp_path)
    command = [sys.executable, "-m", "nbutils", "launch", "--log", str(tmp_path / "launch.log"), str(script)]
    with subprocess.Popen(
        command + arguments(tmp_path, max_steps=10_000, save_total_limit=1), cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True, stdout=subprocess.DEVNULL,
        preexec_fn=as_in_a_terminal,
    ) as terminal:  # fmt: skip
        try:
            wait_until(lambda: (tmp_path / "out/checkpoint-4").exists(), BOUND)
            os.killpg(terminal.pid, signal.SIGHUP)  # as the kernel does when a terminal goes away
            wait_until(lambda: ranks_of(script) == [], 20)
            assert terminal.wait(timeout=20) != 0
        finally:
            terminal.kill()  # and so the ranks: 10,000 steps would outlive a test that failed
    assert newest_complete(tmp_path / "out") is not None


DRIVER = """
import json, os, sys
from pathlib import Path
sys.path[:0] = ["tests", "tests/whole"]
from test_faults import SETTINGS, arguments
from nbutils.adapters.export import export_adapter
from nbutils.adapters.checkpoint_folder import newest_complete
from nbutils.launching.launch import LaunchFailed, choose_config, launch

folder = Path(sys.argv[1])
said = "it ended well"
try:
    launch(folder / "fine_tuning_FSDP_QLoRA.py", arguments(folder), choose_config(1, rehearsal=True), module="faults",
           log=folder / "launch.log", output_dir=folder / "out", timeout=90, show=False)
except LaunchFailed as failed:
    said = str(failed)
(folder / "out/filler").unlink()
newest = newest_complete(folder / "out")
tensors = export_adapter(newest, folder / "exported")["tensors"]
left = sorted(path.name for path in (folder / "out").iterdir())
print(json.dumps({"said": said, "newest": newest.name, "tensors": tensors, "left": left}))
"""


@pytest.mark.parametrize(("stage", "count", "newest"), [("checkpoint", 2, 2), ("save", 1, 6)])
def test_a_full_disk_while_saving(stage, count, newest, tmp_path):
    """The output folder is a file system of its own, in a mount namespace, filled while the run saves."""
    prepared(tmp_path)
    (tmp_path / "out").mkdir()
    if subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(tmp_path / "out")], check=False
    ).returncode:
        pytest.skip("This machine lets no user mount a file system in a namespace of its own.")
    mount = f'mount -t tmpfs -o size=16m none {tmp_path}/out && exec {sys.executable} -c "$DRIVER" {tmp_path}'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount], cwd=ROOT, capture_output=True, text=True, timeout=150,
        env=os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests/ranks"), str(ROOT)]), "DRIVER": DRIVER,
            "FAULT": json.dumps({"stage": stage, "rank": 0, "what": "full", "count": count}),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert "No space left on device" in seen["said"].splitlines()[-1], seen["said"]
    assert (seen["newest"], seen["tensors"]) == (f"checkpoint-{newest}", 56)
    assert "adapter" not in seen["left"]
    assert ranks_of(tmp_path / "fine_tuning_FSDP_QLoRA.py") == []
