"""Checkers for "Check yourself": they print yours beside expected."""

import math
from collections.abc import Mapping, Sequence

import torch


def check(label: str, yours, expected) -> None:
    """Compare an answer with the expected one, and print both.

    Numbers may differ by half a percent, so that two decimals are enough. Texts are compared without regard to case and
    surrounding blanks, sequences without regard to their type, sets without regard to order.

    Args:
        label: what was asked, a few words.
        yours: the reader's answer; `...` means that there is none yet.
        expected: the right answer.

    Raises:
        AssertionError: the answer is missing or is not the expected one.
    """
    if yours is ...:
        raise AssertionError(
            f"{label}: not answered yet. Put your answer where the `...` stands, and run the cell again."
        )
    right = _same(yours, expected)
    width = max(len(_show(yours)), len(_show(expected)), len("expected"))
    print(f"{'':{len(label)}}  {'yours':>{width}}  {'expected':>{width}}")
    print(f"{label}  {_show(yours):>{width}}  {_show(expected):>{width}}  {'OK' if right else 'not yet'}")
    if not right:
        raise AssertionError(
            f"{label}: found {_show(yours)}, expected {_show(expected)}. Read the section again."
        )


def _same(yours, expected) -> bool:
    if isinstance(expected, bool) or isinstance(yours, bool):
        return yours is expected or (isinstance(yours, bool) and bool(expected) == yours)
    if isinstance(expected, torch.Tensor):
        return (
            isinstance(yours, torch.Tensor)
            and yours.shape == expected.shape
            and torch.allclose(yours, expected)
        )
    if isinstance(expected, int | float):
        return isinstance(yours, int | float) and math.isclose(yours, expected, rel_tol=5e-3)
    if isinstance(expected, str):
        return isinstance(yours, str) and yours.strip().casefold() == expected.strip().casefold()
    if isinstance(expected, set | frozenset):
        return (
            isinstance(yours, Sequence | set | frozenset)
            and not isinstance(yours, str)
            and set(yours) == set(expected)
        )
    if isinstance(expected, Mapping):
        return (
            isinstance(yours, Mapping)
            and yours.keys() == expected.keys()
            and all(_same(yours[key], expected[key]) for key in expected)
        )
    if isinstance(expected, Sequence):
        return (
            isinstance(yours, Sequence)
            and not isinstance(yours, str)
            and len(yours) == len(expected)
            and all(_same(a, b) for a, b in zip(yours, expected))
        )
    return yours == expected


def _show(value) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(str, value))) + "}"
    return str(value)
