"""How an answer is judged: right, or why not. What was expected is not said, so that it cannot be copied."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

import torch

Judge = Callable[[object], str]  # the reader's answer -> "" if it is right, else why it is not
READ_AGAIN = "Read the section again, and work it out once more."


def equal_to(expected: Callable[[], object], wrong: Mapping[object, str] | None = None) -> Judge:
    """A judge that works out the right answer when it is asked, and knows what usual wrong answers come from.

    Args:
        expected: works out the right answer.
        wrong: a usual wrong answer -> what was overlooked.
    """

    def judge(yours) -> str:
        if same(yours, expected()):
            return ""
        return next((why for value, why in (wrong or {}).items() if same(yours, value)), READ_AGAIN)

    return judge


def digest(answer) -> str:
    """What is kept of an answer that cannot be worked out: a hash of its text, without regard to case and blanks."""
    return hashlib.sha256(str(answer).strip().casefold().encode()).hexdigest()[:16]


def hashed(kept: str, wrong: Mapping[object, str] | None = None) -> Judge:
    """A judge that knows the right answer by its `digest` only.

    Args:
        kept: the digest.
        wrong: a usual wrong answer -> what was overlooked.
    """

    def judge(yours) -> str:
        if digest(yours) == kept:
            return ""
        return next((why for value, why in (wrong or {}).items() if same(yours, value)), READ_AGAIN)

    return judge


def same(yours, expected) -> bool:
    """Whether two answers mean the same.

    Numbers may differ by half a percent, so that two decimals are enough. Texts are compared without regard to case and
    surrounding blanks, sequences without regard to their type, sets without regard to order.
    """
    if isinstance(expected, bool) or isinstance(yours, bool):
        return isinstance(yours, bool) and isinstance(expected, bool) and expected == yours
    if isinstance(expected, torch.Tensor):
        alike = isinstance(yours, torch.Tensor) and yours.shape == expected.shape
        return alike and torch.allclose(yours, expected)
    if isinstance(expected, int | float):
        return isinstance(yours, int | float) and math.isclose(yours, expected, rel_tol=5e-3)
    if isinstance(expected, str):
        return isinstance(yours, str) and yours.strip().casefold() == expected.strip().casefold()
    if isinstance(expected, Mapping):
        keys_alike = isinstance(yours, Mapping) and yours.keys() == expected.keys()
        return keys_alike and all(same(yours[key], expected[key]) for key in expected)
    if isinstance(yours, str):
        return False
    if isinstance(expected, set | frozenset):
        return isinstance(yours, Sequence | set | frozenset) and set(yours) == set(expected)
    if isinstance(expected, Sequence):
        alike = isinstance(yours, Sequence) and len(yours) == len(expected)
        return alike and all(same(a, b) for a, b in zip(yours, expected))
    return yours == expected


def shown(value) -> str:
    """An answer as the checker prints it."""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(map(shown, value)) + ")"
    if isinstance(value, torch.nn.Module):
        return type(value).__name__
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(str, value))) + "}"
    return str(value)
