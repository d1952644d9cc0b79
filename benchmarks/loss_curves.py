"""Loss curves of each setting that saves time or memory, beside those of the recipe of 2024: who changes the numbers?

Run as: python benchmarks/loss_curves.py --out benchmarks/results/loss_curves.json      (7 minutes on two busy cores)

The real script on two CPU processes with the tiny base. All runs see the same rows in the same order. The last two
begin with another adapter, or read the rows in another order: that is the noise to compare with.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from nbutils.common.paths import go_to_root
from nbutils.common.provenance import provenance
from nbutils.launching.launch import choose_config, launch
from nbutils.launching.script_file import write_script
from nbutils.models.tiny import tiny_base

SETTINGS = {
    "dataset": "data/instructions/train.jsonl",
    "heldout_dataset": "data/instructions/heldout.jsonl",
    "max_steps": 40,
    "max_length": 128,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "learning_rate": 5.0e-3,
    "lora_r": 8,
    "logging_steps": 1,
    "eval_steps": 10,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 0,
    "data_seed": 0,
}
EVERY_SECOND = {"activation_checkpointing_kwargs": {"use_reentrant": False, "every_n_layers": 2}}
BASELINE = "FSDP 1, as in 2024"
# Name of the run: version of FSDP, and what differs in the settings.
RUNS = {
    BASELINE: (1, {}),
    "the same once more": (1, {}),
    "FSDP 2": (2, {}),
    "FSDP 2, embeddings_on_host": (2, {"embeddings_on_host": True}),
    "FSDP 2, compile_layers": (2, {"compile_layers": True}),
    "FSDP 2, every second layer checkpointed": (2, EVERY_SECOND),
    "FSDP 2, no checkpoints": (2, {"activation_checkpointing": False}),
    "noise: another adapter to begin with": (1, {"seed": 1}),
    "noise: another order of the rows": (1, {"data_seed": 1}),
}


def train(folder: Path, fsdp_version: int, changes: dict) -> dict:
    """Run the script; its losses in full precision, and the adapter's checksum."""
    output = folder / "out"
    settings = {"model": str(tiny_base()), "output_dir": str(output), **SETTINGS, **changes}
    script = write_script(folder)
    (folder / "train.yaml").write_text(yaml.safe_dump(settings))
    config = choose_config(fsdp_version, rehearsal=True)
    done = launch(
        script,
        ["--config", str(folder / "train.yaml")],
        config,
        rehearsal=True,
        log=folder / "train.log",
        output_dir=output,
        show=False,
    )
    run = json.loads((output / "run.json").read_text())
    return {
        "config": str(config),
        "changes": changes,
        "losses": [line["loss"] for line in done.progress if "loss" in line],
        "held_out": [line["eval_loss"] for line in done.progress if "eval_loss" in line],
        "adapter_sha256": run["adapter"]["sha256"],
        "fsdp_version": run["training"]["fsdp_version"],
        "activation_checkpointing": run["training"]["activation_checkpointing"],
        "seconds": round(done.seconds, 1),
    }


def compare(run: dict, baseline: dict) -> dict:
    """The largest differences of two curves, and whether every number and the adapter are the same."""
    furthest = {
        name: max(abs(one - other) for one, other in zip(run[name], baseline[name], strict=True))
        for name in ("losses", "held_out")
    }
    return {
        "largest_difference": furthest["losses"],
        "largest_difference_held_out": furthest["held_out"],
        "losses_identical": not any(furthest.values()),
        "adapter_identical": run["adapter_sha256"] == baseline["adapter_sha256"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/loss_curves"))
    options = parser.parse_args()
    go_to_root()
    tiny_base()
    command = "python benchmarks/loss_curves.py --out benchmarks/results/loss_curves.json"
    report = {
        "what": "Losses of the real script at tiny size, two CPU processes, each setting beside the recipe of 2024",
        **provenance(command),
        "settings": SETTINGS,
        "runs": {},
    }
    runs = report["runs"]
    print(f"{'':40} first    last     held out  furthest from the baseline: step, held out; adapter")
    for number, (name, (fsdp_version, changes)) in enumerate(RUNS.items()):
        run = train(options.folder / str(number), fsdp_version, changes)
        runs[name] = run | compare(run, runs.get(BASELINE, run))
        row = runs[name]
        if fsdp_version == 2:
            row["against_fsdp_2"] = compare(run, runs["FSDP 2"])
        print(
            f"{name:40} {row['losses'][0]:.4f}   {row['losses'][-1]:.4f}   {row['held_out'][-1]:.4f}    "
            f"{row['largest_difference']:.5f}, {row['largest_difference_held_out']:.5f}; "
            f"{'the same bits' if row['adapter_identical'] else 'differs'}",
            flush=True,
        )
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
