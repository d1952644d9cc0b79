"""What a resume takes from the run that wrote the checkpoint, what it takes from its own settings, what it refuses."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import ReduceLROnPlateau
from training_runs import run, train
from transformers import get_scheduler

from nbutils.adapters.checkpoint_folder import CheckpointError, checkpoints_in, read_manifest
from nbutils.models import base_digest as digests
from nbutils.models.base_digest import base_digest
from nbutils.models.tiny import tiny_base
from nbutils.training.optimizer_state import optimizer_pieces, put_optimizer_back, put_schedule_back
from nbutils.training.resume import refuse_another_run
from nbutils.training.run_facts import rows_digest

KILL = {"rank": 0, "step": 6}  # checkpoint-4 is the newest
CHANGED = {"learning_rate": 5e-4, "max_steps": 12, "save_steps": 3, "logging_steps": 1, "resume": "true"}
# Case by case: the setting that the resumed run differs in, and how the refusal begins.
REFUSED = {
    "base": "base was ",
    "rows": "rows was ",
    "heldout": "heldout_rows was ",
    "max_length": "max_length was 64 and is 48",
    "masks": "completion_only_loss was None and is False",
    "batch": "per_device_train_batch_size was 2 and is 1",
    "accumulation": "gradient_accumulation_steps was 1 and is 2",
    "seed": "seed was 0 and is 1",
    "rank": "lora_r was 4 and is 8",
    "too few steps": "has 4 steps behind it, and max_steps is 3",
    "follows losses": "lr_scheduler_type was linear and is reduce_lr_on_plateau",
}


def another_base(folder: Path) -> Path:
    """The tiny base, and one weight of it moved by very little: same shapes, same name, same sizes of files."""
    shutil.copytree(tiny_base(), folder / "base")
    file = folder / "base" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name][0, 0] += 0.01
    save_file(tensors, file, metadata={"format": "pt"})
    return folder / "base"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs that are killed and go on with other settings, and one that goes on at its end."""
    folder = tmp_path_factory.mktemp("resume")
    base = another_base(folder)
    rows = [{"prompt": f"Question {n}?", "completion": f"Answer {n}."} for n in range(16)]
    (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = []
    for name, fsdp, world in (("fsdp1", 1, 2), ("fsdp2", 2, 2), ("plain", 1, 1)):
        plan.append(run(folder, f"{name} killed", name, fsdp, world, KILL))
    other = {
        "base": {"model": base},
        "rows": {"dataset": folder / "b.jsonl"},
        "heldout": {"heldout_dataset": folder / "b.jsonl"},
        "max_length": {"max_length": 48},
        "masks": {"completion_only_loss": "false"},
        "batch": {"per_device_train_batch_size": 1},
        "accumulation": {"gradient_accumulation_steps": 2},
        "seed": {"seed": 1},
        "rank": {"lora_r": 8},
        "too few steps": {"max_steps": 3},
        "follows losses": {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
    }
    plan += [run(folder, name, "plain", world=1, resume="true", **more) for name, more in other.items()]
    for name, fsdp, world in (("fsdp1", 1, 2), ("fsdp2", 2, 2), ("plain", 1, 1)):
        plan.append(run(folder, f"{name} changed", name, fsdp, world, **CHANGED))
    short = {"max_steps": 3, "save_steps": 3}  # a pass over the data takes 8 steps
    plan.append(run(folder, "short", "short", world=1, **short))
    plan.append(run(folder, "short again", "short", world=1, resume="true", **short))
    return folder, train(folder, plan)


@pytest.mark.launch
@pytest.mark.parametrize("case", REFUSED)
def test_what_may_not_change_is_refused_by_name(runs, case):
    _, seen = runs
    assert seen[case]["status"] == [1], seen[case]["output"]
    assert REFUSED[case] in seen[case]["output"][0], seen[case]["output"][0][-1500:]


@pytest.mark.launch
def test_it_is_refused_before_the_model_is_loaded(runs):
    _, seen = runs
    for case in REFUSED:
        said = seen[case]["output"][0]
        assert "refuse_before_loading" in said or "refuse_other_rows" in said, said[-1500:]


@pytest.mark.launch
@pytest.mark.parametrize("way", ["fsdp1", "fsdp2", "plain"])
def test_learning_rate_schedule_and_steps_change_on_a_resume(runs, way):
    folder, seen = runs
    result = seen[f"{way} changed"]
    assert set(result["status"]) == {0}, result["output"]
    assert "learning_rate was 0.002 and is 0.0005" in result["output"][0]
    history = json.loads((folder / way / "checkpoint-12/trainer_state.json").read_text())["log_history"]
    rates = {
        line["step"]: line["learning_rate"]
        for line in history
        if "learning_rate" in line and line["step"] > 4
    }
    # Warm-up of 2 steps, then in a line down to 0 after 12: the whole schedule is the new one.
    assert rates == pytest.approx({step: 5e-4 * (12 - (step - 1)) / 10 for step in range(5, 13)})
    assert [path.name for path in checkpoints_in(folder / way)] == [
        f"checkpoint-{n}" for n in (2, 4, 6, 9, 12)
    ]
    written = read_manifest(folder / way / "checkpoint-12")["facts"]["may_change"]
    assert (written["learning_rate"], written["max_steps"]) == (5e-4, 12)


@pytest.mark.launch
def test_a_run_that_goes_on_at_its_end_takes_no_further_step(runs):
    folder, seen = runs
    assert seen["short again"]["status"] == [0], seen["short again"]["output"]
    # The Trainer by itself would take a fourth step here.
    steps = [json.loads(line)["step"] for line in (folder / "short/progress.jsonl").read_text().splitlines()]
    assert max(steps) == 3
    first, again = (json.loads((folder / f"{name}.json").read_text()) for name in ("short", "short again"))
    said = [
        next(line for line in one["output"][0].splitlines() if "saved and verified" in line)
        for one in (first, again)
    ]
    assert said[0].split("-> ")[1] == said[1].split("-> ")[1]


@pytest.mark.launch
def test_the_progress_of_a_launch_begins_with_the_step_it_goes_on_from(runs):
    """So the time left is counted from the steps of this launch alone."""
    folder, _ = runs
    lines = [json.loads(line) for line in (folder / "plain/progress.jsonl").read_text().splitlines()]
    seconds = [math.inf, *(line["seconds"] for line in lines)]
    begins = [number for number in range(len(lines)) if seconds[number + 1] < seconds[number]]
    assert [lines[number]["step"] for number in begins] == [0, 4]


# ---- without a launch -----------------------------------------------------------------------------------------------


def stepped(learning_rate: float, kind: str, steps: int):
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=learning_rate, weight_decay=0.1)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=2, num_training_steps=10)
    for _ in range(steps):
        weight.grad = torch.ones(4)
        optimizer.step()
        scheduler.step(*[1.0] if isinstance(scheduler, ReduceLROnPlateau) else [])
    return optimizer, scheduler


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup", "inverse_sqrt"])
def test_a_schedule_goes_on_as_the_new_one_stands_at_that_step(kind):
    optimizer, scheduler = stepped(1e-2, kind, 5)
    tensors, notes = optimizer_pieces(optimizer)
    fresh, new = stepped(1e-3, kind, 0)
    put_optimizer_back(fresh, tensors, notes)
    put_schedule_back(new, scheduler.state_dict(), notes["groups"])
    assert fresh.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"] / 10)
    assert new.get_last_lr() == [fresh.param_groups[0]["lr"]]
    for one in (optimizer, fresh):
        one.step()
    scheduler.step()
    new.step()
    assert fresh.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"] / 10)


