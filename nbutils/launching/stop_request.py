"""A launch is asked to stop: its time is up, or somebody (Slurm, a cloud, a reader) sends it SIGTERM.

The ranks are asked first, each with SIGTERM, and have time to finish their step and to save; torchrun is not, because
it kills its ranks 30 s after a SIGTERM of its own. A script that does not handle SIGTERM ends at once.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from nbutils.launching.process_tree import ProcessTree


class StopRequest:
    """Watch the time, and pass a stop on to the ranks once.

    Args:
        ranks: of the launch.
        time_limit: seconds from now.
        save_grace: seconds that the ranks then have to save.
    """

    def __init__(self, ranks: ProcessTree, time_limit: float, save_grace: float):
        self.ranks, self.time_limit, self.save_grace = ranks, time_limit, save_grace
        self.begun = time.monotonic()
        self.why = ""  # once asked, the sentence that says why
        self.deadline = float("inf")

    @property
    def over(self) -> bool:
        """Has the ranks' time to save gone by?"""
        return time.monotonic() > self.deadline

    def look(self) -> None:
        """Ask the ranks if the time is up."""
        if not self.why and time.monotonic() - self.begun > self.time_limit:
            self._ask(
                f"The launch had not ended after {self.time_limit:g} s, and its ranks were asked to end."
            )

    def _ask(self, why: str) -> None:
        if not self.why:
            self.why, self.deadline = why, time.monotonic() + self.save_grace
            self.ranks.ask_ranks(signal.SIGTERM)

    @contextmanager
    def hear_sigterm(self) -> Iterator[None]:
        """Within it, a SIGTERM to this process is passed on to the ranks. Only a main thread hears signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        said = "The launch was told to end (SIGTERM), and its ranks were asked to end."
        before = signal.signal(signal.SIGTERM, lambda *_: self._ask(said))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
