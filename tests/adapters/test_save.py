"""Saving and verifying the adapter, in real process groups with real FSDP."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from packaging.version import Version
from recording import record

from nbutils.adapters.pieces import file_key
from nbutils.common.paths import ROOT

RANKS = ROOT / "tests" / "ranks"
PROCESSES = int(os.environ.get("SAVE_TEST_PROCESSES", "2"))
COMMAND = "python -m pytest -m matrix -s tests/adapters/test_save.py"
WAYS = ("fsdp1", "fsdp1_orig", "fsdp2")


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | more


def run_cases(folder: Path, processes: int, packages: Path | None = None) -> list[dict]:
    """Run tests/ranks/save_cases.py in one group of processes; what each rank saw.

    `packages` is a folder of packages to be used before the installed ones.
    """
    path = os.pathsep.join(filter(None, [packages and str(packages), environment()["PYTHONPATH"]]))
    logs = [(folder / f"log{number}").open("w") for number in range(processes)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANKS / "save_cases.py"), str(folder)],
            env=environment(RANK=str(number), WORLD_SIZE=str(processes), PYTHONPATH=path),
            stdout=logs[number],
            stderr=subprocess.STDOUT,
        )
        for number in range(processes)
    ]
    try:
        codes = [process.wait(timeout=600) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    tail = "\n".join((folder / f"log{n}").read_text()[-3000:] for n in range(processes))
    assert codes == [0] * processes, tail
    return [json.loads((folder / f"rank{number}.json").read_text()) for number in range(processes)]


@pytest.fixture(scope="session")
def seen(tmp_path_factory):
    """What each rank saw in all cases: one group of processes for the whole file."""
    return run_cases(tmp_path_factory.mktemp("save_cases"), PROCESSES)


def cases(seen, beginning=""):
    skip = ("peft", "tamper", "refuse")
    return [(k, v) for k, v in seen[0].items() if not k.startswith(skip) and k.startswith(beginning)]


def test_no_case_failed(seen):
    assert not {label: case["error"] for rank in seen for label, case in rank.items() if "error" in case}
    assert len(cases(seen)) == 38


def test_every_case_is_bit_identical_to_an_independent_gather(seen):
    assert {
        label: case["differing"] for label, case in cases(seen) if case["differing"] or not case["names"]
    } == {}


def test_the_ranks_agree_on_what_was_saved(seen):
    for label, case in cases(seen):
        assert all(rank[label]["report"] == case["report"] for rank in seen), label


def test_peft_loads_every_tensor_without_a_warning(seen):
    assert {
        label: case["not loaded"] for label, case in cases(seen) if case["not loaded"] or case["warnings"]
    } == {}


def test_the_reloaded_model_speaks_as_the_trained_one(seen):
    logits = {label: case["logits"] for label, case in cases(seen) if "logits" in case}
    assert len(logits) >= 10
    assert {label: result for label, result in logits.items() if result != "no error"} == {}


def test_saving_leaves_the_model_as_it_was_and_no_leftovers(seen):
    for label, case in cases(seen):
        assert case["unchanged by saving"], label
        assert case["leftovers"] == [], label


def test_counts_and_bytes(seen):
    for label, case in cases(seen):
        _, kind, dtype, *_ = label.split("/")
        wanted = {"lora": 7 * 2 * 2, "dora": 7 * 2 * 3, "modules_to_save": 7 * 2 * 2 + 1 + 5}[kind]
        assert case["report"]["tensors"] == case["keys"] == wanted, label
        assert case["report"]["dtypes"] == [dtype], label
        gathered = case["report"]["bytes_gathered"]
        if label.startswith("ddp"):
            assert gathered == 0, label
        elif label.startswith("fsdp1_mixed_units"):  # base and adapter cannot be told apart before the gather
            assert gathered > case["adapter_bytes"], label
        else:
            assert gathered == case["adapter_bytes"], label


@pytest.mark.parametrize("way", ["fsdp1", "fsdp2", "ddp"])
def test_verify_names_what_differs_on_every_rank(seen, way):
    for rank in seen:
        found = rank[f"tamper/{way}"]
        for spoiled in ("one bit", "missing"):
            assert found[spoiled].startswith("AdapterMismatch"), spoiled
            assert found["last name"] in found[spoiled], spoiled
        for spoiled, word in {
            "sign of zero": "differs",
            "foreign": "foreign is in",
            "zero": "1 of 14 lora_B are all zero",
            "dtype": "torch.bfloat16",
            "empty": "no tensor",
            "cut": "cannot be used",
        }.items():
            assert found[spoiled].startswith("AdapterMismatch"), spoiled
            assert word in found[spoiled], spoiled


@pytest.mark.parametrize("way", WAYS)
def test_a_bad_adapter_never_replaces_a_good_one(seen, way):
    for rank in seen:
        found = rank[f"refuse/{way}"]
        assert "14 of 14 lora_B are all zero" in found["untrained"]
        assert found["untrained, allowed"] == "no error"
        assert "NaN" in found["nan"]
        assert found["wrong slice"].startswith("AdapterMismatch")
        assert "No space left" in found["full disk"]
        assert found["still the first"]
        assert found["replaced"]
        assert found["previous"]


@pytest.mark.parametrize("way", WAYS)
def test_what_would_be_lost_is_refused(seen, way):
    found = seen[0][f"refuse/{way}"]
    assert "thesis.txt" in found["foreign folder"]
    assert found["thesis"]
    assert "norm.weight is trained" in found["stray"]
    if way != "fsdp2":  # FSDP 2 changes the model in place: there is no outer one
        assert "outermost" in found["inner model"]


@pytest.mark.launch
def test_the_plain_save_loses_the_adapter_and_ours_does_not(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "configs/accelerate/rehearsal_fsdp1.yaml")]
    command += ["-m", "nbutils.launching.rehearsal", str(RANKS / "plain_save.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["type"] == "DistributedType.FSDP"
    assert seen["ours"]["tensors"] == 7 * 2 * 2
    if Version(peft.__version__) >= Version("0.21"):
        assert (seen["plain bytes"], seen["plain tensors"]) == (40, 0)
        assert "no tensor at all" in seen["refused"]
    else:
        assert seen["plain"]["sha256"] == seen["ours"]["sha256"]


def test_names_in_the_file():
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    assert file_key(f"{prefix}.lora_A.default.weight") == f"{prefix}.lora_A.weight"
    assert file_key(f"{prefix}.lora_magnitude_vector.default.weight") == f"{prefix}.lora_magnitude_vector"
    assert (
        file_key("base_model.model.lm_head.modules_to_save.default.weight")
        == "base_model.model.lm_head.weight"
    )
    assert file_key("base_model.model.lm_head.original_module.weight") is None
    assert file_key(f"{prefix}.base_layer.weight") is None
    assert file_key(f"{prefix}.lora_A.other.weight") is None


def test_compare_logits_refuses_another_model_and_the_base():
    from nbutils.adapters.logits import compare_logits
    from nbutils.adapters.save import AdapterMismatch

    trained, base = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, 1.0]]])
    assert compare_logits(trained, trained, base, torch.float32)["base"] == 0.5
    with pytest.raises(AdapterMismatch, match="differ"):
        compare_logits(trained, trained + 0.5, base, torch.float32)
    with pytest.raises(AdapterMismatch, match="no difference"):
        compare_logits(trained, trained, trained, torch.float32)


def peft_packages(wanted: str) -> Path | None:
    """A folder with this version of peft, fetched once into runs/cache; None if it is the installed one."""
    if wanted == peft.__version__:
        return None
    folder = ROOT / "runs" / "cache" / f"peft-{wanted}"
    if not (folder / "peft").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, f"peft=={wanted}"], check=True)
    return folder


@pytest.mark.matrix
@pytest.mark.timeout(3600)
def test_the_matrix_of_saving(tmp_path):
    """Every case under two versions of peft and on 1, 2 and 4 processes, in one table. `COMMAND` prints it."""
    columns, table = [], {}
    for version in ("0.20.0", "0.21.2"):
        for processes in (1, 2, 4):
            folder = tmp_path / f"{version}_{processes}"
            folder.mkdir()
            found = run_cases(folder, processes, peft_packages(version))
            assert {rank["peft"] for rank in found} == {version}
            columns.append(f"peft {version}, {processes}")  # and so many processes
            for label, case in cases(found):
                good = (
                    not case["differing"]
                    and case["names"]
                    and not case["not loaded"]
                    and not case["warnings"]
                )
                same = all(rank[label].get("report") == case.get("report") for rank in found)
                table.setdefault(label, {})[columns[-1]] = "bit-identical" if good and same else "DIFFERENT"
    width = max(map(len, table))
    print("\n" + " " * width, *(f"{column:>15}" for column in columns))
    for label, row in table.items():
        print(f"{label:{width}}", *(f"{row.get(column, '-'):>15}" for column in columns))
    record("What is saved, bit for bit", f"RECORD=FILE {COMMAND}", columns=columns, table=table)
    assert {cell for row in table.values() for cell in row.values()} == {"bit-identical"}


def test_the_benchmark_fails_if_a_case_fails(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import saving_on_gpus

    monkeypatch.setattr(saving_on_gpus, "CASES", {"no such config": ("configs/accelerate/nope.yaml", {}, {})})
    words = ["saving_on_gpus.py", "--model", "tiny", "--commit", "abc", "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", words)
    assert saving_on_gpus.main() == 1
    assert "error" in json.loads((tmp_path / "out.json").read_text())["cases"]["no such config"]
    monkeypatch.setattr(sys, "argv", [*words, "--only", "another"])
    assert saving_on_gpus.main() == 0
