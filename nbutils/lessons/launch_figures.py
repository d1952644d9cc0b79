"""The figure of lesson 04: the losses of a run, in training and on held-out rows."""

import math

import matplotlib.pyplot as plt

from nbutils.lessons import plots


def draw_losses(progress: list[dict], facts: dict) -> None:
    """Draw the training loss of each step and the held-out loss where it was measured, and print the latter.

    What is printed as a probability is the geometric mean over the held-out tokens.

    Args:
        progress: lines of a run, as `LaunchResult.progress`.
        facts: `training` of the run's `run.json`: losses at the beginning and at the end.
    """
    steps = [(row["step"], row["loss"]) for row in progress if "loss" in row]
    heldout = {row["step"]: row["eval_loss"] for row in progress if "eval_loss" in row}
    before, after = facts["held_out_loss_before"], facts["held_out_loss_after"]
    fell = 1 - after / before
    figure, axes = plt.subplots(figsize=(6.4, 3.2))
    axes.plot(*zip(*steps), marker="", label="training rows, each step")
    axes.plot(*zip(*heldout.items()), marker="o", label="held-out rows")
    axes.set(xlabel="optimizer step", ylabel="loss, nats a token")
    axes.set_title(
        f"On held-out rows the loss {'falls' if fell > 0 else 'rises'} by {abs(fell):.0%}",
        fontsize=10,
    )
    axes.legend()
    plots.show(
        figure,
        f"Training loss goes from {facts['loss_first']:.2f} to {facts['loss_last']:.2f}; held-out loss goes from "
        f"{before:.2f} to {after:.2f}.",
    )
    rows = [(step, f"{loss:.3f}", f"{math.exp(-loss):.2%}") for step, loss in heldout.items()]
    plots.table(["step", "held-out loss", "probability of the right token"], rows)
