"""Merge an adapter into its bf16 base on disk, one tensor at a time: memory holds a few tensors, never the model.

Each tensor of the base is read, PEFT's own LoRA layer merges into it if the adapter has something for it, and it is
written to a new checkpoint with the same files and the same index. A file is complete or not there, so a merge that was
stopped goes on where it was.
"""

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from tqdm import tqdm

from nbutils.adapters.lora_config import CONFIG, WEIGHTS, alpha_of, read_lora_config
from nbutils.adapters.merge_plan import MergeError, Parts, layout, plan_merge
from nbutils.common.disk import fsync, sha256
from nbutils.models.hub import local_folder, read_config
from nbutils.models.safetensors_reader import Checkpoint
from nbutils.models.safetensors_writer import read_tensor, write_tensors
from nbutils.planning.memory_items import BF16
from nbutils.planning.shapes import shape_of

RECORD = "merge.json"


def merge(base: str | Path, adapter: str | Path, out: str | Path, progress: bool = True) -> dict:
    """Write base + adapter as a normal safetensors checkpoint.

    Args:
        base: the unquantised base: a local folder, or a hub id.
        adapter: the adapter's folder: LoRA or DoRA on linear layers and embeddings, `modules_to_save`, and biases.
        out: a new folder, or one in which the same merge was stopped.
        progress: show a bar that counts bytes.

    Returns:
        `tensors` (all), `merged` and `replaced` (how many of them the adapter changed), `bytes` written or found
        finished, and `skipped_files` (finished by an earlier try).

    Raises:
        UnsupportedAdapter: the adapter's configuration asks for something that is not implemented; the field is named.
        MergeError: the base is quantised, a tensor of the adapter has no place in it, the disk is too small, or `out`
            holds something else.
        BadCheckpoint: the base has no readable `config.json`, or a file of it is missing or damaged.
        CannotDownload: the base is no local folder, and the hub does not give it.
    """
    base, adapter, out = local_folder(base), Path(adapter), Path(out)
    layouts, plan, config = _look(base, adapter)
    _claim(out, base, adapter, layouts)
    finished = [name for name in layouts if (out / name).is_file()]
    _reject_small_disk(out, sum((base / name).stat().st_size for name in layouts if name not in finished))

    total = sum(entry.bytes for entries in layouts.values() for entry in entries.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress, desc="merge") as bar:
        for name, entries in layouts.items():
            if name in finished:
                bar.update(sum(entry.bytes for entry in entries.values()))
                continue
            part = out / f".{name}.part"
            merged = _merger(base / name, adapter / WEIGHTS, plan, config)
            write_tensors(part, entries, merged, bar)
            fsync(part)
            part.rename(out / name)
    _copy_the_rest(base, adapter, out)
    return {
        "tensors": sum(len(entries) for entries in layouts.values()),
        "merged": sum(not parts.replaced for parts in plan.values()),
        "replaced": sum(parts.replaced for parts in plan.values()),
        "bytes": total,
        "skipped_files": finished,
    }


def why_not_merged(base: str | Path, limit_gb: float) -> str | None:
    """Say why a base is not merged into without being asked for; None if it may be. Reads its configuration alone.

    Args:
        base: a local folder or a hub id.
        limit_gb: the largest bf16 model, in GB, that is written a second time.
    """
    folder = local_folder(base, weights=False)
    if read_config(folder).get("quantization_config"):
        return f"{base} is quantised, and an adapter is merged into the bf16 model: name that in bf16_base."
    size = BF16 * shape_of(folder).parameters / 1e9
    if size <= limit_gb:
        return None
    return (
        f"Not merged: that writes {size:.3g} GB, and merge_up_to_gb is {limit_gb:g}. The adapter needs no merge to "
        "be used; to merge all the same, raise merge_up_to_gb."
    )


