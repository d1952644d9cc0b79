"""A dry run on somebody's own rows: a real launch with a 70B file's settings; what it prints is counted again."""

import itertools
import json
import math
import re
import statistics
from pathlib import Path

import chats
import pytest
import yaml

from nbutils.common.paths import ROOT
from nbutils.common.refused import Refused
from nbutils.launching.dry_run import dry_run, main
from nbutils.launching.dry_run_params import of_goal, of_params
from nbutils.launching.dry_run_record import describe
from nbutils.launching.dry_run_rows import OwnRows, tokenizer_folder
from nbutils.launching.dry_run_settings import DryRun
from nbutils.models.loading import load_tokenizer
from nbutils.models.tiny import tiny_base
from nbutils.planning.memory_items import GIB, LIBRARIES_CPU
from nbutils.planning.memory_plan import plan
from nbutils.planning.run_setup import Choices, Setup
from nbutils.planning.shapes import SHAPES

PARAMS = ROOT / "configs/params/llama31_70b_2x24gb_fastest.yaml"
LENGTH = 256


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def dried(tmp_path_factory):
    """As a reader types it; layers are not compiled, which takes a minute. Folder, record, and what it says."""
    folder = tmp_path_factory.mktemp("dry")
    rows = write(folder / "chats.jsonl", chats.share_gpt(300))
    words = ["--params", str(PARAMS), "--model", "tiny", "--data", str(rows), "--max-length", str(LENGTH)]
    words += ["--per-device-train-batch-size", "2", "--max-steps", "4", "--set", "compile_layers=false"]
    words += ["--folder", str(folder), "--run-dir", str(folder / "run"), "--out", str(folder / "record.json")]
    status = main(words)
    record = json.loads((folder / "record.json").read_text())
    assert status == 0, record.get("error")
    return folder, record, describe(record)


@pytest.mark.launch
@pytest.mark.ci
def test_it_trains_on_the_rows_themselves_as_the_night_will(dried):
    folder, record, _ = dried
    settings = yaml.safe_load((folder / "run/train.yaml").read_text())
    assert settings["dataset"] == str(folder / "chats.jsonl") and settings["packing"] is True
    assert (settings["gradient_accumulation_steps"], settings["embeddings_on_host"]) == (2, True)
    assert settings["per_device_eval_batch_size"] == 2  # an evaluation of a batch as large is seen as well
    ours, theirs = (path / "tokenizer.json" for path in (folder / "run/model", tiny_base()))
    assert ours.read_bytes() == theirs.read_bytes()
    log = (folder / "run/train.log").read_text()
    own = record["config"]["rows"]
    assert f"285 rows, {own['tokens']:,} tokens; learned are" in log, "as the ranks counted them"
    assert (own["taken"], own["file"], own["heldout"]) == ("packed", "chats.jsonl", 4)
    assert str(folder) not in json.dumps(own)


@pytest.mark.launch
@pytest.mark.ci
def test_what_a_step_trains_on_is_text_and_no_padding(dried):
    """From the trainer's own count, step by step; the rows of a pack are real chats."""
    folder, record, _ = dried
    lines = [json.loads(line) for line in (folder / "run/train/progress.jsonl").read_text().splitlines()]
    totals = [line["num_tokens"] for line in lines if "num_tokens" in line and "loss" in line]
    assert len(totals) == 4
    measured = record["measured"]
    assert measured["tokens_a_step"] == [totals[2] - totals[1], totals[3] - totals[2]]
    full = 2 * 2 * 2 * LENGTH  # packs, ranks, passes
    assert all(0.8 * full < tokens <= full for tokens in measured["tokens_a_step"])
    assert measured["tokens_a_step"][0] != measured["tokens_a_step"][1]


