"""What is wrong with the rows: a row of the table is what is spoiled, and the words that refuse it."""

import json
import os

from bad_input.case import settings

GOOD = '{"prompt": "What is a shard?", "completion": "A slice."}\n'


def rows(text, name="rows.jsonl"):
    return lambda case: case.rows(text, name)


def long_questions_held_out(case):
    row = {"prompt": "What is a shard? " * 300, "completion": "A slice."}
    (case.folder / "heldout.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    case.settings["heldout_dataset"] = str(case.folder / "heldout.jsonl")


def pipe(case):
    os.mkfifo(case.folder / "rows.jsonl")
    case.settings["dataset"] = str(case.folder / "rows.jsonl")


CASES = {
    "no such file": (settings(dataset="no/such/file.jsonl"), r"There is no file no/such/file\.jsonl"),
    "no such set on the hub": (
        settings(dataset="nobody/nothing"),
        r"nobody/nothing is no file here, and the hub gives no",
    ),
    "empty set": (rows(""), r"holds no rows"),
    "wrong columns": (
        rows('{"question": "a", "answer": "b"}\n'),
        r"has the columns answer, question, .*Wanted: messages",
    ),
    "row that is no text": (
        rows(GOOD * 3 + '{"prompt": "a", "completion": 5}\n'),
        r"row 4: completion must be text, found int",
    ),
    "empty row": (rows(GOOD * 2 + '{"prompt": "a", "completion": " "}\n'), r"row 3: completion is empty"),
    "row without an answer": (
        rows(GOOD + '{"prompt": "a"}\n'),
        r"row 2: completion must be text, found NoneType",
    ),
    "broken line": (rows(GOOD * 5 + '{"prompt": "a", "comp\n' + GOOD), r"line 6: this is no JSON"),
    "damaged Parquet": (rows("PAR1 nonsense", "rows.parquet"), r"rows\.parquet cannot be read as parquet"),
    "a pipe in place of a file": (pipe, r"is a pipe or a device"),
    "rows longer than the context": (
        settings(max_length=4096),
        r"max_length is 4,096 tokens and the context of .* has 2,048",
    ),
    "no row keeps its answer": (
        settings(max_length=8),
        r"Every one of the \d+ rows is longer than max_length, 8 tokens",
    ),
    "no held-out row keeps its answer": (
        long_questions_held_out,
        r"Every one of the 2 held-out rows is longer than max_length, 256 tokens, .* no held-out loss",
    ),
}
