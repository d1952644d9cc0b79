"""Quantise once: write a checkpoint whose linear layers are NF4 in bf16 storage, so that later runs load in minutes."""

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import BitsAndBytesConfig, PretrainedConfig

from nbutils.models.safetensors_reader import INDEX

SHARD_BYTES = 500e6  # about one layer of 70B: a file is unmapped when the last tensor in it has been used
PIECE = 2**20  # weights that a CPU quantises at a time; a multiple of the 64 of a block
WRITERS = 4  # shards that are written at the same time


def nf4_config(storage: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """The 4-bit settings of QLoRA (NF4, double quantisation), stored so that FSDP can flatten them.

    Args:
        storage: dtype in which the packed 4-bit values are kept. FSDP 1 flattens a unit only if this equals the
            dtype of the unit's other weights; the default of bitsandbytes, uint8, cannot be flattened at all.

    Returns:
        The configuration for `from_pretrained`.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=storage,
    )


def quantise_tensor(weight: torch.Tensor, device: torch.device | str) -> tuple[torch.Tensor, bnb.QuantState]:
    """Quantise one weight to NF4 with double quantisation, exactly as transformers lets bitsandbytes do it.

    Blocks of 64 weights share one scale; the scales of 256 blocks are themselves quantised to 8 bits
    (QLoRA, arXiv 2305.14314, section 3).

    Args:
        weight: `(out_features, in_features)`, bf16.
        device: where to compute; a GPU does in seconds what takes a CPU minutes.

    Returns:
        The packed weight, bf16 storage, shape `(out_features * in_features / 4, 1)`, and its quantisation state, both
        on `device`.
    """
    weight = weight.to(device).contiguous()
    settings = {"blocksize": 64, "quant_type": "nf4", "quant_storage": torch.bfloat16}
    if weight.device.type != "cpu":
        return bnb.quantize_4bit(weight, compress_statistics=True, **settings)
    # On a CPU bitsandbytes works with about 20 bytes a weight on the side: 5 GB for one of 70B. Blocks do not depend on
    # each other, so piece by piece gives the same bytes; only the scales of all blocks are quantised together.
    pieces = [
        bnb.quantize_4bit(piece, compress_statistics=False, **settings)
        for piece in weight.view(-1).split(PIECE)
    ]
    packed = torch.cat([packed for packed, _ in pieces])
    absmax = torch.cat([state.absmax for _, state in pieces])
    offset = absmax.mean()
    state = pieces[0][1]
    state.absmax, state.state2 = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    state.shape, state.offset, state.nested = weight.shape, offset, True
    return packed, state


def write_nf4(
    folder: str | Path,
    config: PretrainedConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    linear_weights: set[str],
    device: torch.device | str = "cpu",
) -> int:
    """Write an NF4 checkpoint that both `load_nf4` and plain transformers read.

    Args:
        folder: made if missing.
        config: of the model; the quantisation settings are added to what is written.
        tensors: pairs of name and bf16 tensor, one after the other; only a few are in memory at a time.
        linear_weights: names of those that become NF4.
        device: where to quantise.

    Returns:
        Bytes written.

    Raises:
        OSError: a shard could not be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _Shards(folder)
    with shards.pool:  # whatever happens, nobody writes any more when this returns
        for name, tensor in tensors:
            if name in linear_weights:
                packed, state = quantise_tensor(tensor, device)
                parts = {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
                shards.add({name: packed, **parts})
            else:
                shards.add({name: tensor.to(torch.bfloat16)})
        total = shards.close()
    config.quantization_config = nf4_config()
    config.save_pretrained(folder)
    return total


def progress(total: int, what: str) -> tqdm:
    """A bar over the bytes of a checkpoint, with GB/s and the time left; one a machine, and none below a gigabyte.

    Args:
        total: bytes.
        what: stands before the bar.
    """
    hidden = total < 1e9 or os.environ.get("LOCAL_RANK", "0") != "0"
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=hidden, mininterval=1.0)


class _Shards:
    """Collect tensors into files of about `SHARD_BYTES`, and write them in the background."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, torch.Tensor] = {}
        self.bytes = self.total = 0
        self.weight_map: dict[str, str] = {}
        self.pool = ThreadPoolExecutor(WRITERS)
        self.pending = []
        self.count = 0

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take the parts of one weight; they stay in one file."""
        for name, tensor in tensors.items():
            self.tensors[name] = tensor.cpu().contiguous()
            self.bytes += tensor.numel() * tensor.element_size()
        if self.bytes >= SHARD_BYTES:
            self._flush()

    def close(self) -> int:
        if self.tensors:
            self._flush()
        for job in self.pending:
            job.result()
        index = {"metadata": {"total_size": self.total}, "weight_map": self.weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        return self.total

    def _flush(self) -> None:
        self.count += 1
        file = f"model-{self.count:05d}.safetensors"
        self.weight_map |= dict.fromkeys(self.tensors, file)
        self.pending.append(self.pool.submit(_save, self.tensors, self.folder / file))
        if len(self.pending) > WRITERS:
            self.pending.pop(0).result()
        self.total += self.bytes
        self.tensors, self.bytes = {}, 0


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    try:
        save_file(tensors, file, {"format": "pt"})
    except SafetensorError as problem:  # a full disk, most likely
        raise OSError(
            f"{file} could not be written ({problem}). Make room, or name another folder."
        ) from None
