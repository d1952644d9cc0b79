"""Merge an adapter into its bf16 base on disk, one tensor at a time: memory holds a few tensors, never the model.

Each tensor of the base is read, PEFT's own LoRA layer merges into it if the adapter has something for it, and it is
written to a new checkpoint with the same files and the same index. A file is complete or not there, so a merge that was
stopped goes on where it was.
"""

import json
import shutil
from collections import defaultdict
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from tqdm import tqdm

from nbutils.adapters.save import CONFIG, WEIGHTS
from nbutils.common.disk import fsync, sha256
from nbutils.models.hub import local_folder, read_config
from nbutils.models.safetensors_reader import file_of_each_tensor
from nbutils.models.safetensors_writer import Entry, layout_of, read_tensor, write_tensors

PREFIX = "base_model.model."  # what PEFT puts before the base's names
PARTS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "magnitude"}
RECORD = "merge.json"


class MergeError(RuntimeError):
    """The adapter cannot be merged into this base. The base and the adapter are as they were."""


def merge(base: str | Path, adapter: str | Path, out: str | Path, progress: bool = True) -> dict:
    """Write base + adapter as a normal safetensors checkpoint.

    Args:
        base: the unquantised base: a local folder, or a hub id.
        adapter: the adapter's folder: LoRA or DoRA on linear layers, and `modules_to_save`.
        out: a new folder, or one in which the same merge was stopped.
        progress: show a bar that counts bytes.

    Returns:
        `tensors` (all), `merged` and `replaced` (how many of them the adapter changed), `bytes` written or found
        finished, and `skipped_files` (finished by an earlier try).

    Raises:
        MergeError: the base is quantised, a tensor of the adapter has no place in it, the disk is too small, or `out`
            holds something else.
        BadCheckpoint: the base has no readable `config.json`.
        CannotDownload: the base is no local folder, and the hub does not give it.
    """
    base, adapter, out = local_folder(base), Path(adapter), Path(out)
    if read_config(base).get("quantization_config"):
        raise MergeError(
            f"{base} is quantised; the unquantised bf16 base was wanted. Name the model it was made from."
        )
    config = _adapter_config(adapter)
    files = _weight_files(base)
    layouts = {file.name: _layout(file) for file in files}
    plan = _plan(
        adapter / WEIGHTS, config, {name: e for layout in layouts.values() for name, e in layout.items()}
    )
    _claim(out, base, adapter, layouts)
    finished = [file.name for file in files if (out / file.name).is_file()]
    _reject_small_disk(out, sum(file.stat().st_size for file in files if file.name not in finished))

    total = sum(entry.bytes for layout in layouts.values() for entry in layout.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress, desc="merge") as bar:
        for file in files:
            layout = layouts[file.name]
            if file.name in finished:
                bar.update(sum(entry.bytes for entry in layout.values()))
                continue
            part = out / f".{file.name}.part"
            write_tensors(
                part,
                layout,
                lambda name, file=file: _merged(name, file, adapter / WEIGHTS, plan, config),
                bar,
            )
            fsync(part)
            part.rename(out / file.name)
    _copy_the_rest(base, adapter, out)
    return {
        "tensors": sum(len(layout) for layout in layouts.values()),
        "merged": sum("whole" not in parts for parts in plan.values()),
        "replaced": sum("whole" in parts for parts in plan.values()),
        "bytes": total,
        "skipped_files": finished,
    }


