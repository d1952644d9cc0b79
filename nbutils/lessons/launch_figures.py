"""The figure of lesson 04: the losses of a run, in training and on held-out rows."""

import matplotlib.pyplot as plt

from nbutils.lessons import plots


def draw_losses(progress: list[dict], facts: dict) -> None:
    """Draw the training loss of each step and the held-out loss where it was measured, and print the latter.

    Args:
        progress: lines of a run, as `LaunchResult.progress`.
        facts: `training` of the run's `run.json`: losses at the beginning and at the end.
    """
    steps = [(row["step"], row["loss"]) for row in progress if "loss" in row]
    heldout = {row["step"]: row["eval_loss"] for row in progress if "eval_loss" in row}
    figure, axes = plt.subplots(figsize=(6.4, 3.2))
    axes.plot(*zip(*steps), label="training, each step")
    axes.plot(*zip(*heldout.items()), marker="o", label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss, nats a token")
    axes.legend()
    before, after = facts["held_out_loss_before"], facts["held_out_loss_after"]
    plots.show(
        figure,
        f"Training loss goes from {facts['loss_first']:.2f} to {facts['loss_last']:.2f}; held-out loss goes from "
        f"{before:.2f} to {after:.2f}.",
    )
    print("step   held-out loss")
    for step, loss in heldout.items():
        print(f"{step:4d}   {loss:.3f}")
    print(f"held-out loss after is {1 - after / before:.0%} under before")
