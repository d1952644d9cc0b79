"""Read an instruction set in any of four common forms and return it in one."""

import json
from pathlib import Path

from datasets import Dataset, load_dataset

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
FORMS = (
    "messages (a list of {role, content}), prompt + completion, text, "
    "or Alpaca rows (instruction, output and, if you like, input)"
)
ROLES = ("system", "user", "assistant")


def load_conversations(source: str, split: str = "train") -> Dataset:
    """Load conversations from a local file or a hub id, in the form TRL trains completions on.

    Args:
        source: a .json, .jsonl or .parquet file, or the id of a data set on the hub.
        split: the split to take of a hub data set. A local file has one split, `train`.

    Returns:
        A data set with the columns `prompt` and `completion`, each a list of `{"role", "content"}`, one row for each
        assistant turn; or with the one column `text` if that is what the source holds.

    Raises:
        FileNotFoundError: `source` looks like a file and is not there.
        ValueError: the file type, the columns or a row are not of a known form; the message says what was found.
    """
    rows = _read(source, split)
    if len(rows) == 0:
        raise ValueError(f"{source} holds no rows. Training needs at least one conversation.")
    columns = set(rows.column_names)
    if "messages" in columns:
        convert = _from_messages
    elif {"prompt", "completion"} <= columns:
        convert = _from_prompt_completion
    elif {"instruction", "output"} <= columns:
        convert = _from_alpaca
    elif "text" in columns:
        convert = _from_text
    else:
        raise ValueError(
            f"{source} has the columns {', '.join(sorted(columns))}, and none of the known forms has these. "
            f"Wanted: {FORMS}."
        )
    converted = []
    for number, row in enumerate(rows, start=1):
        try:
            converted += convert(row)
        except (TypeError, KeyError, ValueError) as problem:
            raise ValueError(f"{source}, row {number}: {problem}") from None
    return Dataset.from_list(converted)


def train_and_heldout(
    source: str, heldout: str | None, share: float = 0.05, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """Load the training set and the held-out set; without a held-out source, split a share off the training set.

    Args:
        source: where the training set is, see `load_conversations`.
        heldout: where the held-out set is, or None.
        share: fraction of rows held out if `heldout` is None; at least one row.
        seed: of the shuffle before the split, the same on every rank.

    Returns:
        `(train, heldout)`.

    Raises:
        ValueError: as `load_conversations`; or the set has fewer than two rows and cannot be split.
    """
    train = load_conversations(source)
    if heldout:
        return train, load_conversations(heldout)
    if len(train) < 2:
        raise ValueError(
            f"{source} has one row only, so nothing can be held out. Name a held-out set of its own."
        )
    parts = train.train_test_split(test_size=max(1, int(len(train) * share)), seed=seed)
    return parts["train"], parts["test"]


def refuse_unreadable(source: str) -> bool:
    """Refuse a local file that cannot be read as rows; look at each line of a .jsonl file.

    Args:
        source: a file, or the id of a data set on the hub.

    Returns:
        Whether `source` is a file.

    Raises:
        FileNotFoundError: `source` looks like a file and is not there.
        ValueError: it is a folder, a pipe, of another type, or a line of it is broken.
    """
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"{source} is a folder. Name one .json, .jsonl or .parquet file in it.")
    if path.suffix in READERS or path.exists():
        if not path.exists():
            raise FileNotFoundError(
                f"There is no file {source}. Give a path from {Path.cwd().name}/ or an absolute one."
            )
        if not path.is_file():  # reading a pipe would wait for ever
            raise ValueError(
                f"{source} is a pipe or a device. Name a file: every rank reads it from its start."
            )
        if path.suffix not in READERS:
            raise ValueError(
                f"{source} ends in {path.suffix or 'nothing'}; wanted .json, .jsonl or .parquet."
            )
        if path.suffix == ".jsonl":
            _refuse_a_broken_line(path)
        return True
    return False


def _read(source: str, split: str) -> Dataset:
    if refuse_unreadable(source):
        return _read_file(Path(source))
    try:
        return load_dataset(source, split=split)
    except Exception as problem:  # datasets, the hub client and fsspec each raise their own
        raise ValueError(
            f"{source} is no file here, and the hub gives no split {split} of a data set of this name "
            f"({type(problem).__name__}: {_first_line(problem)}). Look at the spelling; a file ends in .json, .jsonl "
            "or .parquet; a private or gated set needs: hf auth login"
        ) from None


def _read_file(path: Path) -> Dataset:
    try:
        return load_dataset(READERS[path.suffix], data_files=str(path), split="train")
    except Exception as problem:  # datasets wraps what pyarrow said into a sentence that names nothing
        cause = problem.__cause__ or problem
        raise ValueError(
            f"{path} cannot be read as {READERS[path.suffix]} ({type(cause).__name__}: {_first_line(cause)}). It is "
            "empty, cut short, or of another kind than its name says. Write or download it again."
        ) from None


def _refuse_a_broken_line(path: Path) -> None:
    """Each line on its own: the reader of datasets takes the file in blocks and cannot tell which line it was."""
    rows = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as problem:  # UnicodeDecodeError is one
                raise ValueError(
                    f"{path}, line {number}: this is no JSON ({_first_line(problem)}). Wanted one object a line, in "
                    "UTF-8. Fix the line or take it out."
                ) from None
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, line {number}: found {type(row).__name__}, wanted an object with {FORMS}."
                )
            rows += 1
    if not rows:
        raise ValueError(f"{path} holds no rows. Training needs at least one conversation.")


def _first_line(problem: BaseException) -> str:
    return next((line.strip() for line in str(problem).splitlines() if line.strip()), "no message")


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, found {type(value).__name__}.")
    if not value.strip():
        raise ValueError(f"{name} is empty.")
    return value


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _from_messages(row: dict) -> list[dict]:
    if not row["messages"]:
        raise ValueError("messages is empty.")
    if not isinstance(row["messages"], list):
        raise TypeError(f"messages must be a list, found {type(row['messages']).__name__}.")
    turns = []
    for turn in row["messages"]:
        if not isinstance(turn, dict):
            raise TypeError(f"each turn must be {{role, content}}, found {type(turn).__name__}.")
        if turn.get("role") not in ROLES:
            raise ValueError(f"the role {turn.get('role')!r} is not one of {', '.join(ROLES)}.")
        turns.append(_turn(turn["role"], _text(turn.get("content"), f"content of the {turn['role']} turn")))
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers or answers[0] == 0:
        raise ValueError(
            "the conversation has no assistant turn after a user turn, so there is nothing to train on."
        )
    return [{"prompt": turns[:i], "completion": [turns[i]]} for i in answers]


def _from_prompt_completion(row: dict) -> list[dict]:
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        return _from_messages({"messages": row["prompt"] + row["completion"]})[-1:]
    prompt, completion = _text(row["prompt"], "prompt"), _text(row["completion"], "completion")
    return [{"prompt": [_turn("user", prompt)], "completion": [_turn("assistant", completion)]}]


def _from_alpaca(row: dict) -> list[dict]:
    question = _text(row["instruction"], "instruction")
    if row.get("input"):
        question += "\n\n" + _text(row["input"], "input")
    return [
        {
            "prompt": [_turn("user", question)],
            "completion": [_turn("assistant", _text(row["output"], "output"))],
        }
    ]


def _from_text(row: dict) -> list[dict]:
    return [{"text": _text(row["text"], "text")}]
