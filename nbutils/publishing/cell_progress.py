"""What a terminal shows while a notebook runs."""

import sys
import threading
import time
from pathlib import Path

import nbformat

from nbutils.common.progress_file import ProgressReader
from nbutils.launching.progress_display import progress_line


class CellProgress:
    """Progress on the terminal: one line that is rewritten each second; in a log file a line for each slow cell."""

    SLOW = 5.0  # seconds
    SHOWN = "terminal"  # tag of a cell whose output is wanted before the notebook has ended

    def __init__(self, label: str, notebook: Path, run_dir: Path, injected: bool = False):
        cells = nbformat.read(notebook, as_version=4).cells
        self.label, self.total, self.train_dir = label, len(cells) + injected, run_dir / "train"
        self.source, self.place, self.started = "", 0, 0.0
        self.training = ProgressReader(self.train_dir, from_end=True)
        self.closed = threading.Event()
        if sys.stdout.isatty():
            threading.Thread(target=self._keep_rewriting, daemon=True).start()
        else:
            print(label, flush=True)

    def begin(self, cell, cell_index: int) -> None:
        self.source, self.place, self.started = cell.source, cell_index + 1, time.monotonic()
        self.training = ProgressReader(self.train_dir, from_end=True)

    def end(self, cell, cell_index: int, **_) -> None:
        seconds = time.monotonic() - self.started
        if not sys.stdout.isatty() and seconds >= self.SLOW:
            print(f"    cell {cell_index + 1}/{self.total}: {seconds:.0f} s", flush=True)
        if self.SHOWN in cell.metadata.get("tags", []):
            self._show(cell)

    def _show(self, cell) -> None:
        """Print what a cell has printed, below the line that is rewritten."""
        said = "".join(output.text for output in cell.outputs if output.output_type == "stream")
        start = "\r\033[K" if sys.stdout.isatty() else ""
        print(start + "\n".join(f"    {line}" for line in said.splitlines()), flush=True)

    def line(self) -> str:
        """Where the notebook is; while a launch trains, where the training is."""
        training = self.training.read()
        seconds = time.monotonic() - self.started
        doing = progress_line(training, seconds) if training else f"{seconds:.0f} s"
        return f"{self.label}  cell {self.place}/{self.total}  {doing}"

    def _keep_rewriting(self) -> None:
        while not self.closed.wait(1.0):
            if self.place:
                print(f"\r\033[K{self.line()}", end="", flush=True)

    def close(self, status: str, seconds: float) -> None:
        self.closed.set()
        start = f"\r\033[K{self.label}  " if sys.stdout.isatty() else "    "
        print(f"{start}{status}, {seconds:.0f} s", flush=True)
