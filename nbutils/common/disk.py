"""Folders and files of a run: where they can be made, and that they are really on the disk."""

import hashlib
import os
import shutil
import sys
from pathlib import Path

from nbutils.common.refused import Refused


def refuse_output(output: Path) -> None:
    """Refuse an output folder that cannot be one.

    Raises:
        Refused: it is a file, cannot be made, or has a name that the libraries which save would write differently.
    """
    refuse_name(output)
    if output.exists() and not output.is_dir():
        raise Refused(f"output_dir {output} is a file; wanted a folder, new or of this run. Name another.")
    place = nearest_folder(output)
    if not os.access(place, os.W_OK):
        raise Refused(f"output_dir {output} cannot be made: no right to write in {place}. Name another.")


def refuse_name(output: Path) -> None:
    """Refuse letters beyond ASCII where Python's names of files are not UTF-8: a run would end and could not save.

    safetensors and tokenizers are written in Rust and always take UTF-8; Python takes the locale's encoding.
    """
    encoding = sys.getfilesystemencoding()
    readable = str(output).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if not str(output).isascii() and encoding != "utf-8":
        raise Refused(
            f"output_dir {readable} has letters beyond ASCII, and this Python names files in {encoding}: the adapter "
            "could not be saved. Set PYTHONUTF8=1, or a locale of UTF-8 such as LC_ALL=C.UTF-8, or name another folder."
        )
    if any("\ud800" <= letter <= "\udfff" for letter in str(output)):
        raise Refused(
            f"output_dir {readable} is not written in UTF-8, and the adapter could not be saved there. Name another."
        )


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def refuse_full_disk(folder: Path, needed: float, what: str, advice: str) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        folder: where it will be written; it need not exist yet.
        needed: bytes.
        what: "the checkpoints need", for example.
        advice: what to do.

    Raises:
        Refused: with what is needed and what is free, in GB.
    """
    place = nearest_folder(folder)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise Refused(
            f"On the disk of {place}, {what} {needed / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free. {advice}"
        )


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
