"""The figure of lesson 07: what a second machine is worth, by the link between the two."""

import matplotlib.pyplot as plt

from nbutils.lessons import plots
from nbutils.planning.network_traffic import LINKS, bytes_between_machines, tokens_per_second
from nbutils.planning.run_setup import Setup
from nbutils.planning.shapes import Shape


def draw_two_machines(shape: Shape, tokens: int, step_seconds: float) -> None:
    """Draw and print tokens a second of two machines of two GPUs, over links of all speeds, beside one machine.

    Args:
        shape: of the model.
        tokens: of a rank and step.
        step_seconds: of a step on one machine.
    """
    one = 2 * tokens / step_seconds
    figure, axes = plt.subplots()
    gigabits, rows = [speed * 8 / 1e9 for speed in LINKS.values()], []
    for name, hybrid in (("FULL_SHARD", False), ("HYBRID_SHARD", True)):
        sent = bytes_between_machines(shape, Setup(world_size=4), 2, hybrid=hybrid)
        slow, fast = zip(
            *(tokens_per_second(tokens, 4, step_seconds, sent, speed) for speed in LINKS.values())
        )
        axes.plot(gigabits, slow, label=f"{name}, nothing hides")
        axes.plot(gigabits, fast, linestyle="--", label=f"{name}, all hides")
        rows += [(name, link, f"{low:,.0f}", f"{high:,.0f}", f"{low / one:.2f} to {high / one:.2f}")
                 for link, low, high in zip(LINKS, slow, fast)]  # fmt: skip
    axes.axhline(one, color=plots.BLACK, marker="", linestyle=":", label="one machine")
    axes.set(xscale="log", xlabel="link between the machines, Gbit/s", ylim=(0, None))
    axes.set_ylabel("tokens/s over all ranks, predicted")
    axes.set_xticks(gigabits, [f"{speed:g}" for speed in gigabits])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    told = "; ".join(f"{name}, {link}: {times} times one machine" for name, link, *_, times in rows)
    plots.show(figure, f"Predicted speed of two machines; one makes {one:.0f} tokens a second. {told}.")
    plots.table(["strategy", "link", "tokens/s at worst", "at best", "times one machine"], rows)
