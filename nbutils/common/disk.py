"""Folders and files of a run: where they can be made, and that they are really on the disk."""

import hashlib
import os
from pathlib import Path

from nbutils.common.refused import Refused


def refuse_output(output: Path) -> None:
    """Refuse an output folder that cannot be one.

    Raises:
        Refused: it is a file, or cannot be made.
    """
    if output.exists() and not output.is_dir():
        raise Refused(f"output_dir {output} is a file; wanted a folder, new or of this run. Name another.")
    place = nearest_folder(output)
    if not os.access(place, os.W_OK):
        raise Refused(f"output_dir {output} cannot be made: no right to write in {place}. Name another.")


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk and survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(file: Path) -> str:
    """The SHA-256 of a file in hexadecimal, read piece by piece."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
