"""Peak host memory of a merge with the tensors of Llama 3.1 70B, at two numbers of layers.

Run as: python benchmarks/merge_memory.py --out benchmarks/results/merge_memory.json   (needs 22 GB of disk, minutes)

The weights are synthetic: the memory of a merge does not depend on their values. What is measured is the growth of the
process's high-water mark (VmHWM) over its size before the merge; file pages that were read count as well.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from nbutils.adapters.lora_config import WEIGHTS
from nbutils.adapters.merge import merge
from nbutils.common.provenance import provenance

HIDDEN, INTERMEDIATE, VOCABULARY, KV = 8192, 28672, 128256, 1024
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN), "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}  # fmt: skip
RANK = 16


def make(folder: Path, layers: int) -> None:
    """Write a base of so many layers, one file a layer, and an adapter on its seven projections."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    (base / "config.json").write_text("{}")
    files = [
        {f"model.layers.{i}.{name}.weight": shape for name, shape in LAYER.items()} for i in range(layers)
    ]
    files += [{"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}]
    index, low = {}, {}
    for number, shapes in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        save_file(
            {key: torch.full(shape, 0.01, dtype=torch.bfloat16) for key, shape in shapes.items()}, base / name
        )
        index |= dict.fromkeys(shapes, name)
        for key, (outputs, inputs) in shapes.items():
            if "layers" in key:
                stem = "base_model.model." + key.removesuffix(".weight")
                low[f"{stem}.lora_A.weight"] = torch.full((RANK, inputs), 0.01, dtype=torch.bfloat16)
                low[f"{stem}.lora_B.weight"] = torch.full((outputs, RANK), 0.01, dtype=torch.bfloat16)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    save_file(low, adapter / WEIGHTS)
    LoraConfig(r=RANK, target_modules=[name.split(".")[1] for name in LAYER]).save_pretrained(adapter)


def status(name: str) -> int:
    """A figure of this process from the kernel, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure(folder: Path) -> None:
    """Merge in this process and print what it took."""
    Path("/proc/self/clear_refs").write_text("5")
    before, started = status("VmRSS"), time.monotonic()
    done = merge(folder / "base", folder / "adapter", folder / "out", progress=False)
    facts = {
        "before": before,
        "peak": status("VmHWM"),
        "model_bytes": done["bytes"],
        "merged": done["merged"],
    }
    print(json.dumps(facts | {"seconds": round(time.monotonic() - started, 1)}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="a disk with room")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--measure", type=Path)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    rows = []
    for layers in options.layers:
        folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="merge_memory_"))
        try:
            make(folder, layers)
            command = [sys.executable, __file__, "--measure", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"layers": layers, **json.loads(done.stdout.splitlines()[-1])})
        finally:
            shutil.rmtree(folder)
        print(rows[-1], flush=True)
    result = {
        "what": "Peak host memory of a merge with tensors of the shapes of Llama 3.1 70B",
        **provenance("python benchmarks/merge_memory.py --out FILE"),
        "largest_tensor_bytes": VOCABULARY * HIDDEN * 2,
        "largest_merged_tensor_bytes": HIDDEN * INTERMEDIATE * 2,
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