def merge_weight(
    weight: torch.Tensor, module: str, config: LoraConfig, parts: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Merge into one weight with PEFT's own layer, so that the arithmetic is PEFT's to the last bit.

    Args:
        weight: (out, in) of a linear layer, or (vocabulary, hidden) of an embedding; changed in place.
        module: its module's name in the base, for patterns in the configuration.
        config: the adapter's.
        parts: `A` (r, in), `B` (out, r), and with DoRA `magnitude` (out,); for an embedding `embedding_A` and
            `embedding_B`.

    Returns:
        The merged weight, in the base's shape and dtype.
    """
    embedding = "embedding_A" in parts
    small = LoraConfig(
        r=parts["embedding_A" if embedding else "A"].shape[0],
        lora_alpha=alpha_of(config, module),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        target_modules=["layer"],
    )
    if embedding:
        plain = torch.nn.Embedding(*weight.shape, device="meta")
    else:
        plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer = inject_adapter_in_model(small, torch.nn.ModuleDict({"layer": plain}))["layer"]
    # PEFT computes in fp32 with an adapter that it loads onto a bf16 base.
    if embedding:
        layer.lora_embedding_A["default"].data = parts["embedding_A"].float()
        layer.lora_embedding_B["default"].data = parts["embedding_B"].float()
    else:
        layer.lora_A["default"].weight.data = parts["A"].float()
        layer.lora_B["default"].weight.data = parts["B"].float()
    if "magnitude" in parts:
        layer.lora_magnitude_vector["default"].weight.data = parts["magnitude"].float()
    layer.merge()
    return layer.get_base_layer().weight.data


def _look(base: Path, adapter: Path) -> tuple[dict, dict[str, Parts], LoraConfig]:
    """Read configurations and headers, and refuse what cannot be merged before anything is written."""
    settings = read_config(base)
    if settings.get("quantization_config"):
        raise MergeError(
            f"{base} is quantised; the unquantised bf16 base was wanted. Name the model it was made from."
        )
    config = read_lora_config(adapter)
    if not (adapter / WEIGHTS).is_file():
        raise MergeError(f"{adapter} holds no {WEIGHTS}; wanted the folder of an adapter, as PEFT saves it.")
    files = sorted(set(Checkpoint(base).files.values()))
    layouts = {name: layout(base / name) for name in files}
    held = {name: entry for entries in layouts.values() for name, entry in entries.items()}
    tied = bool(settings.get("tie_word_embeddings")) or "lm_head.weight" not in held
    return layouts, plan_merge(layout(adapter / WEIGHTS), config, held, tied), config


def _merger(file: Path, adapter: Path, plan: dict[str, Parts], config: LoraConfig):
    """A function that gives the merged tensor of a name in this file of the base."""

    def merged(name: str) -> torch.Tensor:
        weight = read_tensor(file, name)
        if name not in plan:
            return weight
        parts = {part: read_tensor(adapter, key) for part, key in plan[name].keys.items()}
        if "whole" in parts:
            return parts["whole"].to(weight.dtype)  # as PeftModel.from_pretrained loads it
        weight = parts.pop("base").to(weight.dtype) if "base" in parts else weight
        return merge_weight(weight.clone(), name.removesuffix(".weight"), config, parts) if parts else weight

    return merged


def _claim(out: Path, base: Path, adapter: Path, layouts: dict) -> None:
    """Write down what is merged here, or find that the same merge was begun before."""
    files = {name: (base / name).stat().st_size for name in layouts}
    record = {
        "base": base.name,
        "files": files,
        "adapter_config": sha256(adapter / CONFIG),
        "adapter": sha256(adapter / WEIGHTS),
    }
    if not out.exists() or not any(out.iterdir()):
        out.mkdir(parents=True, exist_ok=True)
        (out / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    elif not (out / RECORD).is_file() or json.loads((out / RECORD).read_text(encoding="utf-8")) != record:
        raise MergeError(f"{out} holds something else than this merge. Name a new folder.")


def _reject_small_disk(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if free < needed:
        raise MergeError(
            f"{needed / 2**30:.1f} GiB are still to be written to {out}, and {free / 2**30:.1f} GiB are free. "
            "Make room or name a folder on another disk; what is finished is kept."
        )


def _copy_the_rest(base: Path, adapter: Path, out: Path) -> None:
    """Copy tokenizer and licence, the adapter's last; `config.json` after all: nothing loads without it."""
    endings, terms = {".json", ".jinja", ".model", ".txt"}, ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
    for source in (base, adapter):
        for file in source.iterdir():
            ours = file.name in ("config.json", RECORD) or file.name.startswith("adapter_")
            wanted = file.suffix in endings or file.name.startswith(terms)
            if not wanted or ours:
                continue
            if file.is_dir():  # LICENSES/, as some models have it
                shutil.copytree(file, out / file.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(file, out / file.name)
    shutil.copyfile(base / "config.json", out / "config.json")
    fsync(out)
