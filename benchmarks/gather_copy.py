"""Which of the copies that FSDP can gather with leave packed 4-bit weights as they are? On a GPU and on a CPU.

Run as: python benchmarks/gather_copy.py --commit SHA --out FILE    (seconds; without a GPU it shows the CPU only)

Two inputs in bf16, shape (n,): every pattern of 16 bits once, and the packed NF4 weights of a random linear layer. Each
is copied by `torch._foreach_copy_` as bf16, as FSDP 2 fills the buffer of a gather; by the same call as bytes; and by
`Tensor.copy_`. What is counted is the patterns and bytes that came out as others.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from nbutils.common.provenance import provenance

SHAPE = (8192, 8192)  # q_proj of Llama 3.1 70B


def as_numbers(source: torch.Tensor, target: torch.Tensor) -> None:
    """Two tensors in one call, as FSDP 2 gives it the parts of a unit."""
    torch._foreach_copy_(list(target.chunk(2)), list(source.chunk(2)))


def as_bytes(source: torch.Tensor, target: torch.Tensor) -> None:
    """The same call over the same memory, seen as uint8."""
    as_numbers(source.view(torch.uint8), target.view(torch.uint8))


def plain(source: torch.Tensor, target: torch.Tensor) -> None:
    """`Tensor.copy_`, which copies memory where the dtypes are equal."""
    target.copy_(source)


COPIES = {
    "torch._foreach_copy_ of bf16": as_numbers,
    "torch._foreach_copy_ of uint8": as_bytes,
    "Tensor.copy_ of bf16": plain,
}


def copied(source: torch.Tensor, copy) -> torch.Tensor:
    """What the copy makes of `source`."""
    target = torch.empty_like(source)
    copy(source, target)
    return target


def changes(source: torch.Tensor, target: torch.Tensor) -> dict:
    """How many patterns and bytes of `source` are others in `target`, and how many patterns are NaN in bf16."""
    before, after = source.view(torch.int16), target.view(torch.int16)
    return {
        "patterns": source.numel(),
        "nan": source.isnan().sum().item(),
        "patterns_changed": (before != after).sum().item(),
        "bytes_changed": (source.view(torch.uint8) != target.view(torch.uint8)).sum().item(),
        "distinct_results_of_changed": after[before != after].unique().numel(),
    }


def milliseconds(source: torch.Tensor, copy) -> float:
    """Of one copy, the mean of 20 after 3."""
    target = torch.empty_like(source)
    for step in range(23):
        if step == 3:
            torch.cuda.synchronize()
            started = time.perf_counter()
        copy(source, target)
    torch.cuda.synchronize()
    return round((time.perf_counter() - started) / 20 * 1000, 4)


def on(device: str) -> dict:
    """All copies of both inputs on one device."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(device)
    torch.manual_seed(0)
    shape = SHAPE if device == "cuda" else (1024, 1024)
    weight = (torch.randn(shape) * 0.02).bfloat16().to(device)
    packed, state = quantize_4bit(
        weight, quant_type="nf4", compress_statistics=True, quant_storage=torch.bfloat16
    )
    packed = packed.flatten()
    whole = dequantize_4bit(packed, state).float()
    result = {}
    for name, copy in COPIES.items():
        target = copied(packed, copy)
        patterns, layer = changes(every, copied(every, copy)), changes(packed, target)
        other = dequantize_4bit(target, state).float()
        layer["weights"] = whole.numel()
        layer["weights_changed"] = (whole != other).sum().item()
        layer["error_relative_to_weights"] = ((whole - other).norm() / whole.norm()).item()
        result[name] = {"every_pattern": patterns, "packed_nf4": layer}
        if device == "cuda":
            result[name]["milliseconds_packed_nf4"] = milliseconds(packed, copy)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", default="", help="left out: as git says")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gather_copy.json"))
    options = parser.parse_args()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    result = {
        "what": "what a copy in the gather does to packed 4-bit weights that are stored as bf16",
        **provenance("python benchmarks/gather_copy.py --commit COMMIT --out FILE", options.commit),
        "devices": {device: on(device) for device in devices},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["devices"], indent=1))


if __name__ == "__main__":
    main()
