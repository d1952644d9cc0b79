"""Held out is held out: whole conversations, nothing on both sides."""

import json
import shutil

import pytest

from nbutils.common.paths import ROOT
from nbutils.data.held_out import COURSE_HELDOUT, COURSE_ROWS, heldout_for
from nbutils.data.rows import train_and_heldout


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*pairs):
    turns = [
        {"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair)
    ]
    return {"messages": turns}


def plain(number):
    return {"prompt": f"question {number}", "completion": f"answer {number}"}


def test_a_share_is_held_out_the_same_way_each_time(tmp_path):
    path = write(tmp_path / "data.jsonl", [plain(i) for i in range(40)])
    first, second = train_and_heldout(path, None), train_and_heldout(path, None)
    assert [len(part) for part in first] == [38, 2]
    assert first == second


def test_no_answer_that_is_held_out_stands_in_training(tmp_path):
    """Chats that grow, as exports of a running chat do, branches of one chat, and equal rows."""
    rows = []
    for number in range(30):
        pairs = [(f"q{number}.{turn}", f"a{number}.{turn}") for turn in range(3)]
        rows += [chat(*pairs[:length]) for length in (1, 2, 3)]
        rows += [chat(pairs[0], (f"q{number}.x", f"a{number}.x")), chat(*pairs)]
    path = write(tmp_path / "data.jsonl", rows)
    for seed in range(20):
        train, heldout = train_and_heldout(path, None, share=0.2, seed=seed)
        learned = {turn["content"] for talk in train for turn in talk.turns}
        assert heldout and len(train) + len(heldout) == len(rows)
        assert not any(turn["content"] in learned for talk in heldout for turn in talk.turns)


def test_rows_that_are_all_the_same_cannot_be_split(tmp_path):
    path = write(tmp_path / "data.jsonl", [plain(0)] * 9)
    with pytest.raises(ValueError, match="rows that are all the same, so nothing can be held out"):
        train_and_heldout(path, None)


@pytest.mark.parametrize("spelling", ["data.jsonl", "./data.jsonl", "link.jsonl"])
def test_one_file_is_not_both(tmp_path, monkeypatch, spelling):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data.jsonl", [plain(i) for i in range(4)])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "data.jsonl")
    with pytest.raises(ValueError, match="is the training set as well"):
        train_and_heldout("data.jsonl", spelling)


def test_a_copy_of_the_file_is_refused_and_rows_on_both_sides_are_not_held_out(tmp_path, capsys):
    path = write(tmp_path / "data.jsonl", [plain(i) for i in range(4)])
    shutil.copy(path, tmp_path / "copy.jsonl")
    with pytest.raises(ValueError, match=r"Each of the 4 conversations in .* stands in the training set too"):
        train_and_heldout(path, str(tmp_path / "copy.jsonl"))
    other = write(tmp_path / "other.jsonl", [plain(i) for i in range(3, 6)])
    assert len(train_and_heldout(path, other)[1]) == 2
    assert "1 of 3 conversations in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("dataset", "heldout"),
    [
        ("owner/set", "owner/set"),
        ("owner/set:train", "owner/set"),
        ("owner/set:main:test", "owner/set:main:test"),
    ],
)
def test_one_split_of_a_hub_set_is_not_both(dataset, heldout):
    with pytest.raises(ValueError, match=r"is the training set as well: its split is .* Name another split"):
        train_and_heldout(dataset, heldout)


def test_a_split_of_a_hub_set_can_be_named(monkeypatch):
    asked = []

    def load(name, configuration, split):
        asked.append((name, configuration, split))
        return [{"prompt": f"{split} question {i}", "completion": "yes"} for i in range(3)]

    monkeypatch.setattr("datasets.load_dataset", load)
    train, heldout = train_and_heldout("owner/set", "owner/set:main:test")
    assert asked == [("owner/set", None, "train"), ("owner/set", "main", "test")]
    assert heldout[0].turns[0]["content"] == "test question 0" and len(train) == 3


def test_own_rows_never_meet_the_course_s_questions(tmp_path):
    own = write(tmp_path / "mine.jsonl", [plain(i) for i in range(4)])
    assert heldout_for(own, "") is None
    assert (ROOT / heldout_for(str(COURSE_ROWS), "")).samefile(COURSE_HELDOUT)
    assert heldout_for(str(COURSE_ROWS), own) == own
    with pytest.raises(ValueError, match="The held-out set is the course's"):
        train_and_heldout(own, str(COURSE_HELDOUT))


@pytest.mark.parametrize("file", sorted((ROOT / "configs/params").glob("*.yaml")), ids=lambda file: file.name)
def test_no_parameter_file_names_the_course_s_held_out_set(file):
    """README's command puts another `dataset` over the file's: a held-out set that stands there would stay."""
    assert "instructions/heldout" not in file.read_text()
