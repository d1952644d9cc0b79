"""Check an answer: yours beside what is expected."""


def check(label: str, yours, expected) -> None:
    """Print *yours* beside *expected*, and stop if they differ.

    Args:
        label: what was asked for.
        yours: the reader's answer.
        expected: the right one; floats may differ by a part in a million.

    Raises:
        AssertionError: the answer is not right yet.
    """
    right = abs(yours - expected) <= 1e-6 * abs(expected) if isinstance(expected, float) else yours == expected
    print(f"{label}: yours {yours!r}, expected {expected!r}: {'OK' if right else 'not yet'}")
    assert right, f"{label}: not yet. Yours is {yours!r}, expected is {expected!r}."
