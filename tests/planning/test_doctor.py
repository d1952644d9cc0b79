"""The doctor: each check says OK, WARN or FAIL where it should, with something to do."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from nbutils.common import nvidia_smi, provenance, versions
from nbutils.common.paths import ROOT
from nbutils.launching.config_files import for_machine
from nbutils.models.loading import IN_MEMORY_BYTES
from nbutils.planning import doctor
from nbutils.planning.doctor import FAIL, OK, WARN
from nbutils.planning.memory_items import GIB
from nbutils.planning.memory_plan import CARDS
from nbutils.planning.model_needs import IN_MEMORY_GB, MODELS, host_gib, host_gib_resident

BIG, TINY = MODELS["llama31_70b"], MODELS["tiny"]
RTX3090 = {"index": 0, "name": "NVIDIA GeForce RTX 3090", "gib": 24.0, "capability": 8.6}


@pytest.mark.parametrize(
    ("python", "verdict"), [((3, 10), FAIL), ((3, 11), OK), ((3, 12), OK), ((3, 13), OK), ((3, 14), FAIL)]
)
def test_python(python, verdict):
    assert doctor.check_python(python).verdict == verdict


def test_packages_are_held_against_the_lock():
    found = {"torch": "2.13.0", "peft": "0.20.0", "trl": None}
    checks = doctor.check_packages({"torch": "2.13.0", "peft": "0.21.2", "trl": "1.16.0"}, found)
    assert [check.verdict for check in checks] == [OK, WARN, FAIL]
    assert "peft==0.21.2" in checks[1].fix
    assert "trl==1.16.0" in checks[2].fix


def test_on_gpus_the_torch_of_the_older_records_is_good_and_so_is_the_locks():
    records = [json.loads(file.read_text()) for file in (ROOT / "benchmarks/results").glob("*.json")]
    records = [
        record for record in records if isinstance(record["machine"], dict) and record["machine"]["gpus"]
    ]
    torches = {record["versions"]["torch"].partition("+")[0] for record in records}
    locked = doctor.locked_versions()
    assert torches == {doctor.RECORDED_ON_GPUS["torch"], locked["torch"]}
    checks = {
        version: doctor.check_packages(locked, {"torch": version}, on_gpus=True)[0]
        for version in ("2.11.0", locked["torch"], "2.12.0")
    }
    assert [check.verdict for check in checks.values()] == [OK, OK, WARN]
    assert checks[locked["torch"]].found == f"{locked['torch']}; as in the newer records on GPUs"
    assert checks["2.11.0"].found == "2.11.0; as in the older records on GPUs"


def test_the_lock_names_every_package_of_the_stack():
    assert {*versions.STACK, *versions.TOOLS} <= doctor.locked_versions().keys()


def test_no_gpu_is_a_warning_for_the_tiny_model_and_a_failure_for_the_big_one():
    assert [check.verdict for check in doctor.check_gpus(TINY, [])] == [WARN]
    assert [check.verdict for check in doctor.check_gpus(BIG, [])] == [FAIL]


def verdicts(model, gpus):
    return {check.what: check.verdict for check in doctor.check_gpus(model, gpus)}


def test_two_cards_of_24_gib_run_70b_with_offload_only():
    assert verdicts(BIG, [RTX3090] * 2)["GPU memory"] == WARN
    assert verdicts(BIG, [RTX3090 | {"gib": 48.0}] * 2)["GPU memory"] == OK
    assert verdicts(BIG, [RTX3090 | {"gib": 8.0}] * 2)["GPU memory"] == FAIL


def test_the_doctor_and_the_config_it_leads_to_agree_about_room():
    """Three cards of 24 GB: the plan fits to the last GiB, and PyTorch reserves more than it uses."""
    (memory,) = (c for c in doctor.check_gpus(BIG, [RTX3090] * 3) if c.what == "GPU memory")
    assert memory.verdict == WARN and "leaves 21.3 to PyTorch" in memory.found
    assert for_machine(3, CARDS[24]).fsdp_config["fsdp_offload_params"]


def test_with_one_gpu_the_tiny_model_is_rehearsed():
    one, two = (doctor.check_gpus(TINY, [RTX3090] * number)[0] for number in (1, 2))
    assert (one.verdict, two.verdict) == (WARN, OK)
    assert one.fix.endswith("CUDA_VISIBLE_DEVICES= make tutorial")


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
    four = host_gib(BIG, 4)[0]
    assert least < four < 1.3 * least  # four ranks share the weights as two do: each brings its own libraries


def test_with_little_host_memory_the_doctor_names_the_settings_that_need_little():
    recorded = json.loads((ROOT / "benchmarks/results/cap_21_gib/70b_resident_cap_b2_l2048.json").read_text())
    resident = host_gib_resident(BIG, 2)
    assert resident == pytest.approx(recorded["measured"]["host_bytes"] / GIB, rel=0.1)
    check = doctor.check_host_memory(BIG, 2, resident + 1, [RTX3090] * 2)
    assert check.verdict == WARN
    (file,) = re.findall(r"configs/\S+\.yaml", check.fix)
    assert yaml.safe_load((ROOT / file).read_text())["embeddings_on_host"]
    assert doctor.check_host_memory(BIG, 2, resident - 1, [RTX3090] * 2).verdict == FAIL
    for cards in ([], [RTX3090 | {"gib": 16.0}] * 2, [RTX3090, RTX3090 | {"gib": None}]):
        assert doctor.check_host_memory(BIG, 2, resident + 1, cards).verdict == FAIL
    assert doctor.check_host_memory(BIG, 1, resident + 1, [RTX3090]).verdict == FAIL


def test_a_small_model_is_quantised_by_each_rank_for_itself():
    small = MODELS["llama31_8b"]
    assert IN_MEMORY_GB * 1e9 == IN_MEMORY_BYTES  # the loader is too heavy to be asked by the doctor
    assert not small.mapped and small.disk_gib() == small.download_gib + 2
    assert BIG.mapped and BIG.disk_gib() == BIG.download_gib + BIG.copy_gib + 2
    assert host_gib(small, 2)[0] > 2 * small.copy_gib


def test_the_readme_says_the_disk_that_is_counted():
    """The lessons print it from the same function."""

    def rounded_up(gib):
        return f"{-(-gib * GIB // 5e9) * 5:.0f}"

    least, merged = rounded_up(BIG.disk_gib()), rounded_up(BIG.disk_gib(merge=True))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{least} GB of disk, or {merged} GB to merge as well" in text


def test_the_link_is_read_from_the_table_of_nvidia_smi(monkeypatch):
    table = (
        "        GPU0    GPU1    CPU Affinity\nGPU0     X      PHB     0-31\nGPU1    PHB      X      0-31\n"
    )
    monkeypatch.setattr(nvidia_smi, "_nvidia_smi", lambda *arguments: table)
    assert nvidia_smi.how_linked() == "PCIe through the host bridge (PHB)"
    monkeypatch.setattr(nvidia_smi, "_nvidia_smi", lambda *arguments: table.replace("PHB", "NV18"))
    assert nvidia_smi.how_linked() == "NVLink (NV18)"


def test_the_link_is_that_of_the_gpus_that_are_visible(monkeypatch):
    table = "\tGPU0\tGPU1\tGPU2\nGPU0\t X \tNV18\tSYS\nGPU1\tNV18\t X \tPIX\nGPU2\tSYS\tPIX\t X \n"
    monkeypatch.setattr(nvidia_smi, "_nvidia_smi", lambda *arguments: table)
    assert nvidia_smi.how_linked(0, 2) == "PCIe between two CPU sockets (SYS)"
    assert nvidia_smi.how_linked(2, 1) == "one PCIe switch (PIX)"
    monkeypatch.setattr(doctor, "find_gpus", lambda: [RTX3090 | {"index": index} for index in (1, 2)])
    (link,) = (check for check in doctor.check_gpus(TINY, doctor.find_gpus()) if check.what == "GPU link")
    assert link.found == "one PCIe switch (PIX)"


@pytest.fixture
def fake_nvidia_smi(tmp_path, monkeypatch):
    """Put a program in the place of nvidia-smi that prints these lines, whatever it is asked."""

    def prints(*lines: str) -> None:
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + "\nEND\n")
        (tmp_path / "nvidia-smi").chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return prints


FOUR_CARDS = [
    "NVIDIA H200, 143771, 9.0, GPU-aa00",
    "NVIDIA H200, 143771, 9.0, GPU-aa11",
    "NVIDIA GeForce RTX 3090, 24576, 8.6, GPU-bb22",
    "NVIDIA GeForce RTX 3090, 24576, 8.6, GPU-cc33",
]


def test_gpus_are_read_from_nvidia_smi(fake_nvidia_smi):
    fake_nvidia_smi(*FOUR_CARDS)
    gpus = doctor.find_gpus()
    assert [gpu["name"] for gpu in gpus] == ["NVIDIA H200"] * 2 + ["NVIDIA GeForce RTX 3090"] * 2
    assert gpus[0]["gib"] == pytest.approx(140.4, abs=0.1)
    fake_nvidia_smi("No devices were found")
    assert doctor.find_gpus() == []


def test_a_record_names_every_gpu_and_the_driver(fake_nvidia_smi, monkeypatch):
    fake_nvidia_smi(*(f"{line}, 580.1" for line in FOUR_CARDS))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(provenance, "no_accelerator", lambda: False)
    machine = provenance.machine()
    assert machine["gpus"] == ["NVIDIA H200 143771 MiB"] * 2 + ["NVIDIA GeForce RTX 3090 24576 MiB"] * 2
    assert machine["driver"] == "580.1"


@pytest.mark.parametrize(
    ("chosen", "seen"),
    [
        ("", []),
        ("-1", []),
        ("2", [2]),
        ("3, 1", [3, 1]),
        ("0,7,1", [0]),  # the list ends at the first entry that names no GPU
        ("0,-1,1", [0]),
        ("1,1", []),
        ("GPU-cc33,GPU-aa00", [3, 0]),
        ("GPU-b", [2]),
        ("GPU-bb,GPU-aa,GPU-cc", [2]),  # the second is the beginning of two UUIDs
        ("GPU-unknown,GPU-cc33", []),
    ],
)
def test_a_hidden_gpu_does_not_count(fake_nvidia_smi, monkeypatch, chosen, seen):
    fake_nvidia_smi(*FOUR_CARDS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert [gpu["index"] for gpu in doctor.find_gpus()] == seen


def test_a_mig_slice_counts_as_one_gpu_of_unknown_size(fake_nvidia_smi, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-0123,MIG-4567")
    fake_nvidia_smi(*FOUR_CARDS)
    assert [(gpu["name"], gpu["gib"]) for gpu in doctor.find_gpus()] == [("a MIG slice of NVIDIA H200", None)]
    fake_nvidia_smi("No devices were found")
    assert doctor.find_gpus() == []


def test_what_nvidia_smi_does_not_tell_is_said_to_be_unknown(fake_nvidia_smi, capsys):
    fake_nvidia_smi("NVIDIA GB10, [N/A], 12.1, GPU-aa00")
    doctor.main(["--model", "llama31_8b"])
    table = capsys.readouterr().out
    assert "1 x NVIDIA GB10, memory unknown" in table
    assert re.search(r"WARN GPU memory +unknown; needs [\d.]+ \(predicted\)", table)
    assert re.search(r"OK +bf16 +supported", table)
    fake_nvidia_smi("NVIDIA H100, [Insufficient Permissions], [N/A], GPU-aa00")
    assert verdicts(BIG, doctor.find_gpus()) == {"GPUs": WARN, "bf16": WARN, "GPU memory": WARN}
    assert verdicts(TINY, doctor.find_gpus()) == {"GPUs": WARN, "bf16": WARN}


def test_one_unknown_size_leaves_the_smallest_unknown_and_an_old_card_is_still_too_old(fake_nvidia_smi):
    fake_nvidia_smi(FOUR_CARDS[0], "NVIDIA GB10, [N/A], 7.5, GPU-dd44")
    assert verdicts(BIG, doctor.find_gpus()) == {"GPUs": OK, "bf16": FAIL, "GPU link": OK, "GPU memory": WARN}


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
        doctor, "examine", lambda *arguments: [doctor.Check("thing", "found", verdict, "fix it")]
    )
    assert doctor.main() == status
    assert "fix it" in capsys.readouterr().out


def test_from_the_command_line():
    command = [sys.executable, "-m", "nbutils", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert "FAIL on" in done.stdout
    assert done.returncode in (0, 1)


def test_looking_at_gpus_does_not_start_cuda():
    code = (
        "import sys; from nbutils.planning import doctor; doctor.examine(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False).returncode == 0
