"""Which base a run was trained on, told by its bytes: another one may have the same shapes and the same name."""

import hashlib
from pathlib import Path

from nbutils.models.hub import CONFIG, local_folder
from nbutils.models.safetensors_reader import BadCheckpoint, Checkpoint

PIECE = 64 * 1024
STRIDE = 16 * 1024 * 1024  # 40 GB of NF4 are told by 160 MB of them
WHOLE = 4 * STRIDE  # files up to this size are read whole


def base_digest(model: str | Path) -> str | None:
    """Tell a base by its config and its weights, in seconds, whatever its size.

    Small files are read whole. Of a large one, its size, its first and last 64 KiB, and 64 KiB in each 16 MiB count: a
    base that was trained further differs everywhere. A change of a few weights between these pieces is not seen.

    Args:
        model: a local folder, or a hub id whose weights have come.

    Returns:
        64 hexadecimal digits; None if the weights are not on this machine.

    Raises:
        CannotDownload: there is no such model.
    """
    folder = local_folder(model, weights=False)
    try:
        files = sorted(set(Checkpoint(folder).files.values()))
    except BadCheckpoint:
        return None
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    for file in files:
        _add(folder / file, digest)
    return digest.hexdigest()


def _add(file: Path, digest) -> None:
    size = file.stat().st_size
    digest.update(str(size).encode())
    with file.open("rb") as stream:
        if size <= WHOLE:
            digest.update(stream.read())
            return
        for place in (*range(0, size - PIECE, STRIDE), size - PIECE):
            stream.seek(place)
            digest.update(stream.read(PIECE))
