"""The dry run: a real launch at tiny shapes, its prediction on disk before the launch, its outcome told truly."""

import json

import pytest

from nbutils.dryrun import describe, dry_run, main
from nbutils.shapes import shape_of

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
    return folder, dry_run(
        TINY, config, length=64, steps=4, extra=settings, run_dir=folder, folder=folder, show=False
    )


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


def test_the_prediction_was_written_before_the_launch_and_knows_the_settings(trained):
    folder, result = trained
    prediction = folder / "prediction.json"
    assert json.loads(prediction.read_text()) == result["predicted"]
    assert prediction.stat().st_mtime < (folder / "ranks" / "rank0.jsonl").stat().st_ctime
    assert "head, pinned" in result["predicted"]["host"] and "loss" in result["predicted"]["moments"]


def test_host_memory_of_both_ranks_is_near_the_prediction(trained):
    _, result = trained
    assert result["predicted"]["host_bytes"] == pytest.approx(result["measured"]["host_bytes"], rel=0.5)


def test_a_run_that_fails_is_no_success(tmp_path, trained):
    folder, _ = trained
    out = tmp_path / "result.json"
    arguments = ["--model", "tiny", "--length", "64", "--steps", "3", "--folder", str(folder)]
    arguments += ["--run-dir", str(tmp_path), "--out", str(out), "--set", "lora_r=0"]
    assert main(arguments) == 1
    result = json.loads(out.read_text())
    assert result["outcome"] == "failed" and result["error"]
    assert result["measured"]["losses"] == []
