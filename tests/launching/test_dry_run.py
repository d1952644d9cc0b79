"""The dry run: a real launch at tiny shapes, its prediction on disk before the launch, its outcome told truly."""

import json

import pytest

from nbutils.launching.dry_run import describe, dry_run, main
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


def test_a_folder_that_no_dry_run_has_written_is_left_alone(tmp_path):
    adapter = tmp_path / "train" / "adapter" / "adapter_model.safetensors"
    adapter.parent.mkdir(parents=True)
    adapter.write_bytes(b"a night's work")
    with pytest.raises(FileExistsError, match=r"holds train, and no dry run has written it.*--run-dir"):
        dry_run(TINY, run_dir=tmp_path, folder=tmp_path / "weights", show=False)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [adapter]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.jsonl").write_text("my rows")
    with pytest.raises(FileExistsError, match=r"holds train\.jsonl"):
        dry_run(TINY, run_dir=tmp_path / "mine", folder=tmp_path / "weights", show=False)


def test_a_run_that_fails_is_no_success(tmp_path, trained):
    folder, _ = trained
    out = tmp_path / "result.json"
    (tmp_path / "prediction.json").write_text("{}")  # an earlier dry run wrote here: its folder is used again
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "progress.jsonl").write_text('{"step": 1, "max_steps": 1, "loss": 1.0}\n')
    arguments = ["--model", "tiny", "--length", "64", "--steps", "3", "--folder", str(folder)]
    arguments += ["--run-dir", str(tmp_path), "--out", str(out), "--set", "lora_r=0"]
    assert main(arguments) == 1
    result = json.loads(out.read_text())
    assert result["outcome"] == "failed" and result["error"]
    assert result["measured"]["losses"] == []
