"""Safetensors files one tensor at a time: the library reads them so, and here is the writer that it does not have.

The format: 8 bytes with the header's length, a header in JSON with each tensor's dtype, shape and place, then the
tensors' bytes one after another (https://github.com/huggingface/safetensors, "Format").
"""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1,
         "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip
DTYPES = {"F64": torch.float64, "I64": torch.int64, "F32": torch.float32, "I32": torch.int32,
          "BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16, "U8": torch.uint8, "I8": torch.int8,
          "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its dtype by the format's name (`BF16`), and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * BYTES[self.dtype]


def layout_of(file: str | Path) -> dict[str, Entry]:
    """Read which tensors a file holds, and none of them."""
    with safe_open(file, "pt") as opened:
        views = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        return {name: Entry(view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}


def read_tensor(file: str | Path, name: str) -> torch.Tensor:
    """Map one tensor from its file, and close the file: left open, every page ever read would count as memory."""
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def write_tensors(
    file: Path, layout: dict[str, Entry], tensor: Callable[[str], torch.Tensor], bar=None
) -> None:
    """Write a file while holding one tensor at a time.

    Args:
        file: where to write.
        layout: what it will hold.
        tensor: gives the tensor of a name, in the dtype and shape of the layout.
        bar: a tqdm bar that is told the bytes written.

    Raises:
        ValueError: `tensor` gave something else than the layout says.
    """
    # The widest dtype first, so that each tensor begins at a multiple of its own width.
    names = sorted(layout, key=lambda name: (-BYTES[layout[name].dtype], name))
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        entry = layout[name]
        header[name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [place, place + entry.bytes],
        }
        place += entry.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with Path(file).open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            value, entry = tensor(name), layout[name]
            if (value.dtype, tuple(value.shape)) != (DTYPES[entry.dtype], entry.shape):
                raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}; the layout says {entry}.")
            out.write(memoryview(value.contiguous().reshape(-1).view(torch.uint8).numpy()))
            del value  # or it would lie beside the next one
            if bar is not None:
                bar.update(entry.bytes)
