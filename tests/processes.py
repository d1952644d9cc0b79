"""Processes that a test starts, looks for, and waits for."""

import signal
import time
from collections.abc import Callable
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


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Look ten times a second.

    Raises:
        AssertionError: it is not so after this many seconds.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"still waiting after {seconds} s"
        time.sleep(0.1)
