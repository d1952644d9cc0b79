"""Save the adapter so that it is there, whole, and the one that was trained: gather, write, read back, swap."""

import copy
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from nbutils.adapters.gather import compute_device, gather_adapter, missing_keys
from nbutils.adapters.lora_config import CONFIG, WEIGHTS
from nbutils.adapters.pieces import Piece, SaveError, own_pieces, peft_model
from nbutils.common.disk import fsync, sha256
from nbutils.common.ranks import agree, rank


class AdapterMismatch(SaveError):
    """What is on disk is not what the processes hold. Nothing was deleted."""


def save_adapter(
    model: torch.nn.Module,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter_name: str = "default",
    allow_untrained: bool = False,
) -> dict:
    """Write the adapter to `folder`, checked bit for bit against every rank before it takes its name.

    Every rank must call it. Rank 0 writes to a folder beside `folder`, all ranks compare what is there with what
    they hold, and only then it is renamed. An adapter that was there before is kept as `<folder>.previous`.

    Args:
        model: the outermost model, as for `gather_adapter`.
        folder: where the adapter goes; new, empty, or an earlier adapter.
        tokenizer: saved along with it, if given.
        adapter_name: PEFT's name for the adapter.
        allow_untrained: accept an adapter whose `lora_B` are all zero, which changes nothing in the base.

    Returns:
        What `verify_adapter` returns, and `bytes_gathered`, the bytes this rank put together to save.

    Raises:
        SaveError: the adapter is incomplete, empty, not finite or untrained, or the folder holds something else.
            Raised on every rank, and what was in `folder` is untouched.
        AdapterMismatch: what was written differs from what a rank holds.
    """
    folder = Path(folder).absolute()
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    gathered = gather_adapter(model, adapter_name)
    problem = None
    if rank() == 0:
        try:
            reject_foreign_folder(folder)
            reject_bad_tensors(gathered.tensors, allow_untrained)
            _write(unfinished, gathered.tensors, config_for_file(model, adapter_name), tokenizer)
        except Exception as error:  # told to every rank: they would wait for ever
            problem = f"The adapter was not saved. {type(error).__name__}: {error}"
    agree(problem, SaveError)
    report = verify_adapter(model, unfinished, adapter_name, allow_untrained)
    if rank() == 0:
        try:
            _swap(unfinished, folder)
        except OSError as error:
            problem = (
                f"The adapter is complete in {unfinished}, and could not be renamed to {folder}: {error}"
            )
    agree(problem, SaveError)  # also the barrier: every rank returns after the rename
    return report | {"bytes_gathered": gathered.bytes_gathered}


def verify_adapter(
    model: torch.nn.Module, folder: str | Path, adapter_name: str = "default", allow_untrained: bool = False
) -> dict:
    """Compare the adapter on disk with what each rank holds, tensor by tensor and bit for bit.

    Every rank must call it. Rank 0 reads the file and sends each tensor round; each rank compares its own piece, as
    it lies in the rank's memory, with the same part of that tensor. No gather is involved.

    Args:
        model: the outermost model, as for `gather_adapter`.
        folder: an adapter's folder; only rank 0 needs to see it.
        adapter_name: PEFT's name for the adapter.
        allow_untrained: accept a `lora_B` that is all zero.

    Returns:
        `tensors` and `elements` (their numbers in the file), `sha256` of the file, `dtypes`, and `verified`: True.

    Raises:
        AdapterMismatch: the first difference, by the tensor's name. Raised on every rank.
    """
    tensors, digest, problem = {}, None, None
    if rank() == 0:
        try:
            file = Path(folder) / WEIGHTS
            tensors, digest = load_file(file), sha256(file)
            _reject_bad_config(Path(folder))
            reject_bad_tensors(tensors, allow_untrained, each_lora_b=True)
        except Exception as error:  # told to every rank: they would wait for ever
            problem = f"The adapter in {folder} cannot be used. {type(error).__name__}: {error}"
    agree(problem, AdapterMismatch)

    layout = _from_rank_0({key: (tuple(t.shape), t.dtype) for key, t in tensors.items()})
    digest = _from_rank_0(digest)
    pieces = own_pieces(model, adapter_name)
    agree(_first_name_difference(model, pieces, set(layout), adapter_name, folder), AdapterMismatch)
    for key, (shape, dtype) in layout.items():
        whole = _tensor_from_rank_0(tensors.get(key), shape, dtype)
        if problem is None:  # the sending goes on to the end, or the other ranks would wait
            problem = _difference(key, pieces[key], whole, folder)
    agree(problem, AdapterMismatch)
    agree(_first_hole(pieces, layout), AdapterMismatch)
    return {
        "tensors": len(layout),
        "elements": sum(torch.Size(shape).numel() for shape, _ in layout.values()),
        "dtypes": sorted({str(dtype).removeprefix("torch.") for _, dtype in layout.values()}),
        "sha256": digest,
        "verified": True,
    }


