"""GPU and host memory of the streaming loader at 70B width, and its bits beside those of transformers.

Run as: python benchmarks/loading_on_gpu.py --layers 2 --commit SHA --out FILE
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from nbutils.common.paths import go_to_root
from nbutils.common.provenance import provenance
from nbutils.models.loading import load_nf4
from nbutils.models.nf4 import nf4_config
from nbutils.planning.shapes import Shape, config_of, shape_of


def write_bf16(shape: Shape, folder: str) -> int:
    """Write a random bf16 checkpoint in shards of 2 GB; bytes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config_of(shape))
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="2GB")
    return sum(p.numel() * 2 for p in model.parameters())


def same_bits(ours: torch.nn.Module, theirs: torch.nn.Module) -> int:
    """Compare every weight and every part of a quantisation state; the number of tensors compared."""
    expected = theirs.state_dict()
    found = ours.state_dict()
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:3]
    for name, tensor in found.items():
        other = expected[name].cpu()
        same = tensor.dtype == other.dtype and tensor.shape == other.shape
        # compared as bytes: packed weights seen as bf16 hold NaNs, and a NaN equals nothing
        if not same or not torch.equal(tensor.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8)):
            raise SystemExit(f"{name} differs: {tensor.dtype} {tuple(tensor.shape)} and {other.dtype}")
    return len(found)


def main() -> None:
    """Write, load, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--model", default="llama31_70b")
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    go_to_root()
    shape = replace(shape_of(options.model), layers=options.layers)
    with tempfile.TemporaryDirectory() as folder:
        size = write_bf16(shape, folder)
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        began = time.monotonic()
        model = load_nf4(folder)
        seconds = time.monotonic() - began
        peak = torch.cuda.max_memory_allocated() - before if on_gpu else None
        host = psutil.Process().memory_full_info()
        theirs = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=nf4_config(),
            dtype=torch.bfloat16,
            device_map={"": 0 if on_gpu else "cpu"},
        )
        compared = same_bits(model, theirs)
    result = {
        "what": "the streaming loader at 70B width, from bf16, and its bits beside from_pretrained's",
        **provenance(f"python benchmarks/loading_on_gpu.py --layers {options.layers}", options.commit),
        "checkpoint_bytes": size,
        "seconds": round(seconds, 2),
        "gpu_peak_bytes": peak,
        "host_unique_bytes": host.uss,
        "tensors_equal_bit_for_bit": compared,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in list(result)[6:]}))


if __name__ == "__main__":
    main()
