"""The instruction set of the course, and the loader that takes any of five forms."""

import json
import os
import re

import pyarrow.parquet
import pytest
from datasets import Dataset

from nbutils.common.paths import ROOT
from nbutils.data.rows import load_conversations
from nbutils.models.tiny import read_prose

DATA = ROOT / "data" / "instructions"
TURNS = [{"role": "user", "content": "What is a shard?"}, {"role": "assistant", "content": "A slice."}]
FORMS = {
    "messages": {"messages": TURNS},
    "prompt and completion": {"prompt": "What is a shard?", "completion": "A slice."},
    "prompt and completion as turns": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "alpaca": {"instruction": "What is a shard?", "input": "", "output": "A slice."},
}


def rows(name):
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def write(folder, name, content):
    path = folder / name
    path.write_text(content)
    return str(path)


def words(text):
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def overlap(a, b):
    """Jaccard: shared words over all words."""
    return len(a & b) / len(a | b)


def test_there_are_enough_conversations_and_the_topics_do_not_cross():
    train, heldout = rows("train"), rows("heldout")
    assert len(train) + len(heldout) >= 300
    assert not {row["topic"] for row in train} & {row["topic"] for row in heldout}
    assert all(row["source"] for row in train + heldout), "each fact names what supports it"


def test_no_near_duplicates_across_the_split():
    def bag(row):
        return words(" ".join(turn["content"] for turn in row["messages"] if turn["role"] != "system"))

    train = [bag(row) for row in rows("train")]
    closest = max(overlap(bag(row), other) for row in rows("heldout") for other in train)
    assert closest < 0.5, f"two conversations on the two sides share {closest:.0%} of their words"


def test_the_check_for_near_duplicates_can_fail():
    bags = [words("FSDP shards the parameters of a unit."), words("FSDP shards all parameters of a unit!")]
    assert overlap(*bags) >= 0.5


def test_prose_and_conversations_share_no_sentence():
    def sentences(text):
        return {s.strip() for s in re.split(r"(?<=[.?!])\s+", text) if len(s.split()) > 4}

    prose = set().union(*(sentences(paragraph) for part in read_prose() for paragraph in part))
    talk = [
        turn["content"] for name in ("train", "heldout") for row in rows(name) for turn in row["messages"]
    ]
    shared = prose & set().union(*(sentences(text) for text in talk))
    assert not shared


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_every_form_in_every_file_gives_the_same_turns(tmp_path, row, suffix):
    path = tmp_path / f"data{suffix}"
    data = Dataset.from_list([row, row])
    if suffix == ".parquet":
        data.to_parquet(str(path))
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for _ in range(2)))
    else:
        path.write_text(json.dumps([row, row]))
    for conversation in load_conversations(str(path)):
        assert (conversation.turns, conversation.learned) == (TURNS, [False, True])


def test_text_rows_stay_text(tmp_path):
    path = write(tmp_path, "data.jsonl", '{"text": "Some prose."}\n')
    assert load_conversations(path)[0].text == "Some prose."


def test_a_chat_of_several_answers_is_one_row(tmp_path):
    path = write(tmp_path, "data.jsonl", json.dumps({"messages": [*TURNS, *TURNS, TURNS[0]]}) + "\n")
    (conversation,) = load_conversations(path)
    assert conversation.learned == [False, True, False, True]
    assert conversation.turns == TURNS + TURNS, "what follows the last answer cannot be learned"
    assert conversation.question == TURNS[:1]
    assert conversation.left_out == {"turns after the last answer"}


def test_a_share_gpt_row_is_read(tmp_path):
    turns = [{"from": "human", "value": "What is a shard?"}, {"from": "gpt", "value": "A slice."}]
    path = write(
        tmp_path, "data.json", json.dumps([{"id": "a_0", "conversations": turns, "system": "Be brief."}])
    )
    (conversation,) = load_conversations(path)
    assert conversation.turns == [{"role": "system", "content": "Be brief."}, *TURNS]
    assert conversation.left_out == {"id"}


