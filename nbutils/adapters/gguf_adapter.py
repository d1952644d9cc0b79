"""Write an adapter for llama.cpp: a GGUF file that `llama-server --lora` puts on a GGUF base, without any merge.

Two things differ from PEFT's file. llama.cpp scales `B @ A` by alpha / rank with one alpha for all tensors, so what
rsLoRA and alpha patterns add goes into B. And it turns pairs of neighbours in the rotary embedding, where transformers
turns the two halves of a head: the rows of the base's q_proj and k_proj lie in another order there, and so must B's.
(llama.cpp, src/llama-adapter.cpp and convert_hf_to_gguf.py, LlamaModel.permute; gguf specification, ggml docs/gguf.md)
"""

import math
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from peft import LoraConfig

from nbutils.adapters.lora_config import WEIGHTS, UnsupportedAdapter, alpha_of, rank_of, read_lora_config
from nbutils.adapters.merge_plan import Parts, layout, plan_merge
from nbutils.common.disk import fsync
from nbutils.common.paths import ROOT
from nbutils.models.hub import local_folder, read_config
from nbutils.models.safetensors_writer import Entry, read_tensor
from nbutils.planning.shapes import Shape, shape_of

DTYPES = {"f32": gguf.GGMLQuantizationType.F32, "bf16": gguf.GGMLQuantizationType.BF16}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class GgufError(RuntimeError):
    """The adapter was not written for llama.cpp. Nothing of that name is there."""


def write_gguf(
    adapter: str | Path, out: str | Path, base: str | Path | None = None, dtype: str = "f32"
) -> dict:
    """Write a LoRA adapter as GGUF, read it back, and compare it with the adapter before it takes its name.

    Memory holds one tensor at a time.

    Args:
        adapter: the adapter's folder: LoRA on a Llama's linear layers, rsLoRA and patterns of rank and alpha included.
        out: a new file.
        base: folder or hub id of the base, of which the configuration alone is read; left out: as the adapter names it.
        dtype: of A and B, `f32` or `bf16`; the second halves the file and rounds.

    Returns:
        `tensors`, `bytes` of the file, and `permuted` (how many B have their rows in llama.cpp's order).

    Raises:
        UnsupportedAdapter: the adapter asks for what llama.cpp cannot do; the field or the tensor is named.
        MergeError: the adapter's file does not fit its configuration or its base.
        GgufError: `out` is there already, or what was written is not what was to be written.
        BadCheckpoint, CannotDownload: the base's configuration cannot be read.
    """
    adapter, out = Path(adapter), Path(out)
    if out.exists():
        raise GgufError(f"{out} exists already, and nothing is overwritten. Name a new file.")
    config = read_lora_config(adapter)
    shape = _shape_of_base(adapter, config, base)
    plan = _plan(adapter, config, shape)
    part = out.with_name(f".{out.name}.part")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(part, adapter, config, shape, plan, DTYPES[dtype])
        _compare(part, adapter, config, shape, plan, exact=dtype == "f32")
        fsync(part)
        part.rename(out)
    finally:
        part.unlink(missing_ok=True)
    fsync(out.parent)
    permuted = sum(heads_of(module, shape) is not None for module in plan)
    return {"tensors": 2 * len(plan), "bytes": out.stat().st_size, "permuted": permuted}


def b_factor(config: LoraConfig, module: str) -> float:
    """What B is multiplied with, so that llama.cpp's `lora_alpha / rank` becomes the scaling of PEFT; 1 for plain LoRA.

    Args:
        config: the adapter's.
        module: its name in the base.
    """
    rsloras = math.sqrt(rank_of(config, module)) if config.use_rslora else 1.0
    return alpha_of(config, module) / config.lora_alpha * rsloras


