"""The figures of lesson 00: the loss of a first run, and what 70B takes on each of two GPUs.

Run as: `python -m nbutils.lessons.start_figures docs/what_70b_takes.png` (the figure of the README)
"""

import sys

import matplotlib.pyplot as plt

from nbutils.lessons import plots
from nbutils.planning.memory_items import GIB
from nbutils.planning.memory_plan import CARDS, OUTSIDE, Plan, plan
from nbutils.planning.run_setup import Choices, Setup
from nbutils.planning.shapes import shape_of

BESIDE = "CUDA and NCCL, beside PyTorch"
SMALL = "items below 0.5 GiB"
COLOURS = [plots.BLUE, plots.ORANGE, plots.SKY, plots.GREEN, plots.PURPLE, plots.VERMILION]
HATCHES = ["", "///", "...", "xxx"]


def draw_loss(progress: list[dict]) -> None:
    """Draw the training loss of each step, and print its beginning and end.

    Args:
        progress: lines of a run, as `LaunchResult.progress`.
    """
    losses = [(line["step"], line["loss"]) for line in progress if "loss" in line]
    figure, axes = plt.subplots(figsize=(6.4, 2.4))
    axes.plot(*zip(*losses))
    axes.set(xlabel="optimizer step", ylabel="training loss, nats a token")
    axes.xaxis.get_major_locator().set_params(integer=True)
    first, last = losses[0], losses[-1]
    said = f"from {first[1]:.3f} at step {first[0]} to {last[1]:.3f} at step {last[0]}"
    plots.show(figure, f"The training loss of each of {len(losses)} steps goes {said}.")
    every = losses[:: max(1, len(losses) // 5)]
    plots.table(["step", "loss"], [[str(step), f"{loss:.3f}"] for step, loss in [*every, last]])


def parts_of(planned: Plan) -> dict[str, float]:
    """GiB of each item at the plan's highest moment, and what CUDA and NCCL take beside PyTorch."""
    return {name: size / GIB for name, size in planned.gpu.items()} | {BESIDE: OUTSIDE / GIB}


def ways_to_train_70b() -> dict[str, Plan]:
    """Plans for Llama 3.1 70B on two GPUs, one row of 1,024 tokens each, by label."""
    fast = Choices(embeddings_on_host=True, compile_layers=True)
    resident = Choices(embeddings_on_host=True, compile_layers=True, offload_activations=True)
    ways = {
        "FSDP 1, no offload": (Setup(2, 1, False), Choices()),
        "FSDP 1, offload: 2024": (Setup(2, 1, True), Choices()),
        "FSDP 2, offload: fastest": (Setup(2, 2, True), fast),
        "FSDP 2, resident": (Setup(2, 2, False), resident),
    }
    seventy = shape_of("llama31_70b")
    return {name: plan(seventy, setup, 1, 1024, choices=choices) for name, (setup, choices) in ways.items()}


def draw_needs(plans: dict[str, Plan], card: int = 24) -> None:
    """Show what each way of training takes on a GPU as a stacked bar, with the card's memory as a line.

    Args:
        plans: by label.
        card: nominal size in GB.
    """
    bars = {label: parts_of(planned) for label, planned in plans.items()}
    told = "; ".join(
        f"{label} {sum(bar.values()):.1f} GiB, {plans[label].peak_moment}" for label, bar in bars.items()
    )
    figure = needs_figure(plans, card)
    plots.show(figure, f"Stacked bars: {told}. The line of a {card} GB card is at {CARDS[card]} GiB.")


def needs_figure(plans: dict[str, Plan], card: int = 24) -> plt.Figure:
    """The figure of `draw_needs`."""
    bars = {label: _thick(parts_of(planned)) for label, planned in plans.items()}
    names = list(dict.fromkeys(name for bar in bars.values() for name in bar))
    figure, axes = plt.subplots(figsize=(7.2, 0.6 * len(plans) + 2.6))
    for row, (label, bar) in enumerate(bars.items()):
        left = 0.0
        for number, name in enumerate(names):
            style = {"color": COLOURS[number % 6], "hatch": HATCHES[number // 6]}
            axes.barh(row, bar.get(name, 0), 0.6, left, edgecolor="white", linewidth=0.4, label=name, **style)
            left += bar.get(name, 0)
        said = f"{left:.1f}, {plans[label].peak_moment}"
        axes.text(
            left + 0.3, row, said, va="center", fontsize=8, bbox={"fc": "white", "ec": "none", "pad": 1}
        )
    axes.axvline(CARDS[card], color=plots.BLACK, linestyle="--", linewidth=1, marker="")
    axes.text(CARDS[card], -0.45, f" {card} GB card: {CARDS[card]} GiB", fontsize=8)
    axes.set_yticks(range(len(bars)), bars)
    axes.set(xlim=(0, 1.25 * max(sum(bar.values()) for bar in bars.values())), ylim=(len(bars) - 0.5, -0.7))
    axes.set_xlabel("GiB on each of two GPUs at the highest moment, planned")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    figure.legend(unique.values(), unique.keys(), fontsize=8, ncols=2, loc="outside lower center")
    return figure


def _thick(parts: dict[str, float]) -> dict[str, float]:
    """The parts, with those that would be a hairline put together."""
    thick = {name: gib for name, gib in parts.items() if gib >= 0.5}
    return thick | {SMALL: sum(parts.values()) - sum(thick.values())}


if __name__ == "__main__":
    needs_figure(ways_to_train_70b()).savefig(sys.argv[1], dpi=110, metadata={"Software": None})
