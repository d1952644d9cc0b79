"""Intended failures: a lesson shows an error, and says so when a newer stack no longer raises it."""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class LessonObsolete(AssertionError):
    """A failure that a lesson teaches did not happen, or happened in other words."""


@contextmanager
def expect_failure(error: type[BaseException], message: str, lines: int = 2) -> Iterator[None]:
    """Run a block that must fail with this error, and print the last lines of its traceback.

    Args:
        error: the exception class that must be raised.
        message: a regular expression that the message must contain.
        lines: how many frames of the traceback to print, innermost last.

    Raises:
        LessonObsolete: nothing was raised, or something else was.
    """
    try:
        yield
    except error as caught:
        if not re.search(message, str(caught)):
            raise LessonObsolete(
                f"Lesson obsolete: {error.__name__} was raised as expected, but with other words. Wanted a message "
                f"matching {message!r}, found {str(caught)!r}. Read the installed version's source and fix the lesson."
            ) from caught
        frames = traceback.extract_tb(caught.__traceback__)
        for frame in frames[len(frames) - lines :]:
            print(f"  in {frame.name}(), {_place(frame.filename)}, line {frame.lineno}")
        print(f"{type(caught).__name__}: {caught}")
    else:
        raise LessonObsolete(
            f"Lesson obsolete: {error.__name__} with a message matching {message!r} was expected, and nothing was "
            "raised. The installed stack no longer fails here. Say so in the lesson, with the version."
        )


def _place(path: str) -> str:
    """A file as a reader knows it, without the folders of this machine."""
    return path.rsplit("site-packages/")[-1] if "site-packages/" in path else path.rsplit("/", 1)[-1]
