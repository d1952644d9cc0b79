"""Notebook 04 with too little time: it saves and ends with 75, and the same command goes on to an adapter."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from nbutils.adapters.checkpoint_folder import checkpoints_in
from nbutils.common.exit_status import RESUME_ME
from nbutils.common.paths import ROOT
from nbutils.common.progress_file import read_progress

FAR_AWAY = 20_000  # steps: no machine gets there in the shortest time that a run may be given


def run(folder, steps: int, seconds: int) -> tuple[int, str]:
    """The command that a reader types; its status, and what it said with the log of the launch."""
    parameters = {
        "max_steps": steps, "time_limit": seconds, "batch_size": 2, "max_length": 64,
        "max_cut_share": 1.0, "eval_rows": 8, "eval_steps": 100_000, "save_steps": 100_000,
    }  # fmt: skip
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(parameters))
    words = ["run", "--only", "04", "--params", str(file), "--run-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "nbutils", *words], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    log = folder / "train.log"
    return done.returncode, (log.read_text() if log.is_file() else "") + done.stdout + done.stderr


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_the_notebook_s_run_stops_in_time_and_the_same_command_goes_on(tmp_path):
    folder = tmp_path / "mine"
    steps = 0
    for _ in range(2):
        status, said = run(folder, FAR_AWAY, 60)
        assert status == RESUME_ME, said[-3000:]
        assert "its ranks were asked to end. They have saved (exit status 75). Go on with:" in said
        if steps:
            assert f"train/checkpoint-{steps}." in said, (
                "the second run goes on from the first one's checkpoint"
            )
        newest = checkpoints_in(folder / "train")[-1]
        assert int(newest.name.removeprefix("checkpoint-")) > steps
        steps = int(newest.name.removeprefix("checkpoint-"))
        assert f"Asked to stop: {newest.name} is saved" in said
    # As if the last step came now.
    status, said = run(folder, steps + 2, 600)
    assert status == 0, said[-3000:]
    assert re.search(r"56 tensors saved and verified", said)
    taken = [line["step"] for line in read_progress(folder / "train") if "loss" in line]
    assert taken[-2:] == [steps + 1, steps + 2] and len(taken) == len(set(taken)), "no step was taken twice"
    assert json.loads((folder / "train" / "run.json").read_text())["adapter"]["tensors"] == 56
