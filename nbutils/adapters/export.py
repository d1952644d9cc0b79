"""The adapter, made out of a checkpoint folder alone, on any machine."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nbutils.adapters.checkpoint_folder import (
    ADAPTER,
    CheckpointError,
    problem_with,
    rank_file,
    read_manifest,
)
from nbutils.adapters.lora_config import CONFIG, WEIGHTS, read_lora_config
from nbutils.adapters.pieces import SaveError
from nbutils.adapters.save import reject_bad_tensors
from nbutils.common.disk import fsync, sha256


def export_adapter(checkpoint: str | Path, folder: str | Path, allow_untrained: bool = False) -> dict:
    """Make an adapter that PEFT loads out of a checkpoint alone: one process, no GPU, no base model.

    Memory holds the adapter once, and the pieces of one tensor.

    Args:
        checkpoint: a complete checkpoint.
        folder: where the adapter goes; it must not exist yet.
        allow_untrained: accept an adapter whose `lora_B` are all zero.

    Returns:
        `tensors`, `elements`, `sha256` of the file, and `step`.

    Raises:
        CheckpointError: the checkpoint is not complete, or its pieces leave a hole. Nothing is written.
        UnsupportedAdapter: the adapter's configuration asks for more than A, B and a scaling can say.
        SaveError: `folder` exists, or the tensors are no adapter worth keeping.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    if problem := problem_with(checkpoint):
        raise CheckpointError(f"{checkpoint} cannot be used: {problem}.")
    if folder.exists():
        raise SaveError(f"{folder} exists already, and nothing is overwritten. Name a new folder.")
    read_lora_config(checkpoint)  # refuses what A and B alone do not say
    # Not from the folder's name: a checkpoint that was copied may have another.
    step = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    ranks = range(read_manifest(checkpoint)["facts"]["world_size"])
    files = [safe_open(checkpoint / rank_file(number), "pt") for number in ranks]
    places = [json.loads(file.metadata()["pieces"]) for file in files]
    tensors = {key: _join_pieces(key, files, places) for key in sorted(places[0])}
    reject_bad_tensors(tensors, allow_untrained)

    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file(tensors, unfinished / WEIGHTS, metadata={"format": "pt"})
    shutil.copyfile(checkpoint / CONFIG, unfinished / CONFIG)
    digest = sha256(unfinished / WEIGHTS)
    for path in [*unfinished.iterdir(), unfinished]:
        fsync(path)
    unfinished.rename(folder)
    return {
        "tensors": len(tensors),
        "elements": sum(tensor.numel() for tensor in tensors.values()),
        "sha256": digest,
        "step": step,
    }


def _join_pieces(key: str, files: list, places: list[dict]) -> torch.Tensor:
    shape, whole, covered = places[0][key]["shape"], None, 0
    held = {}  # by first element: where the ranks hold copies, one is enough
    for file, place in zip(files, places):
        piece = file.get_tensor(ADAPTER + key)
        if piece.numel():
            held[place[key]["start"]] = piece.flatten()
    for start, piece in sorted(held.items()):
        whole = torch.empty(torch.Size(shape).numel(), dtype=piece.dtype) if whole is None else whole
        if start != covered:
            break
        whole[start : start + piece.numel()] = piece
        covered += piece.numel()
    if whole is None or covered != whole.numel():
        raise CheckpointError(
            f"The pieces of {key} hold {covered} of its {torch.Size(shape).numel()} elements."
        )
    return whole.view(shape)
