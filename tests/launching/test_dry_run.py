"""The dry run: a real launch at tiny shapes, its prediction on disk before the launch, its outcome told truly."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from nbutils.common.paths import ROOT
from nbutils.launching.dry_run import dry_run, main
from nbutils.launching.dry_run_record import describe
from nbutils.launching.dry_run_settings import DryRun, write_settings
from nbutils.launching.random_weights import folder_name
from nbutils.planning.shapes import shape_of

pytestmark = pytest.mark.launch
TINY = shape_of("tiny")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry")
    settings = [
        "embeddings_on_host=true",
        "activation_checkpointing_kwargs={use_reentrant: false, offload: true}",
    ]
    config = "configs/accelerate/rehearsal_fsdp2.yaml"
    mine = folder / "mine.yaml"  # the reader's own config lies in the folder of the run
    mine.write_text((ROOT / config).read_text())
    settings += ["max_length=64", "gradient_accumulation_steps=2"]
    changes = ["fsdp_reshard_after_forward=false"]
    asked = DryRun(TINY, mine, steps=4, extra=settings, changes=changes, run_dir=folder, folder=folder)
    return folder, dry_run(asked, show=False)


def test_it_trains_the_real_script_and_records_what_ran(trained):
    _, result = trained
    assert result["outcome"] == "ok", result.get("error")
    ran = result["measured"]["run"]["training"]
    assert (ran["distributed_type"], ran["fsdp_version"], ran["world_size"]) == ("FSDP", 2, 2)
    assert (
        len(result["measured"]["losses"]) == 4
        and result["measured"]["losses"][-1] < result["measured"]["losses"][0]
    )
    assert result["measured"]["tokens_per_second"] > 0
    assert result["config"]["settings"][0] == "embeddings_on_host=true"
    assert "accelerate launch" in result["command"] and "tokens/s" in describe(result)


def test_what_is_set_is_planned_and_counted(trained):
    """A setting of the script that decides about memory and speed is no other by which way it came."""
    _, result = trained
    ran = result["config"]
    assert (ran["seq_len"], ran["gradient_accumulation_steps"]) == (64, 2)
    asked = DryRun(TINY, extra=("max_length=64", "gradient_accumulation_steps=2", "lora_r=4"))
    assert (asked.length, asked.lora_r, asked.tokens_a_step(ranks=2)) == (64, 4, 2 * 2 * 64)
    seconds, speed = result["measured"]["step_seconds"], result["measured"]["tokens_per_second"]
    assert speed == pytest.approx(2 * 2 * 64 / seconds, rel=0.01)
    with pytest.raises(ValueError, match=r"max_length=None: a dry run counts with it; wanted a whole number"):
        DryRun(TINY, extra=("max_length=null",))


def test_rows_are_enough_for_every_step(tmp_path):
    settings = write_settings(DryRun(TINY, steps=5, batch=2, accumulation=3), tmp_path, tmp_path, ranks=2)
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 5 * 2 * 3 * 2
    assert (settings["gradient_accumulation_steps"], settings["max_steps"]) == (3, 5)


def test_a_changed_config_is_a_copy(trained):
    folder, result = trained
    assert (folder / "mine.yaml").read_text() == (
        ROOT / "configs/accelerate/rehearsal_fsdp2.yaml"
    ).read_text()
    assert "fsdp_reshard_after_forward: false" in Path(result["config"]["accelerate_config"]).read_text()


def test_two_models_of_one_name_do_not_share_weights():
    assert folder_name(TINY) != folder_name(replace(TINY, intermediate=1280))
    assert folder_name(TINY) != folder_name(replace(TINY, tied=True))
    assert folder_name(TINY) == folder_name(replace(TINY))


def test_a_dry_run_has_no_time_limit_of_its_own():
    """70B on two 3090s loads for longer than any default that fits a faster machine."""
    assert DryRun(TINY).timeout == math.inf


def test_the_prediction_was_written_before_the_launch_and_knows_the_settings(trained):
    folder, result = trained
    prediction = folder / "prediction.json"
    assert json.loads(prediction.read_text()) == result["predicted"]
    assert prediction.stat().st_mtime < (folder / "ranks" / "rank0.jsonl").stat().st_ctime
    assert "head, pinned" in result["predicted"]["host"] and "loss" in result["predicted"]["moments"]


def test_host_memory_of_both_ranks_is_near_the_prediction(trained):
    _, result = trained
    assert result["predicted"]["host_bytes"] == pytest.approx(result["measured"]["host_bytes"], rel=0.5)


def test_a_folder_that_no_dry_run_has_written_is_left_alone(tmp_path):
    adapter = tmp_path / "train" / "adapter" / "adapter_model.safetensors"
    adapter.parent.mkdir(parents=True)
    adapter.write_bytes(b"a night's work")
    with pytest.raises(FileExistsError, match=r"holds train, and no dry run has written it.*--run-dir"):
        dry_run(DryRun(TINY, run_dir=tmp_path, folder=tmp_path / "weights"), show=False)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [adapter]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.jsonl").write_text("my rows")
    with pytest.raises(FileExistsError, match=r"holds train\.jsonl"):
        dry_run(DryRun(TINY, run_dir=tmp_path / "mine", folder=tmp_path / "weights"), show=False)


def test_a_run_that_fails_is_no_success(tmp_path, trained):
    folder, _ = trained
    out = tmp_path / "result.json"
    (tmp_path / "prediction.json").write_text("{}")  # an earlier dry run wrote here: its folder is used again
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "progress.jsonl").write_text('{"step": 1, "max_steps": 1, "loss": 1.0}\n')
    arguments = ["--model", "tiny", "--max-length", "64", "--max-steps", "3", "--folder", str(folder)]
    arguments += ["--run-dir", str(tmp_path), "--out", str(out), "--set", "lora_r=0"]
    assert main(arguments) == 1
    result = json.loads(out.read_text())
    assert result["outcome"] == "failed" and result["error"]
    assert result["measured"]["losses"] == []