@pytest.mark.launch
@pytest.mark.ci
def test_every_number_that_it_prints(dried):
    folder, record, said = dried
    ranks = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((folder / "run/ranks").glob("rank*.jsonl"))
    ]
    ends = [line["time"] for line in ranks[0] if line["phase"] == "step"]
    seconds = [round(after - before, 3) for before, after in itertools.pairwise(ends)]
    tokens = record["measured"]["tokens_a_step"]
    speed = statistics.median(count / taken for count, taken in zip(tokens, seconds[1:]))
    assert (
        f"steps {seconds}; {statistics.median(seconds[1:]):g} s a step, {speed:.1f} tokens/s over all ranks"
        in said
    )
    own = record["config"]["rows"]
    tokenizer, roles = load_tokenizer(str(tiny_base())), {"human": "user", "gpt": "assistant"}
    counts = [
        len(tokenizer.apply_chat_template(
            [{"role": roles[turn["from"]], "content": turn["value"]} for turn in chat["conversations"]],
            return_dict=False,
        ))
        for chat in chats.share_gpt(300)
    ]  # fmt: skip
    # 15 of 300 are held out: which ones, tests/whole/test_night_by_hand.py works out.
    assert (
        sum(sorted(min(n, LENGTH) for n in counts)[:285])
        <= own["tokens"]
        <= sum(min(n, LENGTH) for n in counts)
    )
    assert own["longest"] <= LENGTH and own["rows"] >= own["tokens"] / LENGTH
    assert (
        f"chats.jsonl, packed: {own['rows']} packs of {own['tokens']:,} tokens to train on, the longest of "
        f"{own['longest']}\n" in said
    )
    steps = math.ceil(math.ceil(own["rows"] / 4) / 2)
    assert f"an epoch: {steps} steps of about {own['tokens'] / steps:,.0f} tokens, " in said
    speed = round(
        speed, 1
    )  # as the record holds it; rounded again, 3,358.5 and 3,358.51 are two whole numbers
    assert f" {own['tokens'] / speed / 3600:.2f} hours at {speed:,.0f} tokens of text a second" in said
    between = {
        "load": ("load begins", "loaded"), "wrap": ("train begins", "wrapped"), "to_first_step": ("start", "step"),
        "total": ("start", "end"),
    }  # fmt: skip
    for name, (first, last) in between.items():
        moments = [{line["phase"]: line["time"] for line in reversed(lines)} for lines in ranks]
        assert f"{name} {round(max(rank[last] - rank[first] for rank in moments), 2)}" in said, name
    losses = [json.loads(line) for line in (folder / "run/train/progress.jsonl").read_text().splitlines()]
    assert f"losses {[line['loss'] for line in losses if 'loss' in line]}" in said
    asked = Choices(embeddings_on_host=True, accumulation=2, eval_batch=2, keeps_checkpoints=False)
    planned = plan(SHAPES["tiny"], Setup(2, 2, False), 2, LENGTH, choices=asked)
    host = planned.host_bytes - planned.host["Python and libraries"] + LIBRARIES_CPU
    assert re.search(rf"GPU peak allocated, a rank +{planned.gpu_peak_bytes / GIB:.2f} GiB +-", said)
    held = record["measured"]["host"]
    assert held["held"] == held["anonymous"] + held["shared"] == record["measured"]["host_bytes"]
    assert re.search(
        rf"host memory held, all ranks +{2 * host / GIB:.2f} GiB +{held['held'] / GIB:.2f} GiB", said
    )


@pytest.mark.launch
@pytest.mark.ci
def test_the_report_on_the_file_takes_its_hours_from_it(dried, capsys):
    from nbutils.__main__ import main as typed

    folder, record, _ = dried
    words = ["data", str(folder / "chats.jsonl"), "--max-length", str(LENGTH)]
    assert typed([*words, "--record", str(folder / "record.json"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    speed = record["measured"]["tokens_per_second"]
    assert told["hours"] == {"packed": round(told["tokens"] / speed / 3600, 3)}


def test_rows_are_planned_at_the_length_they_have():
    """Rows that are padded: the longest of them, not max_length. A pack may be full."""
    ahead = type("Ahead", (), {"rows": 9, "tokens": 90, "longest": 17, "heldout": 1})()
    ways = {
        "packed": {"packing": True},
        "grouped by length": {"train_sampling_strategy": "group_by_length"},
        "as they come": {},
    }
    for way, more in ways.items():
        own = OwnRows({"max_length": 64, **more}, ahead, SHAPES["tiny"], 2)
        assert own.taken == way and own.longest == (64 if way == "packed" else 17)


def test_rows_that_cannot_be_trained_on_are_refused_before_weights_are_made(tmp_path):
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": ""}] * 3)
    asked = DryRun(
        SHAPES["tiny"],
        data=rows,
        tokenizer=tiny_base(),
        run_dir=tmp_path / "run",
        folder=tmp_path / "weights",
    )
    with pytest.raises(ValueError, match="row 1: completion is empty"):
        dry_run(asked, show=False)
    assert not (tmp_path / "weights").exists()


def test_a_shape_has_no_tokenizer_and_says_so():
    with pytest.raises(Refused, match=r"llama31_70b is a shape without a tokenizer.*--tokenizer meta-llama"):
        tokenizer_folder(None, "llama31_70b")
    assert tokenizer_folder("tiny", "llama31_70b").name.startswith("tiny-")
    assert tokenizer_folder(None, str(tiny_base())) == tiny_base()


def test_a_file_of_parameters_says_what_the_night_will_do(tmp_path, monkeypatch):
    monkeypatch.setattr("nbutils.launching.dry_run_params.no_accelerator", lambda: False)
    options, pairs = of_params(PARAMS)
    assert options == {
        "model": "meta-llama/Llama-3.1-70B", "config": "configs/accelerate/config_fsdp2_offload.yaml",
        "num_processes": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_length": 2048,
        "lora_r": 16,
    }  # fmt: skip
    assert pairs == ["packing=true", "embeddings_on_host=true", "compile_layers=true"]
    assert of_goal(ROOT / "configs/goals/packed_2x24gb.yaml")[2:] == ["packing=true", "eval_packing=false"]
    monkeypatch.setattr("nbutils.launching.dry_run_params.no_accelerator", lambda: True)
    assert of_params(PARAMS)[0]["config"] == "configs/accelerate/rehearsal_fsdp2.yaml"
    (tmp_path / "mine.yaml").write_text("[1]\n")
    with pytest.raises(Refused, match=r"mine\.yaml holds list; wanted parameters"):
        of_params(tmp_path / "mine.yaml")


def test_what_is_typed_comes_before_the_file_of_parameters():
    from nbutils.launching.dry_run import _read

    typed = _read(["--params", str(PARAMS), "--max-length", "512", "--set", "packing=false"])
    assert (typed.max_length, typed.lora_r, typed.per_device_train_batch_size) == (512, 16, 4)
    assert typed.set[-1] == "packing=false" and typed.max_steps == 6, "steps are the dry run's own"