def test_a_schedule_that_follows_the_losses_comes_back_as_it_was():
    optimizer, scheduler = stepped(1e-2, "reduce_lr_on_plateau", 25)
    tensors, notes = optimizer_pieces(optimizer)
    fresh, new = stepped(1e-2, "reduce_lr_on_plateau", 0)
    put_optimizer_back(fresh, tensors, notes)
    put_schedule_back(new, scheduler.state_dict(), notes["groups"])
    assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] < 1e-2
    assert new.state_dict() == scheduler.state_dict()


def test_a_fact_that_an_older_version_did_not_note_is_named():
    with pytest.raises(CheckpointError, match="rows is not noted in it"):
        refuse_another_run({"world_size": 2}, {"world_size": 2, "rows": "0" * 64}, Path("checkpoint-4"))


def test_a_large_base_is_told_by_pieces_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "WHOLE", 0)
    monkeypatch.setattr(digests, "STRIDE", 4 * digests.PIECE)
    shutil.copytree(tiny_base(), tmp_path / "base")
    before = base_digest(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    size = file.stat().st_size
    for place in (0, 4 * digests.PIECE, size - 1):
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        shutil.copytree(tmp_path / "base", tmp_path / f"at{place}")
        (tmp_path / f"at{place}/model.safetensors").write_bytes(content)
    # The first byte belongs to the header: such a file is no checkpoint.
    assert base_digest(tmp_path / "at0") is None
    assert (
        base_digest(tmp_path / f"at{4 * digests.PIECE}") != before != base_digest(tmp_path / f"at{size - 1}")
    )


def test_rows_are_told_by_what_is_learned_and_by_their_order():
    rows = [
        {"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1]},
        {"input_ids": [4, 5], "completion_mask": [0, 1]},
    ]
    plain = rows_digest(Dataset.from_list(rows))
    assert plain == rows_digest(Dataset.from_list(rows))
    assert plain != rows_digest(Dataset.from_list(rows[::-1]))
    assert plain != rows_digest(Dataset.from_list([{**rows[0], "completion_mask": [0, 0, 1]}, rows[1]]))
