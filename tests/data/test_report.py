"""`python -m nbutils data`: every number of the report counted a second time by other means."""

import argparse
import json
import random
import re
from pathlib import Path

import chats
import pytest

from nbutils.__main__ import main
from nbutils.data.commands import chosen, recorded_run
from nbutils.data.packs import padded
from nbutils.data.report import Batch, Speed, look_at_data
from nbutils.data.report_words import in_words, marked
from nbutils.models.loading import load_tokenizer
from nbutils.models.tiny import tiny_base

LENGTH = 1024


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(tiny_base()))


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """2,000 chats, and rows that are refused, cut, empty after the cut, or there twice."""
    rows = chats.share_gpt()
    rows += rows[:3]
    rows += [{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": ""}]}] * 2
    rows += [{"conversations": [{"from": "tool", "value": "Q"}, {"from": "gpt", "value": "A"}]}]
    talk = [{"from": "human", "value": "Count."}, {"from": "gpt", "value": ", ".join(map(str, range(600)))}]
    rows += [{"conversations": talk}]
    rows += [{"conversations": [{"from": "human", "value": "Why? " * 600}, {"from": "gpt", "value": "So."}]}]
    path = tmp_path_factory.mktemp("rows") / "chats.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def told(file, tokenizer):
    return look_at_data(str(file), tokenizer, LENGTH, Batch(4, 2, 2))


def test_the_chats_are_the_same_every_time_and_as_people_write():
    made = chats.share_gpt(200)
    assert made == chats.share_gpt(200) and made != chats.share_gpt(200, seed=1)
    assert len({json.dumps(chat["conversations"]) for chat in made}) == 200
    turns = [len(chat["conversations"]) // 2 for chat in made]
    assert min(turns) == 1 and max(turns) >= 5 and 1.5 < sum(turns) / 200 < 3


def test_the_numbers_are_those_of_a_second_count(file, told, tokenizer):
    """Each chat rendered whole by the tokenizer alone; answers counted in the file."""
    rows = [row["conversations"] for row in json.loads(file.read_text())]
    roles = {"human": "user", "gpt": "assistant"}
    good = [talk for talk in rows if all(turn["from"] in roles and turn["value"] for turn in talk)]
    whole = [
        tokenizer.apply_chat_template(
            [{"role": roles[turn["from"]], "content": turn["value"]} for turn in talk], return_dict=False
        )
        for talk in good
    ]
    lost = 1  # the question that fills max_length alone
    assert (told.rows, told.conversations, told.kept) == (len(rows), len(good), len(good) - lost)
    assert told.tokens == sum(min(len(ids), LENGTH) for ids in whole) - LENGTH * lost
    assert told.answers == sum(turn["from"] == "gpt" for talk in good for turn in talk)
    assert told.answers_cut == 2 and told.emptied == lost and told.duplicates == 3
    assert told.refused == {"content of the assistant turn is empty": 2, "role tool": 1}
    # An answer's tokens are its text's, and one that ends it; of the one that is cut, as many as fit.
    learned = [
        len(tokenizer(turn["value"], add_special_tokens=False)["input_ids"]) + 1
        for talk in good[:-2]
        for turn in talk
        if turn["from"] == "gpt"
    ]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Count."}], add_generation_prompt=True, return_dict=False
    )
    assert told.tokens_learned == sum(learned) + LENGTH - len(prompt)


def test_packs_and_steps(told):
    assert told.packed.fill > 0.95, "best fit leaves little empty in packs of a thousand rows"
    assert told.packed.rows == pytest.approx(told.tokens / LENGTH, rel=0.05)
    assert told.packed.steps == -(-told.packed.rows // 16) and told.padded.steps == -(-told.kept // 16)
    assert told.packed.tokens == told.tokens
    assert told.tokens < told.padded.tokens < LENGTH * told.kept
    assert told.padded.fill == pytest.approx(told.tokens / told.padded.tokens)


def test_padding_counted_by_hand():
    order = [1, 2, 3, 4, 5]
    random.Random(0).shuffle(order)
    assert order == [3, 2, 1, 5, 4]
    # Two ranks of two rows: [3, 2] and [1, 5] wait for the 5; then [4] is alone.
    made = padded([1, 2, 3, 4, 5], rows_a_rank=2, ranks=2)
    assert (made.steps, made.tokens, made.fill) == (2, 4 * 5 + 4, 15 / 24)


def test_in_words_says_the_same(told, tokenizer):
    words = in_words(told, tokenizer, Batch(4, 2, 2), Speed(1000))
    assert re.search(rf"tokens learned +{told.tokens_learned:,} \(", words)
    assert re.search(r"answers cut by max_length 1024 +2 \(0\.\d%\)", words)
    assert (
        f"{told.packed.tokens / 3.6e6:.2f} packed, {told.padded.tokens / 3.6e6:.2f} as they come, at least"
        in words
    )
    grouped = in_words(told, tokenizer, Batch(4, 2, 2), Speed(500, "grouped by length"))
    assert f"at 500 tokens/s: {told.tokens / 1.8e6:.2f} grouped by length\n" in grouped
    assert "2  content of the assistant turn is empty" in words and "chats.json, row 2004: content" in words
    bars = re.findall(r"^ +(?:\d[\d-]*|over 1,024) +([\d,]+)(?: #*)?$", words, re.MULTILINE)
    assert sum(int(bar.replace(",", "")) for bar in bars) == told.kept, "each row stands in one bar"
    assert words.count("[[") == 1 + len(told.first.answers), "one stands in the heading"
    assert marked(told.first, tokenizer).replace("[[", "").replace("]]", "") == tokenizer.decode(
        told.first.ids
    )


def test_the_command_prints_json_for_programs(file, capsys):
    assert main(["data", str(file), "--max-length", str(LENGTH), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    wanted = {
        "rows",
        "conversations",
        "tokens",
        "tokens_learned",
        "answers",
        "answers_cut",
        "refused",
        "packs",
    }
    assert wanted | {"packed_fill"} <= set(made)
    assert made["refused"] == {"content of the assistant turn is empty": 2, "role tool": 1}
    assert "hours" not in made, "no speed was given"


def test_a_file_of_which_nothing_is_left_ends_with_status_1(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": ""}\n')
    assert main(["data", str(path)]) == 1
    assert "completion is empty" in capsys.readouterr().out
    path.write_text("no json\n")
    assert main(["data", str(path)]) == 1
    assert "line 1: this is no JSON" in capsys.readouterr().err
    assert main(["data", str(path), "--model", str(tmp_path)]) == 1
    assert re.search(
        r"The tokenizer of .* cannot be used .*Wanted: tiny, tiny-plain", capsys.readouterr().err
    )
    assert main(["data", str(path), "--max-length", "0"]) == 1
    assert "--max-length is 0; wanted at least 1" in capsys.readouterr().err


def test_the_speed_of_a_record(tmp_path):
    speed, taken, config = recorded_run(Path("benchmarks/results/70b_fast_cap_b4_l2048.json"))
    assert speed > 1000 and taken is None and config["batch_size"] == 4
    own = {"rows": {"taken": "packed"}, "seq_len": 64, "batch_size": 3, "gradient_accumulation_steps": 2}
    (tmp_path / "own.json").write_text(json.dumps({"measured": {"tokens_per_second": 5}, "config": own}))
    assert recorded_run(tmp_path / "own.json") == (5, "packed", own)
    (tmp_path / "x.json").write_text('{"measured": {"tokens_per_second": null}}')
    with pytest.raises(ValueError, match=r"x\.json holds no tokens_per_second under measured"):
        recorded_run(tmp_path / "x.json")


def test_length_and_batch_are_the_records_unless_they_are_given(tmp_path, capsys):
    own = {"rows": {"taken": "packed"}, "seq_len": 64, "batch_size": 3, "gradient_accumulation_steps": 2}
    (tmp_path / "own.json").write_text(json.dumps({"measured": {"tokens_per_second": 5}, "config": own}))
    options = argparse.Namespace(
        max_length=None, per_device_train_batch_size=None, num_processes=4, gradient_accumulation_steps=None
    )
    assert chosen(options, own) == [64, 3, 4, 2]
    assert chosen(options, {}) == [2048, 4, 4, 1]
    rows = ["data", "data/instructions/train.jsonl", "--record", str(tmp_path / "own.json")]
    assert main(rows) == 0
    assert "answers cut by max_length 64" in (recorded := capsys.readouterr().out)
    assert main([*rows, "--max-length", "64", "--gradient-accumulation-steps", "2"]) == 0
    assert capsys.readouterr().out == recorded
