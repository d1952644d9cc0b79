"""A checkpoint on disk: complete or not there, checked before it is used, and enough to make the adapter from alone.

A checkpoint is a folder `checkpoint-<step>`:

    rank_0.safetensors, ...   each rank's own pieces of the adapter and of the optimizer's state, without any gather
    adapter_config.json, trainer_state.json, scheduler.pt, rng_state*.pth
    manifest.json             every file with its size and SHA-256, and the facts of the run; written last

It is written under another name and renamed at the end. A kill at any moment leaves either no `checkpoint-<step>` or a
whole one. The folder must be one that all ranks see (a shared file system with several machines).
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nbutils.adapters.pieces import Piece, SaveError, own_pieces
from nbutils.common.disk import fsync, sha256
from nbutils.common.ranks import on_every_rank, rank

MANIFEST = "manifest.json"
FORMAT = 1
ADAPTER = "adapter."  # what stands before a tensor's name in a rank's file


class CheckpointError(RuntimeError):
    """No checkpoint can be used as asked. Nothing was deleted."""


def rank_file(number: int) -> str:
    """The name of a rank's file of pieces."""
    return f"rank_{number}.safetensors"


def write_checkpoint(folder: Path, write: Callable[[Path], None], facts: dict) -> None:
    """Write a checkpoint so that it is complete or not there. Every rank must call it.

    Args:
        folder: `.../checkpoint-<step>`. One of that name that is there already is replaced.
        write: called on every rank with the folder to write this rank's files into; no two ranks write one file.
        facts: what a resume must find unchanged; JSON can hold it.

    Raises:
        SaveError: a rank could not write, on every rank. What was on disk before is still there.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    on_every_rank(lambda: rank() == 0 and _clear(unfinished), SaveError)
    on_every_rank(lambda: _write_own(unfinished / f"files_of_rank_{rank()}", write), SaveError)
    # Now all files are on disk: no rank leaves the line above before every rank has.
    on_every_rank(lambda: rank() == 0 and _finish(unfinished, folder, facts), SaveError)


def save_pieces(
    file: Path,
    model: torch.nn.Module,
    more: dict[str, torch.Tensor],
    notes: dict,
    adapter_name: str = "default",
) -> None:
    """Write what this rank holds of the adapter, without talking to any other rank.

    Args:
        file: a `.safetensors` file.
        model: the outermost model, as for `nbutils.adapters.gather.gather_adapter`.
        more: further tensors of this rank (the optimizer's), by name.
        notes: facts about them; JSON can hold it. `read_rank` gives it back.
        adapter_name: PEFT's name for the adapter.
    """
    pieces = own_pieces(model, adapter_name)
    tensors = {ADAPTER + key: piece.held for key, piece in pieces.items()} | more
    where = {key: {"shape": piece.shape, "start": piece.start} for key, piece in pieces.items()}
    # Copies: the pieces are views into one flat storage, and training goes on.
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"pieces": json.dumps(where), "notes": json.dumps(notes)})


def read_rank(folder: Path, number: int) -> tuple[dict[str, torch.Tensor], dict[str, dict], dict]:
    """Read a rank's file: its tensors by name, where its pieces lie in the whole, and its notes."""
    with safe_open(Path(folder) / rank_file(number), "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return tensors, json.loads(metadata["pieces"]), json.loads(metadata["notes"])


@torch.no_grad()
def put_pieces_back(model: torch.nn.Module, tensors: dict[str, torch.Tensor], where: dict[str, dict]) -> None:
    """Copy a rank's saved pieces into the memory they were taken from.

    Args:
        model: the outermost model, spread as it was when the pieces were saved.
        tensors: from `read_rank`.
        where: from `read_rank`.

    Raises:
        CheckpointError: this rank holds other pieces than those saved; the first is named.
    """
    pieces = own_pieces(model)
    if missing := sorted(pieces.keys() ^ where.keys()):
        raise CheckpointError(
            f"{missing[0]} is only in the {'model' if missing[0] in pieces else 'checkpoint'} ({len(missing)} such). "
            "Resume with the base and the target modules that the run began with."
        )
    for key, piece in pieces.items():
        saved, place = tensors[ADAPTER + key], where[key]
        found, wanted = _description(piece), (place["shape"], place["start"], [*saved.shape], saved.dtype)
        if found != wanted:
            raise CheckpointError(
                f"This rank holds {key} as {found}, and the checkpoint has {wanted} (shape, first element, shape "
                "of the piece, dtype). Resume with the settings that the run began with."
            )
        piece.held.copy_(saved)


def problem_with(folder: Path, contents: bool = True) -> str | None:
    """Say what makes a checkpoint unusable, naming the file; None if it is complete.

    Args:
        folder: the checkpoint.
        contents: compare each file's SHA-256 too, and not only its size.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return str(error)
    for name, (size, digest) in manifest["files"].items():
        file = Path(folder) / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes, and {size:,} were written"
        if contents and sha256(file) != digest:
            return f"{name} is not the file that was written: its SHA-256 differs"
    return None


def read_manifest(folder: Path) -> dict:
    """Read a checkpoint's manifest: `files` (name: [bytes, SHA-256]) and `facts`.

    Raises:
        CheckpointError: it is missing, or no manifest of ours.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{MANIFEST} is missing")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest["format"] == FORMAT and manifest["files"] and "facts" in manifest:
            return manifest
    except (ValueError, KeyError, TypeError):
        pass
    raise CheckpointError(f"{MANIFEST} is not a manifest of format {FORMAT}")


def checkpoints_in(output: Path) -> list[Path]:
    """The folders `checkpoint-<step>`, complete or not, by step, the newest last."""
    found = [path for path in Path(output).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def newest_complete(output: Path, say: Callable = print) -> Path | None:
    """Find the newest checkpoint in which nothing is missing or changed; name what is wrong with newer ones.

    Args:
        output: the folder of the run.
        say: told what is wrong with the newer ones.

    Returns:
        A checkpoint, or None if there is none at all.

    Raises:
        CheckpointError: there are checkpoints, and not one is complete.
    """
    problems = []
    for folder in reversed(checkpoints_in(output)):
        problem = problem_with(folder)
        if problem is None:
            return folder
        problems.append(f"{folder.name} cannot be used: {problem}.")
        # One string: each argument would be a write of its own, and the launcher marks a rank's lines write by write.
        say(f"{problems[-1]} Looking at the one before it.\n", end="", flush=True)
    if problems:
        raise CheckpointError(
            " ".join(problems) + f" No complete checkpoint is left in {output}; start anew in another folder."
        )
    return None


def delete_old(output: Path, keep: int | None) -> None:
    """Keep the newest `keep` complete checkpoints. One that is not complete is neither counted nor deleted.

    Args:
        output: the folder of the run.
        keep: at least one is kept; None keeps all.
    """
    if keep:
        complete = [
            folder for folder in checkpoints_in(output) if problem_with(folder, contents=False) is None
        ]
        for folder in complete[: -max(1, keep)]:
            shutil.rmtree(folder)


def _description(piece: Piece) -> tuple:
    return [*piece.shape], piece.start, [*piece.held.shape], piece.held.dtype


def _clear(unfinished: Path) -> None:
    for left in unfinished.parent.glob(
        ".checkpoint-*.unfinished"
    ):  # by runs that were killed while they wrote
        shutil.rmtree(left)
    unfinished.mkdir(parents=True)


def _write_own(own: Path, write: Callable[[Path], None]) -> None:
    own.mkdir()
    write(own)
    for path in [*own.iterdir(), own]:
        fsync(path)


def _finish(unfinished: Path, folder: Path, facts: dict) -> None:
    for own in list(unfinished.iterdir()):
        for file in list(own.iterdir()):
            file.rename(unfinished / file.name)
        own.rmdir()
    files = {file.name: [file.stat().st_size, sha256(file)] for file in sorted(unfinished.iterdir())}
    manifest = {"format": FORMAT, "facts": facts, "files": files}
    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    fsync(unfinished / MANIFEST)
    fsync(unfinished)
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():  # an unusable one, or of an earlier try that went further
        folder.rename(replaced)
    unfinished.rename(folder)
    fsync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)
