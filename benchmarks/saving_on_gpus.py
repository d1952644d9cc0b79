"""Save, verify and resume with the real script over NCCL: offload on and off, FSDP 1 and 2.

Run as: python benchmarks/saving_on_gpus.py --model FOLDER --commit "$(git rev-parse --short HEAD)" --out FILE

The script compares every tensor on disk with what each rank holds, bit for bit. Here each configuration also runs a
second time: the last checkpoint and the adapter are taken away, and the run resumes from the checkpoint before.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import yaml
from accelerate.commands.config.config_args import load_config_from_file

from nbutils.common.paths import go_to_root
from nbutils.common.progress_file import read_progress
from nbutils.common.provenance import provenance
from nbutils.launching.launch import launch
from nbutils.launching.script_file import write_script

STEPS, EVERY = 8, 4
FSDP1 = "configs/accelerate/config_fsdp.yaml"
FSDP2 = "configs/accelerate/config_fsdp2.yaml"
FASTEST = {"embeddings_on_host": True, "compile_layers": True}  # as configs/goals/fastest_2x24gb.yaml
CASES = {  # accelerate config, its changed keys, and settings of the script
    "FSDP 1, offload": (FSDP1, {}, {}),
    "FSDP 1, no offload": (FSDP1, {"fsdp_offload_params": False}, {}),
    "FSDP 2, no offload": (FSDP2, {}, {}),
    "FSDP 2, offload, as fastest_2x24gb": ("configs/accelerate/config_fsdp2_offload.yaml", {}, FASTEST),
}


def changed_config(file: str, changes: dict, folder: Path) -> Path:
    """A copy of an accelerate config with some FSDP keys changed."""
    config = load_config_from_file(file)
    config.fsdp_config.update(changes)
    path = folder / "accelerate.yaml"
    config.to_yaml_file(str(path))
    return path


def losses(folder: Path) -> list[float]:
    """The training losses in the order of the steps; the last one written counts."""
    seen = {line["step"]: line["loss"] for line in read_progress(folder) if "loss" in line}
    return [seen[step] for step in sorted(seen)]


def run_case(model: str, file: str, changes: dict, more: dict, folder: Path) -> dict:
    """Train, look, take the end away, resume, and look again."""
    script, config = write_script(folder), changed_config(file, changes, folder)
    output = folder / "out"
    settings = {
        "model": model,
        "dataset": "data/instructions/train.jsonl",
        "heldout_dataset": "data/instructions/heldout.jsonl",
        "output_dir": str(output),
        "max_steps": STEPS,
        "save_steps": EVERY,
        "max_length": 128,
        "per_device_train_batch_size": 4,
        "learning_rate": 5.0e-3,
        "logging_steps": 1,
        "eval_steps": STEPS,
        "disable_tqdm": True,
    } | more
    (folder / "train.yaml").write_text(yaml.safe_dump(settings))
    rows = []
    for resume in ("false", "true"):
        arguments = ["--config", str(folder / "train.yaml"), "--resume", resume]
        launch(
            script,
            arguments,
            config,
            log=folder / f"{resume}.log",
            output_dir=output,
            timeout=240,
            show=False,
        )
        adapter = json.loads((output / "run.json").read_text())["adapter"]
        rows.append({"losses": losses(output), **{k: v for k, v in adapter.items() if k != "path"}})
        if resume == "false":
            shutil.rmtree(output / f"checkpoint-{STEPS}")
            shutil.rmtree(output / "adapter")
            (output / "run.json").unlink()
    first, resumed = rows
    return {
        "uninterrupted": first,
        "resumed": resumed,
        "same_adapter": first["sha256"] == resumed["sha256"],
        "largest_loss_difference": max(
            abs(a - b) for a, b in zip(first["losses"][EVERY:], resumed["losses"][-EVERY:])
        ),
    }


def main() -> int:
    """Run all cases, keep what each gave or how it failed, and print a table; return 1 if one failed."""
    parser = argparse.ArgumentParser(description="Save, verify and resume over NCCL.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="only cases whose name begins so")
    options = parser.parse_args()
    go_to_root()
    result = {
        "what": "the real script on the tiny base: saved, verified on every rank, resumed",
        **provenance(
            "python benchmarks/saving_on_gpus.py --model FOLDER --commit COMMIT --out FILE", options.commit
        ),
        "cases": {},
    }
    for name, (file, changes, more) in CASES.items():
        if not name.startswith(options.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                case = run_case(options.model, file, changes, more, Path(folder))
            except Exception as error:  # a failure is a result; the other cases go on
                case = {"error": f"{type(error).__name__}: {str(error).splitlines()[-1]}"}
        result["cases"][name] = case
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(
            f"{name:38}",
            case.get("error") or {k: v for k, v in case.items() if not isinstance(v, dict)},
            flush=True,
        )
    return 1 if any("error" in case for case in result["cases"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
