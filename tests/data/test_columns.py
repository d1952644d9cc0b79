"""Every column and every key of a turn in the ten public formats that people use most: used, or refused by name."""

import json

import pytest

from nbutils.data.columns import BOOKKEEPING, RowRefused, is_empty
from nbutils.data.forms import conversation_of

ASKED, TOLD = "What is a shard?", "A slice."
CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
SEARCH = {"type": "function", "function": {"name": "look_up", "description": "Looks a word up."}}


def openai(*more: dict, **keys) -> list[dict]:
    return [{"role": "user", "content": ASKED}, *more, {"role": "assistant", "content": TOLD, **keys}]


# Of each format a row in which every name stands with something in it.
FORMATS = {
    "ShareGPT": {
        "id": "a_0", "model": "some", "system": "Be brief.",
        "conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": TOLD}],
    },
    "OpenAI with tools": {
        "tools": [SEARCH], "parallel_tool_calls": False,
        "messages": openai(
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "name": "look_up", "content": "a slice"},
        ),
    },
    "OpenAI with weight and name": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": ASKED, "name": "ada"},
            {"role": "assistant", "content": "No.", "weight": 0, "function_call": {"name": "f"}, "refusal": "I cannot"},
            {"role": "user", "content": "Try."},
            {"role": "assistant", "content": TOLD, "weight": 1},
        ],
    },
    "Alpaca with history": {
        "instruction": ASKED, "input": "Of a model.", "output": TOLD, "system": "Be brief.",
        "history": [["Hello?", "Hello."]], "text": "Below is an instruction",
    },
    "DPO pairs": {"prompt": ASKED, "chosen": TOLD, "rejected": "A wholeness.", "score_chosen": 9, "margin": 3},
    "DPO pairs in turns": {"messages": openai(), "chosen": openai(), "rejected": openai()},
    "KTO": {"prompt": ASKED, "completion": "A wholeness.", "label": False},
    "prompt and completion": {"prompt": ASKED, "completion": TOLD, "system_prompt": "Be brief.", "context": "Models."},
    "text": {"text": "Some prose.", "title": "Prose", "url": "there", "timestamp": "2024-03-01"},
    "reasoning": {
        "reasoning": "Think of a glass.", "problem": "a", "solution": "b",
        "messages": openai(reasoning_content="A slice of glass.", thinking="A glass."),
    },
    "multimodal": {
        "images": ["a.png"], "videos": ["a.mp4"], "audios": ["a.wav"], "image": "b.png",
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": ASKED}]},
            {"role": "assistant", "content": [{"type": "text", "text": TOLD}]},
        ],
    },
    "weight of a row": {"messages": openai(train=True, loss=True), "weight": 0.5, "chat_template_kwargs": {"a": 1}},
    "nested": {"data": {"messages": openai()}, "conversation": {"turns": openai()}, "dialog": [ASKED, TOLD]},
    "question and answer": {"question": ASKED, "answer": TOLD, "choices": ["A slice.", "A whole."]},
}  # fmt: skip


def without(value, name):
    """The same row without a column or key of that name, wherever it stands."""
    if isinstance(value, dict):
        return {key: without(inner, name) for key, inner in value.items() if key != name}
    return [without(inner, name) for inner in value] if isinstance(value, list) else value


def names_in(value) -> set[str]:
    """Columns, and keys of turns; what lies deeper is part of what it stands in."""
    turns = [turn for column in value.values() if isinstance(column, list) for turn in column]
    return set(value) | {key for turn in turns if isinstance(turn, dict) for key in turn}


@pytest.mark.parametrize("name", FORMATS)
def test_each_name_is_used_or_refused_by_name(name):
    """Refused names are ignored one after the other, until the row is taken or none of its names is left."""
    row, refused = FORMATS[name], set()
    while True:
        try:
            conversation = conversation_of(row, name)
            break
        except RowRefused as problem:
            said = str(problem)
            named = {one for one in names_in(row) if one in said.replace(",", " ").split()}
            roles = {"role"} if "the role" in said or "parts" in said else set()
            assert named or roles or "must be text" in said, f"{said} names nothing of {names_in(row)}"
            if (
                any(words in said for words in ("none of the known forms", "is empty", "must be text"))
                or roles
            ):
                return  # the whole row is refused; the sentence names its columns, or the role
            refused |= named & {problem.kind.split()[-1]}
            assert refused, (problem.kind, said)
            row = without(row, problem.kind.split()[-1])
    text = json.dumps([conversation.turns, conversation.text], ensure_ascii=False)
    for column, value in row.items():
        used = all(part in text for part in texts_in(value)) or column in conversation.left_out
        assert used, f"{column} is neither used nor refused nor named as left out"
    assert conversation.left_out <= BOOKKEEPING


def texts_in(value) -> list[str]:
    """The texts that must stand in the turns: all, but for the names of roles and kinds."""
    if isinstance(value, str):
        return [] if value in ("human", "gpt", "text") else [value]
    if isinstance(value, dict):
        return [text for inner in value.values() for text in texts_in(inner)]
    return [text for inner in value for text in texts_in(inner)] if isinstance(value, list) else []


COLUMNS = sorted(set().union(*(set(row) for row in FORMATS.values())))


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("form", ["messages", "prompt", "alpaca", "text"])
def test_a_column_beside_any_form_is_used_or_refused_by_name(form, column):
    """Each column of the ten formats, with something in it, beside a good row of each form."""
    good = {
        "messages": {"messages": openai()},
        "prompt": {"prompt": ASKED, "completion": TOLD},
        "alpaca": {"instruction": ASKED, "output": TOLD},
        "text": {"text": "Some prose."},
    }[form]
    if column in good:
        return
    try:
        conversation = conversation_of({**good, column: "mark of this column"}, form)
    except RowRefused as problem:
        assert column in str(problem).replace(",", " ").split()
    else:
        text = json.dumps([conversation.turns, conversation.text])
        assert "mark of this column" in text or column in conversation.left_out


KEYS = [
    "reasoning_content", "thinking", "tool_calls", "function_call", "tool_call_id", "name", "refusal", "images",
    "audio", "annotations", "prefix", "citations", "metadata", "id",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("names", [("messages", "role", "content"), ("conversations", "from", "value")])
def test_a_key_of_a_turn_is_used_or_refused_by_name(key, names):
    column, role, content = names
    roles = ("user", "assistant") if role == "role" else ("human", "gpt")
    turns = [{role: roles[0], content: ASKED}, {role: roles[1], content: TOLD, key: ["something"]}]
    if key in BOOKKEEPING:
        assert conversation_of({column: turns}, "x").left_out == {key}
        return
    with pytest.raises(RowRefused, match=rf"the key of a turn {key} is not used: .* ignore_columns"):
        conversation_of({column: turns}, "x")
    assert conversation_of({column: turns}, "x", frozenset({key})).answers == 1
    assert conversation_of({column: without(turns, key)}, "x").answers == 1


@pytest.mark.parametrize("nothing", [None, "", " ", [], {}, {"function": None}, [None, ""]])
def test_a_name_without_anything_in_it_is_none(nothing):
    """Parquet files have every key in every row, filled with null."""
    assert is_empty(nothing)
    row = {
        "messages": openai(tool_calls=nothing, name=nothing),
        "tools": nothing,
        "chosen": nothing,
        "other": nothing,
    }
    assert conversation_of(row, "x").left_out == frozenset()
