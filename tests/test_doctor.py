"""The doctor: each check says OK, WARN or FAIL where it should, with something to do."""

import json
import subprocess
import sys

import pytest

from nbutils import doctor
from nbutils.course import ROOT
from nbutils.doctor import FAIL, OK, WARN
from nbutils.loading import IN_MEMORY_BYTES
from nbutils.memory_items import GIB
from nbutils.needs import IN_MEMORY_GB, MODELS, host_gib

BIG, TINY = MODELS["llama31_70b"], MODELS["tiny"]
RTX3090 = {"name": "NVIDIA GeForce RTX 3090", "gib": 24.0, "capability": 8.6}


@pytest.mark.parametrize(
    ("python", "verdict"), [((3, 10), FAIL), ((3, 11), OK), ((3, 12), OK), ((3, 13), OK), ((3, 14), FAIL)]
)
def test_python(python, verdict):
    assert doctor.check_python(python).verdict == verdict


def test_packages_are_held_against_the_lock():
    found = {"torch": "2.13.0", "peft": "0.20.0", "trl": None}
    checks = doctor.check_packages({"torch": "2.13.0", "peft": "0.21.2", "trl": "1.16.0"}, found)
    assert [check.verdict for check in checks] == [OK, WARN, FAIL]
    assert "peft==0.21.2" in checks[1].mend
    assert "trl==1.16.0" in checks[2].mend


def test_the_lock_names_every_package_of_the_stack():
    assert set(doctor.STACK) <= doctor.locked_versions().keys()


def test_no_gpu_is_a_warning_for_the_tiny_model_and_a_failure_for_the_big_one():
    assert [check.verdict for check in doctor.check_gpus(TINY, [])] == [WARN]
    assert [check.verdict for check in doctor.check_gpus(BIG, [])] == [FAIL]


def verdicts(model, gpus):
    return {check.what: check.verdict for check in doctor.check_gpus(model, gpus)}


def test_two_cards_of_24_gib_run_70b_with_offload_only():
    assert verdicts(BIG, [RTX3090] * 2)["GPU memory"] == WARN
    assert verdicts(BIG, [RTX3090 | {"gib": 48.0}] * 2)["GPU memory"] == OK
    assert verdicts(BIG, [RTX3090 | {"gib": 8.0}] * 2)["GPU memory"] == FAIL


def test_an_old_card_without_bf16_fails():
    assert verdicts(BIG, [RTX3090 | {"capability": 7.5}] * 2)["bf16"] == FAIL


def test_host_memory_is_what_was_measured_and_not_a_copy_a_rank():
    recorded = json.loads((ROOT / "benchmarks/results/70b_fsdp1_offload_cap_b1_l2048.json").read_text())
    measured = recorded["measured"]["host_bytes"] / GIB  # both ranks together
    least, comfortable = host_gib(BIG, 2)
    assert least == pytest.approx(measured, rel=0.05)
    assert doctor.check_host_memory(BIG, 2, comfortable + 1).verdict == OK
    assert (
        doctor.check_host_memory(BIG, 2, least + 1).verdict == WARN
    )  # the mapped checkpoint will be read again
    assert doctor.check_host_memory(BIG, 2, least - 1).verdict == FAIL
    four = host_gib(BIG, 4)[0]
    assert least < four < 1.3 * least  # four ranks share the weights as two do: each brings its own libraries


def test_a_small_model_is_quantised_by_each_rank_for_itself():
    small = MODELS["llama31_8b"]
    assert IN_MEMORY_GB * 1e9 == IN_MEMORY_BYTES  # the loader is too heavy to be asked by the doctor
    assert not small.mapped and small.disk_gib == small.download_gib
    assert BIG.mapped and BIG.disk_gib == BIG.download_gib + BIG.copy_gib
    assert host_gib(small, 2)[0] > 2 * small.copy_gib


def test_the_link_is_read_from_the_table_of_nvidia_smi(monkeypatch):
    table = (
        "        GPU0    GPU1    CPU Affinity\nGPU0     X      PHB     0-31\nGPU1    PHB      X      0-31\n"
    )
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda *arguments: table)
    assert doctor.how_linked() == "PCIe through the host bridge (PHB)"
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda *arguments: table.replace("PHB", "NV18"))
    assert doctor.how_linked() == "NVLink (NV18)"


def test_gpus_are_read_from_nvidia_smi(monkeypatch):
    monkeypatch.setattr(
        doctor, "_nvidia_smi", lambda *arguments: "NVIDIA H200, 143771, 9.0\nNVIDIA H200, 143771, 9.0\n"
    )
    gpus = doctor.find_gpus()
    assert [gpu["name"] for gpu in gpus] == ["NVIDIA H200"] * 2
    assert gpus[0]["gib"] == pytest.approx(140.4, abs=0.1)


def test_the_token_is_never_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_thisIsSecret")
    text = doctor.as_text([doctor.check_token(BIG)])
    assert "present" in text
    assert "thisIsSecret" not in text


def test_small_shared_memory_warns(tmp_path, monkeypatch):
    usage = type("Usage", (), {"total": 64 * 2**20, "free": 64 * 2**20})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    assert doctor.check_shared_memory(2, tmp_path).verdict == WARN
    assert doctor.check_disk(TINY, tmp_path).verdict == FAIL


@pytest.mark.parametrize(("verdict", "status"), [(OK, 0), (WARN, 0), (FAIL, 1)])
def test_the_exit_status_says_whether_something_failed(monkeypatch, capsys, verdict, status):
    monkeypatch.setattr(
        doctor, "examine", lambda *arguments: [doctor.Check("thing", "found", verdict, "mend it")]
    )
    assert doctor.main() == status
    assert "mend it" in capsys.readouterr().out


def test_from_the_command_line():
    command = [sys.executable, "-m", "nbutils", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert "FAIL on" in done.stdout
    assert done.returncode in (0, 1)


def test_looking_at_gpus_does_not_start_cuda():
    code = "import sys; from nbutils import doctor; doctor.examine(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False).returncode == 0
