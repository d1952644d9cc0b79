"""Read the progress file of a training run, from a process that imports nothing heavy; `ProgressLog` writes it."""

import json
from pathlib import Path

PROGRESS_FILE = "progress.jsonl"


class ProgressReader:
    """Follow a progress file: each look reads on from where the last one ended.

    A line that is no JSON object is left out: a full disk may have cut it, and a resume have written on behind the cut.
    If the file was made anew, it is read from its beginning.

    Args:
        folder: the output folder of the run; it need not be there yet.
        from_end: leave out what is there now, an older run's.
    """

    def __init__(self, folder: str | Path, from_end: bool = False):
        self.path = Path(folder) / PROGRESS_FILE
        self.lines: list[dict] = []
        self._rest = b""
        self._file = self._state()[0]
        self._offset = self._state()[1] if from_end else 0

    def read(self) -> list[dict]:
        """The lines written so far, oldest first; a last line that is still being written is left out."""
        file, size = self._state()
        if file != self._file or size < self._offset:
            self.lines, self._rest, self._file, self._offset = [], b"", file, 0
        if size > self._offset:
            new = self._new_bytes()
            self._offset += len(new)
            *whole, self._rest = (self._rest + new).split(b"\n")
            self.lines += filter(None, map(_object, whole))
        return self.lines

    def _new_bytes(self) -> bytes:
        try:
            with self.path.open("rb") as stream:
                stream.seek(self._offset)
                return stream.read()
        except OSError:  # just taken away, or a network disk stumbled: the next look will tell
            return b""

    def _state(self) -> tuple[int | None, int]:
        """Which file it is, and its bytes."""
        try:
            found = self.path.stat()
        except OSError:
            return None, 0
        return found.st_ino, found.st_size


def _object(line: bytes) -> dict | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def read_progress(folder: str | Path) -> list[dict]:
    """The whole lines of a run's progress file, oldest first.

    Args:
        folder: the output folder of the run.

    Returns:
        A list of dictionaries, empty if the run has not begun to train.
    """
    return ProgressReader(folder).read()