def reject_bad_tensors(
    tensors: dict[str, torch.Tensor], allow_untrained: bool = False, each_lora_b: bool = False
) -> None:
    """Raise if these tensors are no adapter worth keeping.

    Args:
        tensors: by file name.
        allow_untrained: accept zero `lora_B`.
        each_lora_b: object to one `lora_B` that is all zero, and not only to all of them: training moves each.

    Raises:
        SaveError: none at all, an empty or non-finite one (named), or `lora_B` that are all zero.
    """
    if not tensors:
        raise SaveError(
            "Found no tensor at all; an adapter was wanted. Do not use this file, and save again."
        )
    for key, tensor in tensors.items():
        if tensor.numel() == 0:
            raise SaveError(
                f"{key} is empty (shape {tuple(tensor.shape)}). A piece was saved where a whole was wanted."
            )
        if not torch.isfinite(tensor).all():
            raise SaveError(f"{key} holds NaN or infinity: the training diverged. Use an earlier checkpoint.")
    lora_b = [key for key in tensors if ".lora_B." in key]
    zero = [key for key in lora_b if not tensors[key].any()]
    if zero and not allow_untrained and (each_lora_b or len(zero) == len(lora_b)):
        raise SaveError(
            f"{len(zero)} of {len(lora_b)} lora_B are all zero (the first: {zero[0]}), as before training: they change "
            "nothing in the base. Check the learning rate and the number of steps, or pass allow_untrained=True."
        )


def config_for_file(model: torch.nn.Module, adapter_name: str = "default") -> LoraConfig:
    """The configuration as an adapter's folder holds it: for inference, with the name of its base."""
    wrapped = peft_model(model)
    config = copy.deepcopy(wrapped.peft_config[adapter_name])
    config.inference_mode = True
    config.base_model_name_or_path = (
        config.base_model_name_or_path or wrapped.get_base_model().name_or_path or None
    )
    return config


def _reject_bad_config(folder: Path) -> None:
    if not (folder / CONFIG).is_file():  # PEFT would go and ask the Hub
        raise FileNotFoundError(
            f"Found no {CONFIG} in {folder}, and PeftModel.from_pretrained wants one. Save again."
        )
    LoraConfig.from_pretrained(str(folder))


def reject_foreign_folder(folder: Path) -> None:
    """Refuse to replace what is no adapter.

    Args:
        folder: where an adapter is to go.

    Raises:
        SaveError: something else is there.
    """
    if not folder.exists():
        return
    entries = list(folder.iterdir()) if folder.is_dir() else [folder]
    if entries and ((folder / CONFIG) not in entries or any(entry.is_dir() for entry in entries)):
        raise SaveError(
            f"{folder} holds something that is no adapter ({entries[0].name}); a new folder, an empty one or an "
            "earlier adapter was wanted, because the folder is replaced as a whole. Name another folder."
        )


def _write(folder: Path, tensors: dict[str, torch.Tensor], config: LoraConfig, tokenizer) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed while it wrote
    folder.mkdir(parents=True)
    save_file(dict(sorted(tensors.items())), folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    for path in [*folder.iterdir(), folder]:
        fsync(path)


def _swap(unfinished: Path, folder: Path) -> None:
    # A folder cannot be renamed over one that has content. Between the two renames the last good adapter is
    # `.previous`, whole; at no moment is there half of one.
    if folder.exists():
        previous = folder.with_name(f"{folder.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    unfinished.rename(folder)
    fsync(folder.parent)


def _first_name_difference(
    model: torch.nn.Module, pieces: dict[str, Piece], keys: set[str], adapter_name: str, folder: str | Path
) -> str | None:
    missing = sorted((pieces.keys() | set(missing_keys(model, keys, adapter_name))) - keys)
    foreign = sorted(keys - pieces.keys())
    if missing:
        return f"{missing[0]} is trained and not in {folder} ({len(missing)} missing, {len(keys)} there). Save again."
    if foreign:
        return f"{foreign[0]} is in {folder}, and this model has no such tensor ({len(foreign)} such). Save again."
    return None


def _difference(key: str, piece: Piece, whole: torch.Tensor, folder: str | Path) -> str | None:
    """Say how the whole tensor from the file differs from this rank's piece; None if in no bit."""
    if tuple(whole.shape) != piece.shape or whole.dtype != piece.held.dtype:
        return (
            f"{key} is {tuple(whole.shape)} {whole.dtype} in {folder}, and this rank holds a part of "
            f"{piece.shape} {piece.held.dtype}. Nothing was deleted."
        )
    wanted, found = piece.held.to(whole.device).contiguous(), piece.cut(whole).contiguous()
    # As bytes: 0.0 equals -0.0 as a number, and NaN does not equal itself.
    if wanted.shape == found.shape and torch.equal(wanted.view(torch.uint8), found.view(torch.uint8)):
        return None
    return (
        f"{key} in {folder} differs from what this rank holds. Nothing was deleted; save again and compare."
    )


def _first_hole(pieces: dict[str, Piece], layout: dict) -> str | None:
    """Name a tensor of which some elements lie on no rank, so that nobody compared them; None if there is none."""
    held = torch.tensor([pieces[key].held.numel() for key in layout], device=compute_device())
    if dist.is_initialized():
        dist.all_reduce(held)
    for (key, (shape, _)), elements in zip(layout.items(), held.tolist()):
        if elements < torch.Size(shape).numel():
            return f"The ranks together hold {elements} elements of {key}, and the file {torch.Size(shape).numel()}."
    return None


def _from_rank_0(value):
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _tensor_from_rank_0(
    tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    device = compute_device()
    tensor = torch.empty(shape, dtype=dtype, device=device) if tensor is None else tensor.to(device)
    if dist.is_initialized():
        dist.broadcast(tensor, src=0)
    return tensor
