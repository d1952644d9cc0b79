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
WEIGHTS, EMBEDDING, STATE = "4-bit weights", "embedding and output head", "quantisation state"
REST = "activations and the rest"
# What the figure calls an item of the plan; whatever is not named here belongs to the rest.
GROUPS = {
    "4-bit shards": WEIGHTS,
    "gathered layers": WEIGHTS,
    "next layer on its way": WEIGHTS,
    "embedding and head": EMBEDDING,
    "their flat copy": EMBEDDING,
    "shard of embedding and head": EMBEDDING,
    "head": EMBEDDING,
    STATE: STATE,
    BESIDE: "CUDA and NCCL",
}
COLOURS = {
    WEIGHTS: plots.SKY,
    EMBEDDING: plots.ORANGE,
    STATE: plots.BLUE,
    "CUDA and NCCL": plots.VERMILION,
    REST: plots.PURPLE,
}
NUMBERED = 1.5  # GiB: a thinner part of a bar has no room for its number


def draw_loss(progress: list[dict], facts: dict) -> None:
    """Draw the training loss of each step and the held-out loss before and after; print first and last of both.

    Args:
        progress: lines of a run, as `LaunchResult.progress`.
        facts: `training` of the run's `run.json`.
    """
    losses = [(line["step"], line["loss"]) for line in progress if "loss" in line]
    held_out = [facts["held_out_loss_before"], facts["held_out_loss_after"]]
    figure, axes = plt.subplots(figsize=(6.4, 2.8))
    axes.plot(*zip(*losses), label="training rows, at each step")
    axes.plot(
        [0, losses[-1][0]], held_out, linestyle=":", markersize=8, label="held-out rows, before and after"
    )
    for step, loss in zip((0, losses[-1][0]), held_out):
        axes.annotate(f"{loss:.2f}", (step, loss), (0, 8), textcoords="offset points", ha="center")
    axes.set(xlabel="optimizer step", ylabel="loss, nats a token")
    verdict = "falls" if held_out[1] < held_out[0] else "does not fall"
    axes.set_title(f"The loss {verdict} on rows that were never trained on", loc="left")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(y=0.15)
    axes.legend()
    first, last = losses[0], losses[-1]
    said = f"from {first[1]:.3f} at step {first[0]} to {last[1]:.3f} at step {last[0]}"
    told = f"The training loss of each of {len(losses)} steps goes {said}; the held-out loss"
    plots.show(figure, f"{told} from {held_out[0]:.3f} to {held_out[1]:.3f}.")
    rows = {"training": (first[1], last[1]), "held out": held_out}
    plots.table(["rows", "first", "last"], [[name, *(f"{x:.3f}" for x in two)] for name, two in rows.items()])


def parts_of(planned: Plan) -> dict[str, float]:
    """GiB of each item at the plan's highest moment, and what CUDA and NCCL take beside PyTorch."""
    return {name: size / GIB for name, size in planned.gpu.items()} | {BESIDE: OUTSIDE / GIB}


def ways_to_train_70b() -> dict[str, Plan]:
    """Plans for Llama 3.1 70B on two GPUs, one row of 1,024 tokens each, by label."""
    fast = Choices(embeddings_on_host=True, compile_layers=True)
    resident = Choices(embeddings_on_host=True, compile_layers=True, offload_activations=True)
    ways = {
        "FSDP 1, no offload": (Setup(2, 1, False), Choices()),
        "FSDP 1, offload (2024)": (Setup(2, 1, True), Choices()),
        "FSDP 2, offload (fastest)": (Setup(2, 2, True), fast),
        "FSDP 2, no offload (resident)": (Setup(2, 2, False), resident),
    }
    seventy = shape_of("llama31_70b")
    return {name: plan(seventy, setup, 1, 1024, choices=choices) for name, (setup, choices) in ways.items()}


def draw_needs(plans: dict[str, Plan], card: int = 24) -> None:
    """Show what each way of training takes on a GPU as a stacked bar, with the card's memory as a line.

    Args:
        plans: by label.
        card: nominal size in GB.
    """
    sums = {label: sum(parts_of(planned).values()) for label, planned in plans.items()}
    told = "; ".join(f"{label}: {gib:.1f} GiB{_unfit(gib, card)}" for label, gib in sums.items())
    alt = f"Stacked bars: {told}. The line of a {card} GB card is at {CARDS[card]} GiB."
    plots.show(needs_figure(plans, card), alt)


def needs_figure(plans: dict[str, Plan], card: int = 24) -> plt.Figure:
    """The figure of `draw_needs`."""
    bars = {label: _grouped(parts_of(planned)) for label, planned in plans.items()}
    sums = [sum(bar.values()) for bar in bars.values()]
    figure, axes = plt.subplots(figsize=(7.2, 0.55 * len(plans) + 1.9))
    for row, (bar, total) in enumerate(zip(bars.values(), sums)):
        left = 0.0
        for name, gib in bar.items():
            axes.barh(row, gib, 0.62, left, edgecolor="white", linewidth=0.6, label=name, color=COLOURS[name])
            if gib >= NUMBERED:
                axes.text(left + gib / 2, row, f"{gib:.1f}", ha="center", va="center")
            left += gib
        said = f"{total:.1f} GiB{_unfit(total, card)}"
        space = {"fc": "white", "ec": "none", "pad": 1}
        axes.text(total + 0.4, row, said, va="center", fontweight="bold", bbox=space)
    axes.axvline(CARDS[card], color=plots.BLACK, linestyle="--", linewidth=1, marker="")
    axes.text(CARDS[card], -0.5, f" a {card} GB card: {CARDS[card]} GiB")
    axes.set_yticks(range(len(bars)), bars)
    axes.set(
        xlim=(0, 1.5 * max(sums)), ylim=(len(bars) - 0.55, -0.8), xlabel="GiB on each of two GPUs, planned"
    )
    fit = sum(total <= CARDS[card] for total in sums)
    axes.set_title(f"Llama 3.1 70B on two {card} GB cards: {fit} of {len(sums)} ways fit", loc="left")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    figure.legend(unique.values(), unique.keys(), ncols=3, loc="outside lower center")
    return figure


def _unfit(gib: float, card: int) -> str:
    return "" if gib <= CARDS[card] else ", does not fit"


def _grouped(parts: dict[str, float]) -> dict[str, float]:
    """The parts under the names of the figure, in the order of its legend."""
    grouped = dict.fromkeys(COLOURS, 0.0)
    for name, gib in parts.items():
        grouped[GROUPS.get(name, REST)] += gib
    return grouped


if __name__ == "__main__":
    drawn = needs_figure(ways_to_train_70b())
    drawn.axes[0].set_xlabel("GiB on each of two GPUs, planned for one row of 1,024 tokens on each")
    drawn.savefig(sys.argv[1], dpi=110, metadata={"Software": None})
