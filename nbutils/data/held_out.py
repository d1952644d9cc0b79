"""What is held out stays held out: no conversation, and no part of one, on both sides."""

import random
from collections import defaultdict
from pathlib import Path

from nbutils.common.paths import ROOT, from_here
from nbutils.common.ranks import rank
from nbutils.common.refused import Refused
from nbutils.data.conversation import Conversation
from nbutils.data.files import hub_name, refuse_unreadable

COURSE_ROWS = ROOT / "data" / "instructions" / "train.jsonl"
COURSE_HELDOUT = ROOT / "data" / "instructions" / "heldout.jsonl"


def heldout_for(dataset: str, named: str | None = None) -> str | None:
    """Which set is held out: the one that was named; for the course's own rows, the course's own.

    Args:
        dataset: what is trained on.
        named: a held-out set, or nothing.

    Returns:
        A source; or None, and a share of `dataset` is held out.
    """
    if named:
        return named
    return str(from_here(COURSE_HELDOUT)) if _is(dataset, COURSE_ROWS) else None


def refuse_the_same_source(dataset: str, heldout: str) -> None:
    """Refuse a held-out set that is the training set.

    Raises:
        Refused: they are one file, or one split of one set on the hub.
    """
    here = refuse_unreadable(dataset, each_line=False), refuse_unreadable(heldout, each_line=False)
    if all(here) and Path(dataset).samefile(heldout):
        raise Refused(
            f"{heldout} is the training set as well, and a loss on rows that were learned says nothing. Name another "
            "file, or none: then 5 % of the conversations are held out."
        )
    if not any(here) and hub_name(dataset) == hub_name(heldout):
        raise Refused(
            f"{heldout} is the training set as well: its split is {hub_name(heldout)[2]}. Name another split, as in "
            f"{hub_name(heldout)[0]}:test, or no held-out set: then 5 % of the conversations are held out."
        )


def refuse_the_course_s_questions(dataset: str, heldout: str) -> None:
    """Refuse the course's held-out questions beside somebody's own rows.

    Raises:
        Refused: a loss on them would say nothing of those rows.
    """
    if _is(heldout, COURSE_HELDOUT) and not _is(dataset, COURSE_ROWS):
        raise Refused(
            f"The held-out set is the course's, {heldout}, and the training set is {dataset}: the held-out loss would "
            "say nothing about your rows. Set heldout_dataset to a set of yours, or leave it empty: then 5 % of the "
            "conversations are held out."
        )


def without_those_of(
    train: list[Conversation], heldout: list[Conversation], source: str
) -> list[Conversation]:
    """Take out of a held-out set what the training set holds too, whole or as a beginning, and say how many.

    Raises:
        Refused: nothing is left.
    """
    known = {talk.key for talk in train}
    begun = {beginning for key in known for beginning in _beginnings(key)}
    kept = [talk for talk in heldout if talk.key not in begun and known.isdisjoint(_beginnings(talk.key))]
    if not kept:
        raise Refused(
            f"Each of the {len(heldout)} conversations in {source} stands in the training set too, and a loss on rows "
            "that were learned says nothing. Name another held-out set."
        )
    if len(kept) < len(heldout) and rank() == 0:
        print(
            f"{len(heldout) - len(kept)} of {len(heldout)} conversations in {source} stand in the training set too. "
            "They are not held out.",
            flush=True,
        )
    return kept


def split(
    conversations: list[Conversation], source: str, share: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Hold out a share of whole conversations; those that begin alike stay together.

    Args:
        conversations: all of them.
        source: their file, for the sentence.
        share: fraction to hold out; at least one conversation.
        seed: of the shuffle.

    Returns:
        `(train, heldout)`, each in the order of the file.

    Raises:
        Refused: they are fewer than two different conversations.
    """
    groups = families(conversations)
    if len(groups) < 2:
        raise Refused(
            f"{source} has one row only, or rows that are all the same, so nothing can be held out. Name a held-out "
            "set of its own."
        )
    random.Random(seed).shuffle(groups)
    wanted = max(1, int(len(conversations) * share))
    out: set[int] = set()
    for group in groups:
        if len(out) + len(group) <= wanted:
            out.update(group)
    if not out:  # every group is larger than what is wanted
        out.update(min(groups, key=len))
    train = [talk for i, talk in enumerate(conversations) if i not in out]
    return train, [talk for i, talk in enumerate(conversations) if i in out]


def families(conversations: list[Conversation]) -> list[list[int]]:
    """Group conversations that share their first question and answer: equal ones, longer ones, and branches.

    Returns:
        Lists of positions in `conversations`, in the order of their first ones.
    """
    members = defaultdict(list)
    for index, talk in enumerate(conversations):
        members[_first_exchange(talk.key)].append(index)
    return list(members.values())


def _first_exchange(key: tuple) -> tuple:
    """Up to the first assistant turn after a user turn."""
    asked = False
    for length, (role, _) in enumerate(key, start=1) if key[0] != "text" else ():
        if asked and role == "assistant":
            return key[:length]
        asked = asked or role == "user"
    return key


def _beginnings(key: tuple) -> list[tuple]:
    """The whole, and each part from the first turn on that ends in an answer."""
    if key[0] == "text":
        return [key]
    return [key[: i + 1] for i, (role, _) in enumerate(key) if role == "assistant"]


def _is(source: str, file: Path) -> bool:
    return Path(source).is_file() and Path(source).samefile(file)
