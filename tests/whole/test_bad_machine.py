"""What is wrong with a machine is refused before a weight is read: disk, folders, memory, versions, cards."""

import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from bad_input.case import SAVED, assert_refused, environment, words
from bad_input.machine import CASES
from processes import ranks_of

from nbutils.common.paths import ROOT
from nbutils.common.refused import Refused
from nbutils.launching.config_files import variant
from nbutils.launching.launch import choose_config
from nbutils.training import before_loading as refusing
from nbutils.training.shared_output import Token

pytestmark = pytest.mark.launch


@pytest.mark.parametrize("cause", CASES)
def test_bad_machine_is_refused_before_a_weight_is_read(answered, cause):
    cases, seen = answered
    assert_refused(cases[cause], seen[cause], CASES[cause][1])


# ---- two machines, each with an output folder of its own ------------------------------------------------------------


def machine(number: int, folder: Path, port: int, script: str, hub: str) -> subprocess.Popen:
    """What is typed on a machine; that both are this one makes no difference to `accelerate launch`."""
    file = variant(
        choose_config(1, rehearsal=True), folder, num_machines=2, num_processes=2, machine_rank=number,
        main_process_ip="127.0.0.1", main_process_port=port,
    )  # fmt: skip
    told = {**SAVED, "model": folder / "none"}  # nothing is there that could be read
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    command += ["-m", "nbutils.launching.rehearsal", script, *words(told, output_dir=folder / "runs/out")]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment(hub, folder / "home"), cwd=ROOT,
    )  # fmt: skip


def test_machines_that_do_not_share_the_output_folder_are_refused_before_a_weight_is_read(
    tmp_path, hub, script
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = [tmp_path / "first", tmp_path / "second"]
    folders[0].mkdir()
    (folders[1] / "runs/out").mkdir(parents=True)  # there on one machine, and still to be made on the other
    machines = [machine(number, folder, port, script, hub) for number, folder in enumerate(folders)]
    outputs = [process.communicate(timeout=90)[0] for process in machines]
    host = re.escape(socket.gethostname())
    for process, output in zip(machines, outputs):
        assert process.returncode == 1, output
        assert re.search(
            rf"output_dir {re.escape(str(folders[1]))}/runs/out is not one folder that all machines share: rank 1 on "
            rf"{host} has looked for 10 seconds .*Wanted: .* Name one on a file system that all machines mount\.",
            output,
        ), output
    assert not (folders[0] / "runs").exists() and not any((folders[1] / "runs/out").iterdir())
    assert ranks_of(script) == []


def test_machines_that_share_the_output_folder_go_on_and_nothing_is_left_in_it(accepted):
    assert accepted["shared"]["status"] == [99, 99], accepted["shared"]["output"]
    folder = accepted["folder"]
    assert (folder / "plan.json").exists() and not (folder / "runs").exists()


def test_a_token_that_comes_late_is_waited_for(tmp_path):
    here, there = (Token(tmp_path / "new/out", "token") for _ in range(2))
    late = threading.Timer(0.7, here.leave)
    late.start()
    there.look_for()
    late.join()
    assert here.made == [tmp_path / "new", tmp_path / "new/out"] and there.made == []
    here.take_away()
    assert not any(tmp_path.iterdir())
    with pytest.raises(Refused, match=r"has looked for 0\.1 seconds"):
        there.look_for(seconds=0.1)


# ---- versions and cards ------------------------------------------------------------------------------------------


def test_an_untested_version_is_a_warning(accepted):
    assert accepted["untested"]["status"] == [0], accepted["untested"]["output"]
    assert re.search(r"Not tested together: .*peft 0\.21\.99 \(tested: ", accepted["untested"]["output"][0])


def test_a_card_without_bf16_is_refused(tmp_path, monkeypatch):
    """No such card is here: the doctor is shown one by a program in the place of nvidia-smi, the script by torch."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'Tesla T4, 15360, 7.5'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    with_card = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "nbutils", "doctor"],
        env=with_card,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert re.search(r"FAIL bf16 +compute capability 7\.5\n.*needs compute capability 8\.0", done.stdout)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla T4")
    with pytest.raises(Refused, match=r"Tesla T4 cannot compute in bf16, .* compute capability 8\.0"):
        refusing._refuse_settings(SimpleNamespace(lora_r=4), SimpleNamespace(mixed_precision="no"))
