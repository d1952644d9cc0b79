"""Lesson 00's training: the real script on two ranks, in less than a minute."""

import json
import os
from pathlib import Path
from unittest.mock import patch

from nbutils.common.devices import gpus_shown
from nbutils.launching.launch import LaunchResult, choose_config, launch
from nbutils.launching.script_file import write_script


def train(output_dir: Path, settings: dict) -> tuple[LaunchResult, dict]:
    """Launch the script with these settings: on two GPUs, or rehearsed on two CPU processes.

    Args:
        output_dir: for the adapter and `run.json`; script and log are written beside it.
        settings: of the script, by name.

    Returns:
        What the launch left, and what the run says of itself.

    Raises:
        LaunchFailed: the exit status was not zero.
    """
    rehearse = gpus_shown() < 2
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if rehearse else {}  # a launch that rehearses is shown no GPU
    chosen = settings | {"output_dir": output_dir}
    words = [word for key, value in chosen.items() for word in (f"--{key}", str(value))]
    how = {
        "num_processes": 2,
        "output_dir": output_dir,
        "log": output_dir.with_suffix(".log"),
        "timeout": 600,
    }
    with patch.dict(os.environ, hidden):
        script = write_script(output_dir.parent)
        result = launch(script, words, choose_config(1, rehearse), rehearsal=rehearse, **how)
    return result, json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
