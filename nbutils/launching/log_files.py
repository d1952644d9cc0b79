"""Where a launch writes what its ranks say: a log and a folder of its own, also beside another launch."""

import contextlib
import fcntl
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


@contextlib.contextmanager
def own_log(wanted: Path) -> Iterator[tuple[Path, TextIO]]:
    """Open the log, empty, and hold it; if another launch holds it, take `name-2.log`, and so on.

    The lock lives as long as any process that writes to the file: ranks that outlive their launch hold it too.

    Args:
        wanted: its folder is made if missing; what an earlier launch has written there is replaced.

    Returns:
        A context with the path that was taken and the open file.

    Raises:
        OSError: it cannot be written.
    """
    wanted.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = wanted if number == 1 else wanted.with_stem(f"{wanted.stem}-{number}")
        with path.open("a", encoding="utf-8") as out:
            try:
                fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            except OSError:  # a file system without locks
                pass
            out.truncate(0)
            yield path, out
            return


def own_folder(log: Path) -> Path:
    """Make a new folder beside the log for the output and the error of each rank."""
    parent = log.with_name(log.stem + "_ranks")
    parent.mkdir(parents=True, exist_ok=True)
    now = time.strftime("%H%M%S", time.gmtime())
    for number in itertools.count(1):
        folder = parent / (now if number == 1 else f"{now}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("count has no end")
