"""The processes of a launch: the launcher, the ranks it has started, and whatever these have started."""

import ctypes
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import psutil

GRACE = 3.0  # seconds a process has to end by itself before it is killed

_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Runs in the launcher before it begins: if the kernel of the notebook dies, the launcher gets SIGTERM."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class ProcessTree:
    """Every process that the launcher has started, directly or not, as long as it lives.

    A process is remembered by its id and its time of creation, which psutil compares: after two days the id alone may
    be somebody else's.

    Args:
        launcher: the process of `accelerate launch`.
    """

    def __init__(self, launcher: subprocess.Popen):
        self.launcher = launcher
        self.root = psutil.Process(launcher.pid)  # not yet waited for: the id is still its own
        self.members: set[psutil.Process] = set()

    def look(self) -> None:
        """Remember the descendants that are alive now: after the launcher's death nobody can list them."""
        self.members |= _descendants(self.root)

    def ask_ranks(self, signal_: signal.Signals) -> int:
        """Send a signal to the ranks, and not to torchrun, which would end them by its own clock.

        Returns:
            How many got it.
        """
        return sum(_send(rank, signal_) for rank in _descendants(self.root, recursive=False))

    def end(self) -> None:
        """End the launcher and every rank: ask first, kill after `GRACE` seconds."""
        with _without_interrupts():
            self.look()
            for orphan in list(self.members):
                self.members |= _descendants(orphan)
            living = [member for member in self.members if member.is_running()]
            if self.launcher.poll() is None:
                living.append(self.root)
            for signal_ in (signal.SIGTERM, signal.SIGKILL):
                for process in living:
                    _send(process, signal_)
                _, living = psutil.wait_procs(living, timeout=GRACE)
            self.launcher.wait()


def _descendants(process: psutil.Process, recursive: bool = True) -> set[psutil.Process]:
    """Those that live; none if the process has ended, or another one has its id by now."""
    try:
        return set(process.children(recursive=recursive))
    except psutil.NoSuchProcess:
        return set()


def _send(process: psutil.Process, signal_: signal.Signals) -> bool:
    try:
        process.send_signal(signal_)  # psutil checks that the id is still the same process
    except psutil.NoSuchProcess:
        return False
    return True


@contextmanager
def _without_interrupts():
    """A second, impatient Ctrl-C must not stop the clearing up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
