"""Three learning rates for the real small model, all else as in configs/params/smollm2_135m.yaml.

Run as: python benchmarks/smollm2_learning_rates.py    (some minutes a rate)

A run takes the eight rows of a step on one process, and computes nothing twice: a third of the work of two ranks with
four rows each, for the same rows. Held out are all 76 conversations.
Writes benchmarks/results/smollm2_learning_rates.json. A run that is there already, in runs/smollm2/, is not made again:
`smollm2_merging.py` and `smollm2_answers.py` take their adapters from these runs.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import yaml
from smollm2_losses import write

from nbutils.common.progress_file import read_progress

PARAMS = "configs/params/smollm2_135m.yaml"
RATES = ("2.0e-4", "1.0e-3", "3.0e-3")
RUNS = Path("runs/smollm2")


ONE_PROCESS = {"activation_checkpointing": False}  # there is memory for it


def run_folder(rate: str) -> Path:
    """Where the run with this rate is."""
    return RUNS / f"lr_{rate}"


def train(rate: str) -> Path:
    """Notebook 04 with this rate, unless it has been run; the folder of its training."""
    folder = run_folder(rate)
    if not (folder / "train" / "run.json").is_file():
        words = [
            "run",
            "--params",
            PARAMS,
            "--only",
            "04",
            "--run-dir",
            str(folder),
            "-p",
            "learning_rate",
            rate,
        ]
        goal = RUNS / "one_process.yaml"
        goal.parent.mkdir(parents=True, exist_ok=True)
        goal.write_text(yaml.safe_dump(ONE_PROCESS))
        words += ["-p", "num_processes", "1", "-p", "batch_size", "8", "-p", "goal", str(goal)]
        words += ["-p", "eval_rows", "0"]  # all of them, as in the other records
        subprocess.run([sys.executable, "-m", "nbutils", *words], check=True)
    return folder / "train"


def row(rate: str, folder: Path) -> dict:
    """What one run says about itself."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    training = run["training"]
    kept = ("world_size", "fsdp_version", "loss_first", "loss_last")
    return {
        "learning_rate": float(rate),
        "held_out_loss_before": round(training["held_out_loss_before"], 4),
        "held_out_loss_after": round(training["held_out_loss_after"], 4),
        "held_out_loss_by_step": {
            line["step"]: round(line["eval_loss"], 4) for line in read_progress(folder) if "eval_loss" in line
        },
        **{name: training[name] for name in kept},
        "adapter_tensors_verified": run["adapter"]["tensors"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=RATES, help="make this run, and record nothing yet")
    parser.add_argument("--rates", nargs="+", choices=RATES, default=RATES, help="the runs to record")
    options = parser.parse_args()
    if options.only:
        train(options.only)
        return
    write(
        "smollm2_learning_rates",
        f"python benchmarks/smollm2_learning_rates.py --rates {' '.join(options.rates)}",
        "SmolLM2-135M-Instruct, 40 steps of the training script at several learning rates; nats a token",
        parameters=PARAMS,
        runs=[row(rate, train(rate)) for rate in options.rates],
    )


if __name__ == "__main__":
    main()
