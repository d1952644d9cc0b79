"""The pictures of lesson 05: what is left of an adapter's change after a merge, over the size of the change."""

import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

from nbutils.adapters.change_kept import INTO_BF16, INTO_NF4
from nbutils.lessons import plots
from nbutils.lessons import records as recorded


def real_places(name: str = "smollm2_merging") -> dict[str, float]:
    """The sizes of real adapters' changes, by label, from the record of the real small model; empty without it.

    Args:
        name: of the record.
    """
    report = recorded.load(name) or {}
    return {
        f"SmolLM2-135M at {adapter['learning_rate']:.0e}": adapter["relative_change_of_the_weights"]["median"]
        for adapter in report.get("adapters", [])
    }


def draw_change_kept(curve: dict[float, dict[str, float]], places: dict[str, float]) -> None:
    """Draw the share of the change that is left over its size, with adapters' places marked, and print the numbers.

    Args:
        curve: what `nbutils.adapters.change_kept.change_kept` gives, by size.
        places: sizes of adapters' changes, by label.
    """
    figure, axes = plt.subplots()
    for way in (INTO_BF16, INTO_NF4):
        axes.plot(curve.keys(), [kept[way] for kept in curve.values()], label=way)
    for number, (label, size) in enumerate(places.items()):
        axes.axvline(size, color=plots.BLACK, linestyle="--", linewidth=1, marker="")
        side = "right" if size > 0.01 else "left"
        axes.text(size, 0.3 - 0.1 * number, f" {label} ", fontsize=8, ha=side)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("norm of the change over norm of the weights")
    axes.set_ylabel("share of the change left")
    axes.set_ylim(-0.05, 1.08)
    axes.legend(loc="center left", bbox_to_anchor=(0.05, 0.6))
    numbers = "; ".join(
        f"at {size:.1%} {kept[INTO_BF16]:.2f} and {kept[INTO_NF4]:.2f}" for size, kept in curve.items()
    )
    marked = ", ".join(f"{label} {size:.1%}" for label, size in places.items())
    plots.show(
        figure,
        f"Two lines over the size of an adapter's change: the share of it that is left, merged into bf16 and rounded "
        f"to NF4, and merged into the NF4 base. {numbers}. Marked: {marked}.",
    )
    rows = [
        [f"{size:.1%}", f"{kept[INTO_BF16]:.2f}", f"{kept[INTO_NF4]:.2f}"] for size, kept in curve.items()
    ]
    plots.table(["size of the change", INTO_BF16, INTO_NF4], rows)
