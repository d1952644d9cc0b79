"""The checker of "Check yourself": it says OK, or why an answer is not right, and never what was expected."""

from nbutils.lessons.answers import ANSWERS
from nbutils.lessons.answers_04_to_07 import EXPLAINED
from nbutils.lessons.judging import READ_AGAIN, same, shown


def check(what: str, yours, expected=...) -> None:
    """Judge an answer, and print it with OK or "not yet"; some right answers are explained.

    Args:
        what: the number of an exercise in `nbutils.lessons.answers`, as "03.2"; or, with `expected`, what was asked, in
            a few words.
        yours: the reader's answer; `...` means that there is none yet.
        expected: the right answer, where the notebook has just worked it out.

    Raises:
        AssertionError: the answer is missing or wrong; the message says why.
        KeyError: there is no exercise of this number.
    """
    if yours is ... or (isinstance(yours, tuple | list) and any(part is ... for part in yours)):
        raise AssertionError(
            f"{what}: not answered yet. Put your answer where the `...` stands, and run the cell again."
        )
    if expected is ...:
        why = ANSWERS[what](yours)
    else:
        why = "" if same(yours, expected) else READ_AGAIN
    print(f"{what}: yours is {shown(yours)}  {'not yet' if why else 'OK'}")
    if why:
        raise AssertionError(f"{what}: {shown(yours)} is not right. {why}")
    if what in EXPLAINED:
        print(EXPLAINED[what])
