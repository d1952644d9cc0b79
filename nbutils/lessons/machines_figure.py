"""The figure of lesson 07b: what a second machine is worth, by the link between the two."""

import matplotlib.pyplot as plt
import numpy as np

from nbutils.lessons import plots
from nbutils.planning.network_traffic import (
    LINKS,
    bytes_between_machines,
    link_that_pays,
    tokens_per_second,
)
from nbutils.planning.run_setup import Setup
from nbutils.planning.shapes import Shape

TWO_BY_TWO = Setup(world_size=4)
MARGIN = 0.1  # the one measured speed lay so far below the band (benchmarks/results/scaling.json)
STRATEGIES = {"FULL_SHARD": (False, plots.BLUE, "o"), "HYBRID_SHARD": (True, plots.VERMILION, "s")}


def gigabits(link):
    """Bytes a second as gigabits a second."""
    return link * 8 / 1e9


def times_one(sent: int, step_seconds: float, link: float) -> tuple[float, float]:
    """Speed of two machines in times one machine's, if nothing of the sending hides and if all of it does.

    Args:
        sent: bytes of a step, from `bytes_between_machines`.
        step_seconds: of a step on one machine.
        link: bytes a second.
    """
    low, high = tokens_per_second(1, 4, step_seconds, sent, link)
    return low * step_seconds / 2, high * step_seconds / 2


def draw_two_machines(shape: Shape, step_seconds: float, whose: str) -> None:
    """Draw and print the speed of two machines of two GPUs, in times one machine, over links of all speeds.

    Args:
        shape: of the model.
        step_seconds: of a step on one machine.
        whose: step that is, in a few words.
    """
    figure, axes = plt.subplots(figsize=(6.8, 3.4))
    links = np.array([*LINKS.values()])
    between = np.geomspace(links.min(), links.max(), 80)
    ranges = {}
    for name, (hybrid, colour, marker) in STRATEGIES.items():
        sent = bytes_between_machines(shape, TWO_BY_TWO, 2, hybrid=hybrid)
        low, high = zip(*(times_one(sent, step_seconds, link) for link in between))
        axes.fill_between(gigabits(between), low, high, color=colour, alpha=0.25)
        axes.plot(gigabits(between), low, color=colour, marker="")
        axes.plot(gigabits(between), high, color=colour, marker="", linestyle="--")
        ranges[name] = [times_one(sent, step_seconds, link) for link in links]
        at_worst = [worst for worst, _ in ranges[name]]
        axes.plot(gigabits(links), at_worst, color=colour, marker=marker, linestyle="", label=name)
        for link, worst in zip(links, at_worst):
            if worst < 1.9 or not hybrid:
                aside = (-18, 8) if abs(worst - 1) < 0.1 else (18, -8)  # clear of the line of one machine
                place = {"xytext": aside, "textcoords": "offset points", "ha": "center"}
                axes.annotate(f"{worst:.2f}", (gigabits(link), worst), **place)
    axes.axhline(1, color=plots.BLACK, marker="", linestyle=":", label="one machine")
    axes.set(xscale="log", xlabel="link between the machines, Gbit/s", ylim=(-0.15, 2.1), xlim=(0.85, 640))
    axes.set_ylabel("times one machine, predicted")
    axes.set_xticks(gigabits(links), [f"{speed:g}" for speed in gigabits(links)])
    axes.minorticks_off()
    for style, label in (("-", "nothing hides"), ("--", "all hides")):
        axes.plot([], [], color=plots.BLACK, marker="", linestyle=style, label=label)
    figure.legend(fontsize=9, ncols=5, columnspacing=1.1, handlelength=1.6, loc="outside lower center")
    safe = gigabits(link_that_pays(bytes_between_machines(shape, TWO_BY_TWO, 2), step_seconds))
    title = f"{whose}: above {safe:.3g} Gbit/s FULL_SHARD is faster even if nothing hides"
    axes.set_title(title.replace(": ", ":\n"), fontsize=10)
    rows = [
        [link, *(f"{ranges[name][place][0]:.2f} to {ranges[name][place][1]:.2f}" for name in STRATEGIES)]
        for place, link in enumerate(LINKS)
    ]
    told = "; ".join(f"{link}: FULL_SHARD {full}, HYBRID_SHARD {hybrid}" for link, full, hybrid in rows)
    plots.show(figure, f"{title}. Predicted speed in times one machine, by the link. {told}.")
    plots.table(["times one machine over", *STRATEGIES], rows)


def verdict(low: float, high: float) -> str:
    """What two machines are, by their speed in times one machine's if nothing of the sending hides and if all does."""
    if low > 1 + MARGIN:
        return "faster"
    if low > 1 - MARGIN:
        return "about the same or faster"
    return "faster only if the sending hides" if high > 1 else "slower"


def worth_of_two(shape: Shape, step_seconds: float, gbit: float) -> None:
    """Print whether two machines of two GPUs are faster than one over a link, and from which link on.

    Args:
        shape: of the model.
        step_seconds: of a step on one machine.
        gbit: of the link between the machines, in Gbit/s.
    """
    rows = []
    for name, (hybrid, *_) in STRATEGIES.items():
        sent = bytes_between_machines(shape, TWO_BY_TWO, 2, hybrid=hybrid)
        low, high = times_one(sent, step_seconds, gbit * 1e9 / 8)
        pays = [
            f"{gigabits(link_that_pays(sent, step_seconds, hides)):.3g} Gbit/s" for hides in (False, True)
        ]
        rows.append([name, f"{low:.2f} to {high:.2f}", verdict(low, high), *pays])
    print()
    ends = ["nothing hides: faster above", "all hides: faster above"]
    plots.table([f"over {gbit:g} Gbit/s", "times one machine", "so two are", *ends], rows)