def test_a_turn_of_weight_0_is_asked_and_not_learned(tmp_path):
    """Public report: axolotl 1703."""
    turns = [*TURNS, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    turns[1] = {**turns[1], "weight": 0}
    turns[3] = {**turns[3], "weight": 1}
    path = write(tmp_path, "data.jsonl", json.dumps({"messages": turns}) + "\n")
    (conversation,) = load_conversations(path)
    assert conversation.learned == [False, False, False, True]
    assert conversation.turns[1] == {"role": "assistant", "content": "A slice."}


def test_history_and_system_of_an_alpaca_row_are_its_context(tmp_path):
    """Public report: LLaMA-Factory 3351."""
    row = {"instruction": "And the second?", "input": " ", "output": "Mimas.", "system": "You know moons."}
    row["history"] = [["Which moon is the largest?", "Titan."]]
    (conversation,) = load_conversations(write(tmp_path, "data.json", json.dumps([row])))
    assert [turn["content"] for turn in conversation.turns] == [
        "You know moons.", "Which moon is the largest?", "Titan.", "And the second?", "Mimas.",
    ]  # fmt: skip
    assert conversation.learned == [False, False, False, False, True]


@pytest.mark.parametrize("blank", [None, "", " ", "\n\t"])
def test_a_blank_alpaca_input_is_none(tmp_path, blank):
    """Public report: alpaca-lora 565."""
    row = {"instruction": "Say good morning.", "input": blank, "output": "Good morning.", "history": None}
    (conversation,) = load_conversations(write(tmp_path, "data.json", json.dumps([row])))
    assert conversation.turns[0]["content"] == "Say good morning."


# ---- files: as they are named, as they are now ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["set[1].jsonl", "set?.jsonl", "set*.jsonl", "a b.JSONL", "set[1].json", "[x].parquet"]
)
def test_the_file_that_was_named_is_read(tmp_path, name):
    """Public report: datasets 7468, which takes the name for a pattern."""
    for neighbour in ("set1.jsonl", "setx.jsonl", "set1.json", "x.parquet"):
        write(tmp_path, neighbour, '{"prompt": "Which?", "completion": "The neighbour."}\n')
    row = {"prompt": "Which?", "completion": "The one that was named."}
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / name)
    else:
        write(tmp_path, name, json.dumps(row) + "\n")
    (conversation,) = load_conversations(str(tmp_path / name))
    assert conversation.turns[-1]["content"] == "The one that was named."


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_a_file_is_read_as_it_is_now(tmp_path, ending):
    """Same size, same time stamp, other words: a cache that goes by those gives the old ones."""
    path = tmp_path / f"data.{ending}"
    for answer in ("Yes.", "Nay."):
        path.write_text(json.dumps({"prompt": "So?", "completion": answer}))
        os.utime(path, ns=(1, 1))
        assert load_conversations(str(path))[0].turns[-1]["content"] == answer


@pytest.mark.parametrize(
    "value", ["2024-03-01", "12:30:00", "1e5", "true", "null", "007", "2024-03-01T00:00:00Z"]
)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_text_stays_text(tmp_path, value, ending):
    rows = [{"prompt": f"Which {i}?", "completion": value} for i in range(3)]
    text = json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows))
    path = write(tmp_path, f"data.{ending}", text)
    assert {conversation.turns[-1]["content"] for conversation in load_conversations(path)} == {value}


def test_a_mark_before_the_first_byte_and_lines_in_a_json_file_are_read(tmp_path):
    (tmp_path / "data.json").write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "a", "completion": "b"}\n' * 2)
    assert len(load_conversations(str(tmp_path / "data.json"))) == 2


BAD = {
    "unknown columns": ("a.jsonl", '{"question": "x", "answer": "y"}', r"columns answer, question.*Wanted"),
    "a row that is not text": (
        "a.jsonl",
        '{"prompt": 3, "completion": "y"}',
        r"row 1: prompt must be text, found int",
    ),
    "an empty answer": ("a.jsonl", '{"prompt": "x", "completion": " "}', r"row 1: completion is empty"),
    "no assistant turn": (
        "a.jsonl",
        '{"messages": [{"role": "user", "content": "x"}]}',
        r"row 1: the conversation has no assistant turn",
    ),
    "an assistant turn at the beginning": (
        "a.jsonl",
        '{"messages": [{"role": "assistant", "content": "Welcome"}, {"role": "user", "content": "x"}, '
        '{"role": "assistant", "content": "y"}]}',
        r"row 1: the conversation begins with an assistant turn, which answers nothing\. Take that turn out",
    ),
    "a foreign role": (
        "a.jsonl",
        '{"messages": [{"role": "human", "content": "x"}]}',
        r"row 1: the role 'human' is not one of system, user, assistant",
    ),
    "a foreign file": ("a.csv", "a,b", r"ends in .csv; wanted .json, .jsonl or .parquet"),
    "no rows": ("a.json", "[]", r"holds no rows"),
    "a list of numbers": ("a.json", "[1, 2]", r"row 1: found int, wanted an object"),
    "a key that stands twice": (
        "a.jsonl",
        '{"prompt": "x", "completion": "y", "completion": "z"}',
        r"line 1: this is no JSON \(the key completion stands twice",
    ),
    "no answer that is learned": (
        "a.jsonl",
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]}',
        r"row 1: each of its answers is marked as not to be learned",
    ),
    "a weight between": (
        "a.jsonl",
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0.5}]}',
        r"weight is 0\.5: a turn is learned whole or not at all",
    ),
    "a user's turn to learn": (
        "a.jsonl",
        '{"messages": [{"role": "user", "content": "x", "train": true}, {"role": "assistant", "content": "y"}]}',
        r"train asks to learn the user turn",
    ),
    "several bad rows": (
        "a.jsonl",
        '{"prompt": "x", "completion": ""}\n' * 3,
        r"row 1: completion is empty\. Rows refused in all: 3",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=BAD.keys())
def test_bad_data_is_refused_with_a_sentence(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_conversations(write(tmp_path, name, content))


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"no file nowhere\.jsonl"):
        load_conversations("nowhere.jsonl")
