"""Processes that a test starts, looks for, and waits for."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil


def as_in_a_terminal() -> None:
    """For `preexec_fn`: the signals of a terminal do what they do there.

    `nohup` tells what it starts to ignore SIGHUP, and a shell's `&` SIGINT; the tests may run under either.
    """
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ranks_of(script: str | Path) -> list[psutil.Process]:
    """The processes of this machine whose command line names this script: the launcher and its ranks."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(script) in (p.info["cmdline"] or [])]


def kill_all_that_name(folder: Path) -> int:
    """Kill the processes whose command line names something in this folder, and all that they have started.

    Returns:
        How many there were: none, unless a test has failed before its end.
    """
    naming = [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.pid != os.getpid() and any(f"{folder}/" in word for word in process.info["cmdline"] or [])
    ]
    found = set(naming)
    for process in naming:
        with suppress(psutil.NoSuchProcess):
            found |= set(process.children(recursive=True))
    for process in found:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return len(found)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Look ten times a second.

    Raises:
        AssertionError: it is not so after this many seconds.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"still waiting after {seconds} s"
        time.sleep(0.1)
