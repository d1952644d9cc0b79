"""The sweep of lesson 06: the training script at several learning rates, on a model small enough to try them."""

import shutil
from pathlib import Path

import matplotlib.pyplot as plt

from nbutils.common.progress_file import read_progress
from nbutils.launching.launch import choose_config, launch
from nbutils.launching.script_file import write_script
from nbutils.lessons import plots

SWEEP = Path("runs/sweep")
ROWS = {"dataset": "data/instructions/train.jsonl", "heldout_dataset": "data/instructions/heldout.jsonl"}


def train_at(rate: float, base: str, steps: int, folder: Path = SWEEP) -> dict[int, float]:
    """Train with one rate, all else alike, on one rank.

    Args:
        rate: learning rate at its highest.
        base: folder of the model.
        steps: optimizer steps of eight rows.
        folder: the run lands in a folder below it, named after the rate, in place of an earlier one.

    Returns:
        Held-out loss in nats a token, by step; step 0 is before training.

    Raises:
        LaunchFailed, BadConfig, Refused: as `launch`.
    """
    output = folder / f"rate_{rate:.1e}"
    shutil.rmtree(output, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    settings = ROWS | {
        "model": base,
        "learning_rate": f"{rate:.2e}",
        "max_steps": steps,
        "output_dir": output,
    }
    settings |= {"per_device_train_batch_size": 8, "max_length": 128, "eval_steps": max(1, steps // 3)}
    settings |= {"save_strategy": "no", "disable_tqdm": "true", "logging_steps": 1, "seed": 0}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    how = {"num_processes": 1, "output_dir": output, "log": output.with_suffix(".log"), "show": False}
    launch(write_script(folder), words, choose_config(2), **how)
    return {line["step"]: line["eval_loss"] for line in read_progress(output) if "eval_loss" in line}


def draw_rates(sweep: dict[float, dict[int, float]]) -> None:
    """Draw the held-out loss of each rate over the steps, print it, and say which rate to go on with.

    Args:
        sweep: rate -> held-out loss by step, as `train_at` gives it.
    """
    figure, axes = plt.subplots(figsize=(6.4, 2.6))
    for rate, losses in sweep.items():
        axes.plot(list(losses), list(losses.values()), label=f"{rate:.1e}")
    axes.set(xlabel="optimizer step", ylabel="held-out loss, nats a token")
    axes.legend(title="learning rate")
    last = {rate: list(losses.values())[-1] for rate, losses in sweep.items()}
    best, rates = min(last, key=last.get), sorted(last)
    title = f"The held-out loss ends lowest at a rate of {best:.1e}"
    axes.set_title(title, loc="left", fontsize=10)
    said = ", ".join(f"{loss:.3f} at {rate:.1e}" for rate, loss in last.items())
    plots.show(figure, f"{title}. One line for each learning rate; they end with {said}.")
    steps = list(next(iter(sweep.values())))
    rows = [[f"{rate:.1e}", *(f"{losses[step]:.3f}" for step in steps)] for rate, losses in sweep.items()]
    plots.table(["rate", *(f"step {step}" for step in steps)], rows)
    print(f"lowest at {best:.1e}", end="")
    if best in (rates[0], rates[-1]):
        print(
            f", an end of what was tried: try {best * (3 if best == rates[-1] else 1 / 3):.1e} next", end=""
        )
    print()
