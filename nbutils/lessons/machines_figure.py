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
STRATEGIES = {"FULL_SHARD": (False, plots.BLUE, "o"), "HYBRID_SHARD": (True, plots.VERMILION, "s")}


def gigabits(link):
    """Bytes a second as gigabits a second."""
    return link * 8 / 1e9


def draw_two_machines(shape: Shape, tokens: int, step_seconds: float) -> None:
    """Draw and print tokens a second of two machines of two GPUs, over links of all speeds, beside one machine.

    Args:
        shape: of the model.
        tokens: of a rank and step.
        step_seconds: of a step on one machine.
    """
    one = 2 * tokens / step_seconds
    figure, axes = plt.subplots()
    links = np.array([*LINKS.values()])
    between = np.geomspace(links.min(), links.max(), 80)
    rows = []
    for name, (hybrid, colour, marker) in STRATEGIES.items():
        sent = bytes_between_machines(shape, TWO_BY_TWO, 2, hybrid=hybrid)
        speeds = {}
        for hides, style, label in ((False, "-", "nothing hides"), (True, "--", "all hides")):
            curve, speeds[hides] = (
                [tokens_per_second(tokens, 4, step_seconds, sent, link)[hides] for link in places]
                for places in (between, links)
            )
            look = {"color": colour, "linestyle": style}
            axes.plot(gigabits(between), curve, marker="", label=f"{name}, {label}", **look)
            axes.plot(gigabits(links), speeds[hides], marker=marker, **(look | {"linestyle": ""}))
        rows += [
            (name, link, f"{low:,.0f}", f"{high:,.0f}", f"{low / one:.2f} to {high / one:.2f}")
            for link, low, high in zip(LINKS, speeds[False], speeds[True])
        ]
    axes.axhline(one, color=plots.BLACK, marker="", linestyle=":", label="one machine")
    axes.set(xscale="log", xlabel="link between the machines, Gbit/s", ylim=(0, None))
    axes.set_ylabel("tokens/s over all ranks, predicted")
    axes.set_xticks(gigabits(links), [f"{speed:g}" for speed in gigabits(links)])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    told = "; ".join(f"{name}, {link}: {times} times one machine" for name, link, *_, times in rows)
    plots.show(figure, f"Predicted speed of two machines; one makes {one:.0f} tokens a second. {told}.")
    plots.table(["strategy", "link", "tokens/s at worst", "at best", "times one machine"], rows)


def worth_of_two(shape: Shape, step_seconds: float, link: str = "10 Gbit/s") -> str:
    """Whether two machines of two GPUs are faster than one under FULL_SHARD, and from which link on, in words.

    Args:
        shape: of the model.
        step_seconds: of a step on one machine.
        link: between the machines, a name of `LINKS`.

    Returns:
        Two sentences.
    """
    sent = bytes_between_machines(shape, TWO_BY_TWO, 2)
    low, high = (
        speed * step_seconds / 2 for speed in tokens_per_second(1, 4, step_seconds, sent, LINKS[link])
    )
    if low > 1:
        verdict = "faster than one even if nothing hides"
    elif high > 1:
        verdict = "faster than one only if the sending hides"
    else:
        verdict = "slower than one whatever hides"
    safe, best = (gigabits(link_that_pays(sent, step_seconds, hides)) for hides in (False, True))
    return (
        f"FULL_SHARD on two machines over {link}: {low:.2f} to {high:.2f} times one machine, {verdict}.\n"
        f"They are as fast as one over {best:.1f} Gbit/s if all hides, over {safe:.1f} Gbit/s if nothing does."
    )
