"""Kill a training, resume it, and end where the uninterrupted run ends; spoil a checkpoint, and see it named."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recording import record
from safetensors.torch import load_file, save_file
from training_runs import STEPS, run, train

from nbutils.adapters.checkpoint_folder import (
    MANIFEST,
    CheckpointError,
    checkpoints_in,
    delete_old,
    newest_complete,
    problem_with,
    rank_file,
    write_checkpoint,
)
from nbutils.adapters.export import export_adapter
from nbutils.adapters.lora_config import WEIGHTS
from nbutils.adapters.pieces import SaveError
from nbutils.common.paths import ROOT
from nbutils.training.resume import refuse_another_run

COMMAND = "python -m pytest -m matrix -s tests/adapters/test_checkpoint_folder.py"


def ending(out: Path) -> dict:
    """What must be equal at the end: every line of the log, and the adapter."""
    state = json.loads((out / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    seen = ("step", "loss", "grad_norm", "learning_rate", "mean_token_accuracy", "entropy", "num_tokens")
    lines = [
        {key: line[key] for key in seen if key in line} for line in state["log_history"] if "loss" in line
    ]
    result = json.loads((out / "run.json").read_text())
    return {
        "lines": lines,
        "after": result["training"]["held_out_loss_after"],
        "adapter": result["adapter"]["sha256"],
    }


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """All runs of this file: for each way an uninterrupted one, and one that is killed and resumed; and refusals."""
    folder = tmp_path_factory.mktemp("checkpoints")
    plan = []
    for name, fsdp, world, kill in (
        ("fsdp1", 1, 2, {"rank": 1, "step": 6}),  # after checkpoint 4, at the end of a pass over the data
        ("fsdp2", 2, 2, {"rank": 0, "torn": 3}),  # while checkpoint 6 is written: 4 is the newest
        ("plain", 1, 1, {"rank": 0, "step": 8}),  # after checkpoint 6, in the middle of a pass
    ):
        plan += [
            run(folder, f"{name} whole", name, fsdp, world),
            run(folder, f"{name} killed", f"{name}_killed", fsdp, world, kill),
            run(folder, f"{name} resumed", f"{name}_killed", fsdp, world, resume="true"),
        ]
    plan += [
        run(folder, "another version", "fsdp1", fsdp=2, resume="true"),
        run(folder, "another number", "fsdp1", world=1, resume="true"),
        run(folder, "without resume", "fsdp1", resume="false"),
    ]
    return folder, train(folder, plan)


@pytest.mark.launch
@pytest.mark.parametrize("way", ["fsdp1", "fsdp2", "plain"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_ends(trained, way):
    folder, seen = trained
    assert set(seen[f"{way} whole"]["status"]) == {0}, seen[f"{way} whole"]["output"]
    assert -9 in seen[f"{way} killed"]["status"]
    assert set(seen[f"{way} resumed"]["status"]) == {0}, seen[f"{way} resumed"]["output"]
    newest = {"fsdp1": 4, "fsdp2": 4, "plain": 6}[way]
    assert f"Resuming from {folder / way}_killed/checkpoint-{newest}." in seen[f"{way} resumed"]["output"][0]
    whole, resumed = ending(folder / way), ending(folder / f"{way}_killed")
    assert [line["step"] for line in whole["lines"]] == [3, 6]
    assert resumed == whole
    assert not list((folder / f"{way}_killed").glob(".checkpoint*"))


@pytest.mark.launch
def test_a_resume_that_would_not_be_the_same_run_is_refused(trained):
    _, seen = trained
    for name, words in {
        "another version": "fsdp_version was 1 and is 2",
        "another number": "world_size was 2 and is 1",
        "without resume": "of an earlier run. Go on from it with --resume true",
    }.items():
        assert set(seen[name]["status"]) == {1}, name
        assert all(words in output for output in seen[name]["output"]), name
        assert not any("Loading weights" in output for output in seen[name]["output"]), (
            name
        )  # in the first seconds


@pytest.fixture
def checkpoints(trained, tmp_path):
    """A copy of an uninterrupted run's four checkpoints, to be spoiled."""
    for checkpoint in checkpoints_in(trained[0] / "fsdp1"):
        shutil.copytree(checkpoint, tmp_path / "run" / checkpoint.name)
    return tmp_path / "run"