def merge_weight(
    weight: torch.Tensor, module: str, config: LoraConfig, parts: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Merge into one weight with PEFT's own layer, so that the arithmetic is PEFT's to the last bit.

    Args:
        weight: (out, in), the base's; changed in place.
        module: its module's name in the base, for patterns in the configuration.
        config: the adapter's.
        parts: `A` (r, in), `B` (out, r), and with DoRA `magnitude` (out,).

    Returns:
        The merged weight, (out, in) in the base's dtype.
    """
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)
    small = LoraConfig(
        r=parts["A"].shape[0],
        lora_alpha=alpha,
        use_rslora=config.use_rslora,
        use_dora="magnitude" in parts,
        target_modules=["layer"],
    )
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer = inject_adapter_in_model(small, torch.nn.ModuleDict({"layer": linear}))["layer"]
    # PEFT computes in fp32 with an adapter that it loads onto a bf16 base.
    layer.lora_A["default"].weight.data = parts["A"].float()
    layer.lora_B["default"].weight.data = parts["B"].float()
    if "magnitude" in parts:
        layer.lora_magnitude_vector["default"].weight.data = parts["magnitude"].float()
    layer.merge()
    return layer.get_base_layer().weight.data


def _merged(name: str, file: Path, adapter: Path, plan: dict, config: LoraConfig) -> torch.Tensor:
    weight = read_tensor(file, name)
    keys = plan.get(name)
    if keys is None:
        return weight
    parts = {part: read_tensor(adapter, key) for part, key in keys.items()}
    if "whole" in parts:
        return parts["whole"].to(weight.dtype)  # as PeftModel.from_pretrained loads it
    return merge_weight(weight.clone(), name.removesuffix(".weight"), config, parts)


def _plan(file: Path, config: LoraConfig, base: dict) -> dict[str, dict[str, str]]:
    """Say for each tensor of the base that changes which tensors of the adapter go into it: {name: {part: key}}."""
    if config.fan_in_fan_out:
        raise MergeError(
            "The adapter has fan_in_fan_out, which belongs to GPT-2's layers; linear layers were wanted."
        )
    plan, shapes = defaultdict(dict), {}
    for key, entry in _layout(file).items():
        name, part = key.removeprefix(PREFIX), "whole"
        for ending, label in PARTS.items():
            if name.endswith("." + ending):
                name, part = name.removesuffix(ending) + "weight", label
        if name not in base:
            raise MergeError(
                f"{key} of the adapter belongs to {name}, and the base has no such tensor. Merge into the base "
                "that the adapter was trained on, unquantised and with its head and embedding untied."
            )
        plan[name][part] = key
        shapes[name, part] = entry.shape
    for name, parts in plan.items():
        wanted = base[name].shape
        if "whole" in parts:
            found = shapes[name, "whole"]
        else:
            missing = {"A", "B"} - parts.keys()
            if missing or config.use_dora != ("magnitude" in parts):
                raise MergeError(
                    f"{name} has {sorted(parts)} in the adapter; A, B (and with DoRA the magnitude) were wanted."
                )
            found = [shapes[name, "B"][0], shapes[name, "A"][1]]
        if list(found) != list(wanted):
            raise MergeError(
                f"{name} is {list(wanted)} in the base, and the adapter was made for {list(found)}."
            )
    return dict(plan)


def _adapter_config(adapter: Path) -> LoraConfig:
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            raise MergeError(f"{adapter} holds no {name}; wanted the folder of an adapter, as PEFT saves it.")
    try:
        return LoraConfig.from_pretrained(str(adapter))
    except (ValueError, TypeError, AttributeError) as problem:
        raise MergeError(f"{adapter / CONFIG} is not what PEFT writes for LoRA ({problem}).") from None


def _layout(file: Path) -> dict[str, Entry]:
    try:
        return layout_of(file)
    except SafetensorError as problem:
        raise MergeError(
            f"{file} is cut short or damaged ({problem}). Download or copy this file again."
        ) from None


def _weight_files(base: Path) -> list[Path]:
    names = sorted(set(file_of_each_tensor(base).values()))
    for name in names:
        if not (base / name).is_file():
            raise MergeError(f"{base} has no {name}; a base in safetensors was wanted. Download it whole.")
    return [base / name for name in names]


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
    """Copy configuration and tokenizer, the adapter's last; `config.json` after all: nothing loads without it."""
    endings = {".json", ".jinja", ".model", ".txt"}
    for source in (base, adapter):
        for file in source.iterdir():
            ours = file.name in ("config.json", RECORD) or file.name.startswith("adapter_")
            if file.suffix in endings and not ours:
                shutil.copyfile(file, out / file.name)
    shutil.copyfile(base / "config.json", out / "config.json")
    fsync(out)
