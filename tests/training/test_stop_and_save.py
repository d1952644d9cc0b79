"""SIGTERM to one rank: all stop behind the same step, save, and end with 75; the run then ends as if never stopped."""

import json

import pytest
from training_runs import run, train
from transformers import TrainerControl

from nbutils.adapters.checkpoint_folder import checkpoints_in
from nbutils.common.exit_status import RESUME_ME
from nbutils.training.held_out_loss import TokenMeanTrainer
from nbutils.training.stop_and_save import StopEvaluation
from nbutils.training.trainer import ResumableTrainer

TWO_RANKS = [("fsdp1", 1, 2), ("fsdp2", 2, 2)]
# Checkpoints are off: what lies there was saved because it was asked for.
SETTINGS = {
    "save_strategy": "no",
    "eval_strategy": "steps",
    "eval_steps": 3,
    "eval_on_start": "false",
    "per_device_eval_batch_size": 1,
}
STOPS = {
    "in a step": ({"rank": 1, "term": 5}, 5),
    "in an evaluation": ({"rank": 0, "term_in_evaluation": 2}, 3),
}
CASES = [("fsdp1", "in a step"), ("fsdp1", "in an evaluation"), ("fsdp2", "in a step")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stops")
    plan = []
    for way, fsdp, world in TWO_RANKS:
        plan.append(run(folder, f"{way} whole", f"{way} whole", fsdp, world, **SETTINGS))
        for name, (stop, _) in ((name, STOPS[name]) for one, name in CASES if one == way):
            out = f"{way} {name}"
            plan.append(run(folder, f"{out} stopped", out, fsdp, world, stop, **SETTINGS))
            plan.append(run(folder, f"{out} went on", out, fsdp, world, **SETTINGS))
    return folder, train(folder, plan)


@pytest.mark.launch
@pytest.mark.parametrize(("way", "name"), CASES)
def test_all_ranks_save_and_say_resume_me(runs, way, name):
    folder, seen = runs
    stopped, step = seen[f"{way} {name} stopped"], STOPS[name][1]
    assert stopped["status"] == [RESUME_ME, RESUME_ME], stopped["output"]
    assert f"checkpoint-{step} is saved" in stopped["output"][0]
    assert [path.name for path in checkpoints_in(folder / f"{way} {name}")] == [f"checkpoint-{step}"]


@pytest.mark.launch
@pytest.mark.parametrize(("way", "name"), CASES)
def test_started_again_it_ends_as_if_it_had_never_stopped(runs, way, name):
    folder, seen = runs
    again = seen[f"{way} {name} went on"]
    assert again["status"] == [0, 0], again["output"]
    assert f"Resuming from {folder}/{way} {name}/checkpoint-{STOPS[name][1]}." in again["output"][0]
    ends = [json.loads((folder / out / "run.json").read_text()) for out in (f"{way} whole", f"{way} {name}")]
    assert ends[0]["adapter"]["sha256"] == ends[1]["adapter"]["sha256"]
    assert ends[0]["training"]["held_out_loss_after"] == ends[1]["training"]["held_out_loss_after"]


@pytest.mark.launch
def test_no_loss_is_called_that_of_the_beginning_where_none_was_measured(runs):
    """`eval_on_start: false` once printed the last held-out loss as the first: "4.847 -> 4.847"."""
    folder, seen = runs
    assert "held-out loss (not measured before) -> " in seen["fsdp1 whole"]["output"][0]
    training = json.loads((folder / "fsdp1 whole/run.json").read_text())["training"]
    assert training["held_out_loss_before"] is None


def test_an_evaluation_that_was_given_up_is_not_begun_again(monkeypatch):
    """The Trainer asks for it until it has ended; a second one draws random numbers, and a second save keeps them."""

    def give_up(*_, **__):
        raise StopEvaluation

    monkeypatch.setattr(TokenMeanTrainer, "evaluate", give_up)
    trainer = object.__new__(ResumableTrainer)
    trainer.control = TrainerControl(should_evaluate=True)
    assert trainer.evaluate() == {}
    assert trainer.control.should_save and trainer.control.should_training_stop
    assert not trainer.control.should_evaluate
