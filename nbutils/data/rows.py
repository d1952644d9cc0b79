"""Conversations from a file or the hub: to train on, and to hold out."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from nbutils.common.refused import Refused
from nbutils.data.columns import RowRefused
from nbutils.data.conversation import Conversation
from nbutils.data.files import read_rows
from nbutils.data.forms import conversation_of
from nbutils.data.held_out import (
    refuse_the_course_s_questions,
    refuse_the_same_source,
    split,
    without_those_of,
)


@dataclass
class Rows:
    """What a file holds: conversations, and the rows that cannot be trained on.

    Args:
        source: as it was named.
        conversations: one a row that is accepted.
        refused: the others, each with its row and its reason.
    """

    source: str
    conversations: list[Conversation] = field(default_factory=list)
    refused: list[RowRefused] = field(default_factory=list)


def look_through(source: str, ignore_columns: str | None = None) -> Rows:
    """Read every row, and keep what is wrong with one beside the others.

    Args:
        source: a .json, .jsonl or .parquet file, or a hub id; see `nbutils.data.files.read_rows`.
        ignore_columns: names of columns, or of keys of turns, that may be left out; separated by commas.

    Raises:
        FileNotFoundError: `source` looks like a file and is not there.
        ValueError: the file as a whole cannot be read, or holds no row.
    """
    ignored = frozenset(name.strip() for name in (ignore_columns or "").split(",") if name.strip())
    rows, number = Rows(source), 0
    for number, row in enumerate(read_rows(source), start=1):
        where = f"{source}, row {number}"
        try:
            rows.conversations.append(conversation_of(row, where, ignored))
        except RowRefused as problem:
            rows.refused.append(RowRefused(problem.kind, f"{where}: {problem}"))
    if not number:
        raise Refused(f"{source} holds no rows. Training needs at least one conversation.")
    return rows


def load_conversations(source: str, ignore_columns: str | None = None) -> list[Conversation]:
    """Load the conversations of a local file or of a set on the hub.

    Args:
        source: a .json, .jsonl or .parquet file, or a hub id; see `nbutils.data.files.read_rows`.
        ignore_columns: names of columns, or of keys of turns, that may be left out; separated by commas.

    Returns:
        A conversation for each row.

    Raises:
        FileNotFoundError: `source` looks like a file and is not there.
        ValueError: the file cannot be read, or a row cannot be trained on; the message says which, and why.
    """
    rows = look_through(source, ignore_columns)
    refuse_if_any(rows.refused)
    return rows.conversations


def refuse_if_any(refused: Iterable[RowRefused]) -> None:
    """Raise the first refusal, and say how many others there are.

    Raises:
        Refused: there is one.
    """
    refused = list(refused)
    if refused:
        others = f" Rows refused in all: {len(refused)}." if len(refused) > 1 else ""
        raise Refused(f"{refused[0]}{others}")


def train_and_heldout(
    source: str, heldout: str | None, ignore_columns: str | None = None, share: float = 0.05, seed: int = 0
) -> tuple[list[Conversation], list[Conversation]]:
    """Load what is trained on and what is held out; without a held-out source, split a share off.

    Whole conversations are held out. Those that share their first question and answer stay on one side.

    Args:
        source: where the training set is, see `load_conversations`.
        heldout: where the held-out set is, or None.
        ignore_columns: as for `load_conversations`.
        share: fraction of conversations held out if `heldout` is None; at least one.
        seed: of the shuffle before the split, the same on every rank.

    Returns:
        `(train, heldout)`.

    Raises:
        ValueError: as `load_conversations`; the two are one source; the held-out set is the course's and the training
            set is not; all of it is in the training set; or there is nothing to split.
    """
    if not heldout:
        return split(load_conversations(source, ignore_columns), source, share, seed)
    refuse_the_same_source(source, heldout)
    train = load_conversations(source, ignore_columns)
    refuse_the_course_s_questions(source, heldout)
    return train, without_those_of(train, load_conversations(heldout, ignore_columns), heldout)