def cut(file):
    os.truncate(file, file.stat().st_size - 2)


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.launch
@pytest.mark.parametrize(
    "name", [rank_file(1), "rng_state_0.pth", "scheduler.pt", "trainer_state.json", MANIFEST]
)
@pytest.mark.parametrize("spoil", [cut, flip, Path.unlink])
def test_a_spoiled_file_is_named_and_the_checkpoint_before_it_used(checkpoints, capsys, name, spoil):
    if (name, spoil) == (MANIFEST, flip):
        return  # its last byte is the end of a line
    spoil(checkpoints / "checkpoint-8" / name)
    assert newest_complete(checkpoints).name == "checkpoint-6"
    assert f"checkpoint-8 cannot be used: {name} " in capsys.readouterr().out
    assert (checkpoints / "checkpoint-8").exists()


@pytest.mark.launch
def test_foreign_folders_are_passed_over(checkpoints, capsys):
    (checkpoints / "checkpoint-9").mkdir()  # as the plain Trainer would write it
    (checkpoints / "checkpoint-9" / "trainer_state.json").write_text("{}")
    (checkpoints / "checkpoint-best").mkdir()
    (checkpoints / ".checkpoint-10.unfinished").mkdir()
    assert newest_complete(checkpoints).name == "checkpoint-8"
    assert f"checkpoint-9 cannot be used: {MANIFEST} is missing" in capsys.readouterr().out
    for folder in checkpoints_in(checkpoints):
        (folder / MANIFEST).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="No complete checkpoint is left"):
        newest_complete(checkpoints)
    assert newest_complete(checkpoints / "nothing here") is None


@pytest.mark.launch
def test_the_last_good_checkpoint_is_never_deleted(checkpoints):
    cut(checkpoints / "checkpoint-8" / rank_file(0))
    delete_old(checkpoints, 2)
    assert [folder.name for folder in checkpoints_in(checkpoints)] == [
        "checkpoint-4",
        "checkpoint-6",
        "checkpoint-8",
    ]
    delete_old(checkpoints, 1)
    assert newest_complete(checkpoints).name == "checkpoint-6"
    delete_old(checkpoints, None)
    assert len(checkpoints_in(checkpoints)) == 2


@pytest.mark.launch
@pytest.mark.parametrize("way", ["fsdp1", "fsdp2", "plain"])
def test_export_makes_the_adapter_that_the_ranks_saved(trained, tmp_path, way):
    folder, _ = trained
    done = export_adapter(folder / way / f"checkpoint-{STEPS}", tmp_path / "adapter")
    saved, exported = load_file(folder / way / "adapter" / WEIGHTS), load_file(tmp_path / "adapter" / WEIGHTS)
    assert saved.keys() == exported.keys() and done["tensors"] == len(saved)
    assert all(
        torch.equal(saved[key], exported[key]) and saved[key].dtype == exported[key].dtype for key in saved
    )
    with pytest.raises(SaveError, match="exists already"):
        export_adapter(folder / way / f"checkpoint-{STEPS}", tmp_path / "adapter")