def heads_of(module: str, shape: Shape) -> int | None:
    """The heads whose rows llama.cpp orders in another way: those of q_proj and k_proj; None for other modules."""
    return {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(module.rpartition(".")[2])


def to_neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """Put the rows of each head from the order of two halves into that of neighbouring pairs.

    Args:
        rows: (heads * head_dim, rank); row i and row i + head_dim / 2 of a head are turned together.
        heads: of queries, or of keys.

    Returns:
        The same rows, those that are turned together one after the other.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _shape_of_base(adapter: Path, config: LoraConfig, base: str | Path | None) -> Shape:
    name = base or config.base_model_name_or_path
    if not name:
        raise GgufError(f"{adapter} does not name its base. Name it: --base FOLDER, or a hub id.")
    if not Path(name).is_dir() and (ROOT / name).is_dir():  # as a run in the root wrote it down
        name = ROOT / name
    folder = local_folder(name, weights=False)
    settings = read_config(folder)
    if settings.get("model_type") != "llama":
        raise UnsupportedAdapter(
            f"{folder} is a {settings.get('model_type')}; a llama was wanted. Names and row order were made for it."
        )
    return shape_of(folder)


def _plan(adapter: Path, config: LoraConfig, shape: Shape) -> dict[str, Parts]:
    """The parts by module; refuses every tensor that is no A or B of a linear layer."""
    if not config.lora_alpha:
        raise UnsupportedAdapter(
            f"{adapter} has lora_alpha: 0; an adapter that counts for something was wanted."
        )
    if config.use_dora:
        raise UnsupportedAdapter(
            f"{adapter} has use_dora: true, and llama.cpp knows no magnitudes. Merge it instead: "
            "python -m nbutils merge BASE ADAPTER FOLDER"
        )
    if not (adapter / WEIGHTS).is_file():
        raise GgufError(f"{adapter} holds no {WEIGHTS}; wanted the folder of an adapter, as PEFT saves it.")
    entries, linears = layout(adapter / WEIGHTS), _linears(shape)
    foreign = sorted(
        key
        for key in entries
        if not key.endswith((".lora_A.weight", ".lora_B.weight")) or ".layers." not in key
    )
    if foreign:
        raise UnsupportedAdapter(
            f"{foreign[0]} is no LoRA on a linear layer of a decoder layer, and nothing else is converted "
            "(no modules_to_save, biases, embedding or head). Merge it instead: "
            "python -m nbutils merge BASE ADAPTER FOLDER"
        )
    plan = plan_merge(entries, config, linears, tied=False)
    return {name.removesuffix(".weight"): parts for name, parts in plan.items()}


def _linears(shape: Shape) -> dict[str, Entry]:
    rooms = {name: "self_attn" if name in ATTENTION else "mlp" for name in shape.linears}
    return {
        f"model.layers.{layer}.{rooms[name]}.{name}.weight": Entry("BF16", size)
        for layer in range(shape.layers)
        for name, size in shape.linears.items()
    }


def _tensors(adapter: Path, config: LoraConfig, shape: Shape, plan: dict[str, Parts]) -> Iterator[np.ndarray]:
    """The fp32 values of each tensor of the GGUF file, in its order: A and B of one module after the other."""
    for module, parts in plan.items():
        yield _read(adapter, parts.keys["A"])
        b = _read(adapter, parts.keys["B"]) * np.float32(b_factor(config, module))
        heads = heads_of(module, shape)
        yield b if heads is None else to_neighbours(b, heads)


def _read(adapter: Path, key: str) -> np.ndarray:
    return read_tensor(adapter / WEIGHTS, key).to(torch.float32).numpy()


def _write(part: Path, adapter: Path, config: LoraConfig, shape: Shape, plan: dict, kind) -> None:
    writer = gguf.GGUFWriter(part, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config.lora_alpha))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.layers)
    for module, parts in plan.items():
        for letter in "AB":
            size = math.prod(parts.shapes[letter]) * (4 if kind is DTYPES["f32"] else 2)
            name = f"{names.get_name(module)}.weight.lora_{letter.lower()}"
            writer.add_tensor_info(name, parts.shapes[letter], np.dtype(np.float32), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in _tensors(adapter, config, shape, plan):
        writer.write_tensor_data(values if kind is DTYPES["f32"] else gguf.quantize(values, kind))
    writer.close()


def _compare(part: Path, adapter: Path, config: LoraConfig, shape: Shape, plan: dict, exact: bool) -> None:
    """Read the file back, undo what was done to each B, and compare with the adapter."""
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(part).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.layers)
    if len(held) != 2 * len(plan):
        raise GgufError(f"{part} holds {len(held)} tensors; {2 * len(plan)} were written. Write it again.")
    for module, parts in plan.items():
        for letter in "AB":
            name = f"{names.get_name(module)}.weight.lora_{letter.lower()}"
            found = torch.from_numpy(np.array(gguf.dequantize(held[name].data, held[name].tensor_type)))
            heads = heads_of(module, shape)
            if letter == "B" and heads is not None:
                found = found.view(heads, -1, 2, found.shape[1]).transpose(1, 2).reshape(found.shape)
            factor = b_factor(config, module) if letter == "B" else 1.0
            wanted = read_tensor(adapter / WEIGHTS, parts.keys[letter]).float()
            near = 1e-6 if exact else 2**-8
            if not torch.allclose(found, wanted * factor, rtol=near, atol=0):
                raise GgufError(
                    f"{name} in {part} is not {parts.keys[letter]} of the adapter. Write it again."
                )
