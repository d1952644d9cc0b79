"""Several machines, one output_dir: rank 0 leaves a token there, and all ranks look for it before a weight is read.

Each rank writes its file of a checkpoint into a folder that rank 0 makes (`nbutils.adapters.checkpoint_folder`).
Where each machine has an output_dir of its own, that would fail at the first checkpoint, hours after the start.
"""

import contextlib
import os
import secrets
import socket
import time
from pathlib import Path

from nbutils.common.ranks import rank
from nbutils.common.refused import Refused

SECONDS = 10.0  # a network file system may show late what another machine has written


def new_name() -> str:
    """Of a token; one that a killed run has left behind is not taken for it."""
    return f".seen-by-all-{secrets.token_hex(4)}"


class Token:
    """A small file in `output`, under a name that all ranks know."""

    def __init__(self, output: Path, name: str):
        self.output, self.name, self.made = Path(output).absolute(), name, []

    def leave(self) -> None:
        """Write it, and make the folder if it is not there."""
        missing = [place for place in (self.output, *self.output.parents) if not place.exists()]
        for place in reversed(missing):
            place.mkdir()
            self.made.append(place)
        (self.output / self.name).write_text(f"rank {rank()} on {socket.gethostname()}\n")

    def look_for(self, seconds: float = SECONDS) -> None:
        """Look until it is there.

        Raises:
            Refused: it is not there after this many seconds.
        """
        end = time.monotonic() + seconds
        while not self._is_there():
            if time.monotonic() > end:
                raise Refused(
                    f"output_dir {self.output} is not one folder that all machines share: rank {rank()} on "
                    f"{socket.gethostname()} has looked for {seconds:g} seconds and does not see the file that rank 0 "
                    "wrote there. Wanted: the same folder on every machine, for each rank writes its part of a "
                    "checkpoint into it. Name one on a file system that all machines mount."
                )
            time.sleep(0.2)
            self._ask_the_server_again()

    def take_away(self) -> None:
        """Remove it, and the folders that were made for it and hold nothing else."""
        with contextlib.suppress(OSError):
            (self.output / self.name).unlink(missing_ok=True)
            for place in reversed(self.made):
                place.rmdir()

    def _is_there(self) -> bool:
        with contextlib.suppress(OSError):  # one may not even look
            return (self.output / self.name).exists()
        return False

    def _ask_the_server_again(self) -> None:
        """NFS remembers for up to a minute what was not there, and looks again at a folder that is opened."""
        for place in (*reversed(self.output.parents), self.output):
            with contextlib.suppress(OSError):
                os.scandir(place).close()