@pytest.mark.launch
def test_export_from_the_command_line_and_from_a_spoiled_checkpoint(checkpoints, tmp_path):
    command = [
        sys.executable,
        "-m",
        "nbutils",
        "export",
        str(checkpoints / "checkpoint-6"),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "tensors 56" in done.stdout
    flip(checkpoints / "checkpoint-6" / rank_file(1))
    with pytest.raises(CheckpointError, match="is not the file that was written"):
        export_adapter(checkpoints / "checkpoint-6", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_adapter_is_exported_from_a_checkpoint_of_any_name(tmp_path):
    key = "base_model.model.layer.lora_B.weight"

    def write(folder: Path) -> None:
        notes = {"pieces": json.dumps({key: {"shape": [2, 2], "start": 0}}), "notes": "{}"}
        save_file({f"adapter.{key}": torch.ones(2, 2)}, folder / rank_file(0), notes)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": 40}))

    write_checkpoint(tmp_path / "checkpoint-40", write, {"world_size": 1})
    (tmp_path / "checkpoint-40").rename(tmp_path / "the_best")
    assert export_adapter(tmp_path / "the_best", tmp_path / "adapter")["step"] == 40


@pytest.mark.launch
def test_each_rank_holds_its_own_part_and_nothing_of_the_base(trained):
    folder, _ = trained
    checkpoint = folder / "fsdp1" / f"checkpoint-{STEPS}"
    assert problem_with(checkpoint) is None
    adapter = sum(t.nbytes for t in load_file(folder / "fsdp1" / "adapter" / WEIGHTS).values())
    sizes = [(checkpoint / rank_file(number)).stat().st_size for number in range(2)]
    # The adapter, and two moments of the optimizer, in bf16; half of it each, and some names.
    assert all(3 * adapter / 2 < size < 3 * adapter / 2 * 1.5 for size in sizes)


def test_every_difference_to_the_run_that_wrote_is_named():
    written = {"world_size": 2, "seed": 0, "lora_r": 16}
    refuse_another_run(written, dict(written), Path("checkpoint-4"))
    with pytest.raises(CheckpointError, match="seed was 0 and is 1; lora_r was 16 and is 8"):
        refuse_another_run(written, {"world_size": 2, "seed": 1, "lora_r": 8}, Path("checkpoint-4"))


@pytest.mark.matrix
@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_moments(tmp_path):
    """Kill rank 0, rank 1 or both at random moments, 20 times over both versions of FSDP, resuming each time."""
    chance = random.Random(int(os.environ.get("KILL_SEED", "0")))
    kills = [
        {"rank": chance.choice([0, 1, None]), "seconds": round(chance.uniform(0.0, 1.5), 3)}
        for _ in range(10)
    ]
    kills += [{"rank": 0, "fsync": chance.randrange(1, 25)} for _ in range(4)]
    kills += [{"rank": 1, "fsync": chance.randrange(1, 9)} for _ in range(3)]
    kills += [{"rank": chance.choice([0, 1]), "torn": chance.randrange(1, 4)} for _ in range(3)]
    plan = [run(tmp_path, f"whole {fsdp}", f"whole_{fsdp}", fsdp) for fsdp in (1, 2)]
    for number, kill in enumerate(kills):
        fsdp = 1 + number % 2
        plan.append(run(tmp_path, f"{number} killed", f"out_{number}", fsdp, kill=kill))
        plan.append(run(tmp_path, f"{number} resumed", f"out_{number}", fsdp, resume="true"))
    seen = train(tmp_path, plan)
    rows = []
    for number, kill in enumerate(kills):
        out, resumed = tmp_path / f"out_{number}", seen[f"{number} resumed"]
        equal = set(resumed["status"]) == {0} and ending(out) == ending(tmp_path / f"whole_{1 + number % 2}")
        begun = [
            line
            for line in resumed["output"][0].splitlines()
            if line.startswith("Resuming") or "at step 0" in line
        ]
        rows.append(
            {
                "fsdp": 1 + number % 2,
                "kill": kill,
                "killed": seen[f"{number} killed"]["status"],
                "left_unfinished": seen[f"{number} killed"]["unfinished"],
                "resumed_from": begun[-1].rstrip(".").rsplit("/")[-1] if begun else None,
                "equal": equal,
            }
        )
        print(rows[-1])
    equal, inside = sum(row["equal"] for row in rows), sum(row["left_unfinished"] for row in rows)
    print(
        f"{len(rows)} kills, {inside} of them inside a checkpoint's writing; {equal} ended as the uninterrupted run"
    )
    record(
        "20 kills at random moments, and what the resumed runs ended with",
        f"RECORD=FILE {COMMAND}",
        rows=rows,
    )
    assert all(row["equal"] for row in rows)
    assert all(-9 in row["killed"] for row in rows)
    assert sum(row["left_unfinished"] for row in rows) >= 5
