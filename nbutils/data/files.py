"""Read rows: from a local file as it is named and as it is now, or from a data set on the hub.

A local file is read here, by json or pyarrow, and not through `datasets`: that takes brackets in a name for a pattern,
keeps a copy that it believes by a time stamp, and makes a date of the text "2024-03-01".
"""

import json
from collections.abc import Iterator
from pathlib import Path

from nbutils.common.refused import Refused

ENDINGS = (".json", ".jsonl", ".parquet")
FORMS = (
    "messages or conversations (a list of turns), prompt + completion, text, "
    "or Alpaca rows (instruction, output and, if you like, input, system, history)"
)


def read_rows(source: str) -> Iterator[dict]:
    """Read the rows of a local file or of a data set on the hub, one after the other.

    Args:
        source: a .json, .jsonl or .parquet file; or a hub id, if you like with a split or with a configuration and a
            split: `owner/name`, `owner/name:test`, `owner/name:main:test`. Without a split it is `train`.

    Yields:
        A dict for each row, in the order of the file; values are as they stand there.

    Raises:
        FileNotFoundError: `source` looks like a file and is not there.
        ValueError: the file is of another type or broken, or the hub has no such set; the message says where.
    """
    if not refuse_unreadable(source, each_line=False):
        yield from _from_hub(source)
    elif Path(source).suffix.lower() == ".parquet":
        yield from _from_parquet(Path(source))
    else:
        yield from _from_json(Path(source))


def refuse_unreadable(source: str, each_line: bool = True) -> bool:
    """Refuse a local file that cannot be read as rows.

    Args:
        source: a file, or the id of a data set on the hub.
        each_line: look at each line of a .jsonl file.

    Returns:
        Whether `source` is a file.

    Raises:
        FileNotFoundError: `source` looks like a file and is not there.
        ValueError: it is a folder, a pipe, of another type, or a line of it is broken.
    """
    path = Path(source)
    if path.is_dir():
        raise Refused(f"{source} is a folder. Name one .json, .jsonl or .parquet file in it.")
    if path.suffix.lower() not in ENDINGS and not path.exists():
        return False
    if not path.exists():
        raise FileNotFoundError(
            f"There is no file {source}. Give a path from {Path.cwd().name}/ or an absolute one."
        )
    if not path.is_file():  # reading a pipe would wait for ever
        raise Refused(f"{source} is a pipe or a device. Name a file: every rank reads it from its start.")
    if path.suffix.lower() not in ENDINGS:
        raise Refused(f"{source} ends in {path.suffix or 'nothing'}; wanted .json, .jsonl or .parquet.")
    if each_line and path.suffix.lower() == ".jsonl":
        for _ in _from_lines(path):
            pass
    return True


def hub_name(source: str) -> tuple[str, str | None, str]:
    """Take `owner/name:configuration:split` apart; without a split it is `train`."""
    name, *rest = source.split(":")
    if len(rest) > 2:
        raise Refused(
            f"{source} has {len(rest) + 1} parts; wanted owner/name, name:split or name:config:split."
        )
    return name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train"


def _from_hub(source: str) -> Iterator[dict]:
    from datasets import load_dataset  # seconds to import, and only a hub set needs it

    name, configuration, split = hub_name(source)
    try:
        rows = load_dataset(name, configuration, split=split)
    except Exception as problem:  # datasets, the hub client and fsspec each raise their own
        raise Refused(
            f"{name} is no file here, and the hub gives no split {split} of a data set of this name "
            f"({type(problem).__name__}: {_first_line(problem)}). Look at the spelling; a file ends in .json, .jsonl "
            "or .parquet; a split is named as in owner/name:test; a private or gated set needs: hf auth login"
        ) from None
    yield from rows


def _from_parquet(path: Path) -> Iterator[dict]:
    import pyarrow.parquet

    try:
        with path.open("rb") as file:  # an open file, so that nothing in the name is a pattern
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowException as problem:
        raise Refused(_unreadable(path, "parquet", problem)) from None


def _from_json(path: Path) -> Iterator[dict]:
    """A list of objects; or an object a line, which some write under this name too."""
    if path.suffix.lower() == ".jsonl":
        yield from _from_lines(path)
        return
    try:
        rows = _parse(path.read_bytes())
    except ValueError as problem:
        if not str(problem).startswith("Extra data"):
            raise Refused(_unreadable(path, "json", problem)) from None
        yield from _from_lines(path)
        return
    rows = [rows] if isinstance(rows, dict) else rows
    if not isinstance(rows, list):
        raise Refused(f"{path}: found {type(rows).__name__}, wanted a list of objects with {FORMS}.")
    for number, row in enumerate(rows, start=1):
        yield _object(row, f"{path}, row {number}")


def _from_lines(path: Path) -> Iterator[dict]:
    found = False
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = _parse(line)
            except ValueError as problem:  # UnicodeDecodeError is one
                raise Refused(
                    f"{path}, line {number}: this is no JSON ({_first_line(problem)}). Wanted one object a line, in "
                    "UTF-8. Fix the line or take it out."
                ) from None
            yield _object(row, f"{path}, line {number}")
            found = True
    if not found:
        raise Refused(f"{path} holds no rows. Training needs at least one conversation.")


def _parse(content: bytes) -> object:
    return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_each_key_once)


def _each_key_once(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice} stands twice in one object, and one of the two would be lost")
    return found


def _object(row: object, where: str) -> dict:
    if not isinstance(row, dict):
        raise Refused(f"{where}: found {type(row).__name__}, wanted an object with {FORMS}.")
    return row


def _unreadable(path: Path, kind: str, problem: Exception) -> str:
    return (
        f"{path} cannot be read as {kind} ({type(problem).__name__}: {_first_line(problem)}). It is empty, cut short, "
        "or of another kind than its name says. Write or download it again."
    )


def _first_line(problem: BaseException) -> str:
    return next((line.strip() for line in str(problem).splitlines() if line.strip()), "no message")
