"""The instruction set of the course, and the loader that takes any of four forms."""

import json
import re

import pytest
from datasets import Dataset

from nbutils.common.paths import ROOT
from nbutils.data.rows import load_conversations, train_and_heldout
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
    assert load_conversations(str(path))[0] == {"prompt": TURNS[:1], "completion": TURNS[1:]}


def test_text_rows_stay_text(tmp_path):
    path = write(tmp_path, "data.jsonl", '{"text": "Some prose."}\n')
    assert load_conversations(path).column_names == ["text"]


def test_each_assistant_turn_becomes_a_row(tmp_path):
    path = write(tmp_path, "data.jsonl", json.dumps({"messages": TURNS + TURNS}) + "\n")
    data = load_conversations(path)
    assert [len(row["prompt"]) for row in data] == [1, 3]


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
    "a foreign role": (
        "a.jsonl",
        '{"messages": [{"role": "human", "content": "x"}]}',
        r"row 1: the role 'human' is not one of system, user, assistant",
    ),
    "a foreign file": ("a.csv", "a,b", r"ends in .csv; wanted .json, .jsonl or .parquet"),
    "no rows": ("a.json", "[]", r"holds no rows|no data|empty"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=BAD.keys())
def test_bad_data_is_refused_with_a_sentence(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_conversations(write(tmp_path, name, content))


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"no file nowhere\.jsonl"):
        load_conversations("nowhere.jsonl")


def test_a_share_is_held_out_the_same_way_each_time(tmp_path):
    lines = "\n".join(json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) for i in range(40))
    path = write(tmp_path, "data.jsonl", lines)
    first, second = train_and_heldout(path, None), train_and_heldout(path, None)
    assert [len(part) for part in first] == [38, 2]
    assert first[1].to_list() == second[1].to_list()
