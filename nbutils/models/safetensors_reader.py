"""Read a sharded safetensors checkpoint tensor by tensor, without copying it into memory."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class BadCheckpoint(ValueError):
    """A checkpoint that cannot be loaded; the message names the file or the tensor."""


class Checkpoint:
    """The tensors of a local folder, by name.

    The files are mapped into memory and not read: a tensor's bytes come from disk when they are first used, stay in
    the page cache, and are there once a machine, however many ranks use them. The system takes them back when memory
    is short.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and the shards it names.

    Raises:
        BadCheckpoint: there is no safetensors file, a shard is missing or cut short, or a tensor that the index names
            is not in its shard. Only headers are read for this.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.files = file_of_each_tensor(self.folder)
        self._open: tuple[str, safe_open] | None = None  # one file at a time: what is done can be unmapped
        self._parts: dict[str, list[str]] = {}
        for name in self.files:
            weight, dot, _ = name.partition(".weight.")
            self._parts.setdefault(f"{weight}.weight" if dot else name, []).append(name)
        for file in sorted(set(self.files.values())):
            absent = {name for name, where in self.files.items() if where == file} - set(
                self._header(file).keys()
            )
            if absent:
                raise BadCheckpoint(
                    f"{INDEX} says that {min(absent)} is in {file}, and it is not there. "
                    "Download the checkpoint again: index and shards do not belong together."
                )

    @property
    def bytes_on_disk(self) -> int:
        """The size of all shards in bytes."""
        return sum((self.folder / file).stat().st_size for file in set(self.files.values()))

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def names(self) -> list[str]:
        """All tensors, in the order of the files, so that each file is opened once."""
        return sorted(self.files, key=lambda name: (self.files[name], name))

    def parts_of(self, name: str) -> list[str]:
        """The tensor `name` and those that belong to it, `name.absmax` and so on.

        Args:
            name: a weight.
        """
        return self._parts.get(name, [])

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU; its bytes lie in the mapped file.

        Args:
            name: as in the checkpoint, for example `model.layers.0.mlp.up_proj.weight`.

        Raises:
            BadCheckpoint: the checkpoint has no such tensor.
        """
        if name not in self.files:
            raise BadCheckpoint(
                f"{name} is missing from the checkpoint in {self.folder}; the model needs it."
            )
        return self._header(self.files[name]).get_tensor(name)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.names():
            yield name, self.read(name)

    def _header(self, file: str) -> safe_open:
        if self._open is None or self._open[0] != file:
            path = self.folder / file
            if not path.exists():
                raise BadCheckpoint(
                    f"{path.name} is missing from {self.folder}. Download again: only what is missing is fetched."
                )
            try:
                self._open = (file, safe_open(path, framework="pt", device="cpu"))
            except SafetensorError as problem:
                raise BadCheckpoint(
                    f"{path.name} in {self.folder} is cut short or damaged ({problem}). "
                    "Delete this file and download again: the others are kept."
                ) from None
        return self._open[1]


def file_of_each_tensor(folder: Path) -> dict[str, str]:
    """The names of a checkpoint's tensors, each with the name of its file in the folder.

    Args:
        folder: of the checkpoint.

    Raises:
        BadCheckpoint: there is no safetensors file, or its index or its header cannot be read.
    """
    if (folder / INDEX).exists():
        try:
            files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            return {str(name): str(file) for name, file in files.items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise BadCheckpoint(f"{folder / INDEX} is no index of safetensors. Download it again.") from None
    if (folder / SINGLE).exists():
        try:
            with safe_open(folder / SINGLE, framework="pt", device="cpu") as file:
                return dict.fromkeys(file.keys(), SINGLE)
        except SafetensorError as problem:
            raise BadCheckpoint(
                f"{SINGLE} in {folder} is cut short or damaged ({problem}). Download it again."
            ) from None
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    raise BadCheckpoint(
        f"{folder} holds neither {SINGLE} nor {INDEX}, but {', '.join(found) or 'nothing'}. "
        "Wanted: a checkpoint in safetensors, as the hub keeps them."
    )
