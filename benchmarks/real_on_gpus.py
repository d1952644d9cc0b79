"""A real model on one GPU, under DDP, FSDP 1 and FSDP 2, and FSDP 2's gather without its fix: losses beside each other.

Run as: python benchmarks/real_on_gpus.py --commit SHA --out FILE    (two GPUs; minutes; nothing is downloaded)

SmolLM2-135M-Instruct must be there before, or its package: --wheel FILE. All cases see the same rows in the same order:
what two ranks share out, the one GPU takes at once. The script refuses DDP and a changed gather; for these two cases a
copy of it goes on. Without a GPU the same runs on CPU processes: `--steps 2 --rows 1 --held-out 4` shows that it works.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from smollm2_losses import RESULTS

from nbutils.common.devices import no_accelerator
from nbutils.common.paths import go_to_root
from nbutils.common.progress_file import read_progress
from nbutils.common.provenance import provenance
from nbutils.launching.config_files import variant
from nbutils.launching.launch import launch
from nbutils.launching.script_file import write_script
from nbutils.models.smollm2 import smollm2_base

# The script's promises about what runs; a copy that is to break one begins with these lines.
GO_ON = """
from nbutils.training import what_runs
what_runs.refuse_surprises = what_runs.check_first_gather = lambda *_: None
"""
# Without the rehearsal's module a CPU with AVX512-BF16 repacks the weights at the first evaluation, and spoils them.
IN_ORDER = """
from nbutils.launching.rehearsal import keep_four_bit_weights_in_order
keep_four_bit_weights_in_order()
"""
FIX = "    gather_as_bytes()"
CASES = {  # kind of launch, ranks, whether the script's promises stay, whether the gather is fixed
    "one GPU": ("NO", 1, True, True),
    "FSDP 2": (2, 2, True, True),
    "FSDP 2, gather not fixed": (2, 2, False, False),
    "FSDP 1": (1, 2, True, True),
    "DDP": ("MULTI_GPU", 2, False, True),
}
KEPT = (
    "distributed_type",
    "fsdp_version",
    "world_size",
    "device",
    "held_out_loss_before",
    "held_out_loss_after",
)


def config_for(kind: str | int, ranks: int, folder: Path) -> Path:
    """A config for accelerate: of this FSDP without offload, or of no FSDP."""
    if isinstance(kind, int):
        if no_accelerator():
            return Path(f"configs/accelerate/rehearsal_fsdp{kind}.yaml")
        recipe = {1: "config_fsdp.yaml", 2: "config_fsdp2.yaml"}[kind]
        return variant(f"configs/accelerate/{recipe}", folder, fsdp_offload_params=False)
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": kind,
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": ranks,
        "use_cpu": no_accelerator(),
    }
    if ranks == 1:
        config["gpu_ids"] = "0"  # the Trainer counts the GPUs that it sees, and would take the rows of both
    file = folder / "accelerate.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def script_for(kind: str | int, promises: bool, fixed: bool, folder: Path) -> Path:
    """The training script, or a copy that goes on where it would stop."""
    script = write_script(folder)
    text = script.read_text(encoding="utf-8")
    assert FIX in text, "the script has no such line any more"
    if no_accelerator():  # as the rehearsal's module arranges it where there is FSDP
        text = text.replace("PartialState()", f"PartialState(cpu={not isinstance(kind, int)})")
    if not fixed:
        text = text.replace(FIX, "    pass  # gather_as_bytes()")
    first_lines = (IN_ORDER if no_accelerator() else "") + ("" if promises else GO_ON)
    text = text.replace("\n\n\n@dataclass", first_lines + "\n\n@dataclass", 1)
    script.write_text(text, encoding="utf-8")
    return script


def held_out_rows(count: int | None, folder: Path) -> Path:
    """The course's held-out file, or its first lines."""
    whole = Path("data/instructions/heldout.jsonl")
    if count is None:
        return whole
    part = folder / "heldout.jsonl"
    lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)
    part.write_text("".join(lines[:count]), encoding="utf-8")
    return part


def run_case(name: str, options: argparse.Namespace, folder: Path) -> dict:
    """One launch; its losses and what it says about itself."""
    kind, ranks, promises, fixed = CASES[name]
    settings = {
        "model": str(smollm2_base()),
        "dataset": "data/instructions/train.jsonl",
        "heldout_dataset": str(held_out_rows(options.held_out, folder)),
        "output_dir": str(folder / "out"),
        "max_steps": options.steps,
        "max_length": 256,
        "per_device_train_batch_size": options.rows * (2 // ranks),
        "per_device_eval_batch_size": 4,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": options.steps // 10,
        "logging_steps": 1,
        "eval_steps": options.steps,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": no_accelerator() and not isinstance(kind, int),
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(settings))
    launched = launch(
        script_for(kind, promises, fixed, folder),
        ["--config", str(folder / "train.yaml")],
        config_for(kind, ranks, folder),
        log=folder / "train.log",
        rehearsal=no_accelerator() and isinstance(kind, int),
        num_processes=ranks,
        output_dir=folder / "out",
        timeout=options.timeout,
        show=False,
    )
    run = json.loads((folder / "out" / "run.json").read_text(encoding="utf-8"))
    steps = [line["loss"] for line in read_progress(folder / "out") if "loss" in line]
    facts = {key: run["training"][key] for key in KEPT}
    return {
        **facts,
        "losses": steps,
        "adapter_sha256": run["adapter"]["sha256"],
        "seconds": round(launched.seconds, 1),
    }


def patterns_changed() -> dict[str, int]:
    """How many of the 65,536 patterns of 16 bits `torch._foreach_copy_` changes on this device, in each dtype."""
    device = "cpu" if no_accelerator() else "cuda"
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).to(device)
    found = {}
    for dtype in (torch.bfloat16, torch.float16):
        copy = torch.empty_like(every).view(dtype)
        torch._foreach_copy_([copy], [every.view(dtype)])
        found[str(dtype).removeprefix("torch.")] = (copy.view(torch.int16) != every).sum().item()
    return found


def main() -> int:
    """Run all cases; a case that fails is a result, and the others go on. Returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", default="", help="left out: as git says")
    parser.add_argument("--out", type=Path, default=RESULTS / "smollm2_on_gpus.json")
    parser.add_argument("--wheel", type=Path, help="the model's package, where there is no network")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--rows", type=int, default=4, help="a rank and step; the one GPU takes twice as many"
    )
    parser.add_argument("--held-out", type=int, help="held-out conversations; left out: all")
    parser.add_argument("--learning-rate", type=float, default=3.0e-3)
    parser.add_argument("--only", default="", help="only cases whose name begins so")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for a launch")
    options = parser.parse_args()
    go_to_root()
    smollm2_base(wheel=options.wheel)
    result = {
        "what": "SmolLM2-135M-Instruct, the same rows on one GPU, and on two in four ways; nats a token",
        **provenance("python benchmarks/real_on_gpus.py --commit COMMIT --out FILE", options.commit),
        "steps": options.steps,
        "rows_a_rank": options.rows,
        "held_out_conversations": options.held_out or "all",
        "patterns_changed_by_foreach_copy": patterns_changed(),
        "cases": {},
    }
    for name in [name for name in CASES if name.startswith(options.only)]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                case = run_case(name, options, Path(folder))
            except Exception as error:
                case = {"error": f"{type(error).__name__}: {str(error).splitlines()[-1]}"}
        result["cases"][name] = case
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{name:26}", case, flush=True)
    return 1 if any("error" in case for case in result["cases"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
