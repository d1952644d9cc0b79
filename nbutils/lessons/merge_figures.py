"""The picture and the table of lesson 05: what is left of an adapter's change after a merge, and what that costs."""

import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

from nbutils.adapters.change_kept import INTO_BF16, INTO_NF4
from nbutils.lessons import plots

PRINTED = (0.002, 0.01, 0.03, 0.05, 0.07, 0.1, 0.35)  # sizes of the change that are printed beside the figure
TICKS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
WAYS = {  # of the record of the real small model, as they are called in the table
    "4-bit base and adapter, as trained": "4-bit base + adapter, as trained",
    "merged into bf16": "merged into the bf16 base",
    "merged into bf16, then NF4": "the same, loaded in 4-bit again",
    "merged into the NF4 base": "merged into the 4-bit base",
    "Q8_0 base and adapter": "GGUF Q8_0 base + adapter",
    "Q4_0 base and adapter": "GGUF Q4_0 base + adapter",
}


def real_places(report: dict | None) -> dict[str, tuple[float, float]]:
    """Real adapters: the median size of their change, and the share of it that a merge into NF4 left; by label.

    Args:
        report: the record of the real small model, or None.
    """
    return {
        f"SmolLM2-135M, rate {trained['learning_rate']:.0e}": (
            trained["relative_change_of_the_weights"]["median"],
            trained["share_of_the_change_kept"]["merged into the NF4 base"],
        )
        for trained in (report or {}).get("adapters", [])
    }


def real_merges(report: dict) -> None:
    """Print how much each real adapter changed its base, and what each way to use it leaves of the gain.

    Args:
        report: the record of the real small model.
    """
    before = report["held_out_loss_without_adapter"]["NF4 base"]
    head, columns = ["SmolLM2-135M"], [["change of the weights, median", *WAYS.values()]]
    for trained in report["adapters"]:
        losses, change = trained["held_out_loss"], trained["relative_change_of_the_weights"]
        gain = before - losses["4-bit base and adapter, as trained"]
        head += [f"rate {trained['learning_rate']:.0e}", "of the gain"]
        columns.append([f"{change['median']:.2%}", *(f"loss {losses[way]:.3f}" for way in WAYS)])
        columns.append(["", *(f"{(before - losses[way]) / gain:.0%}" for way in WAYS)])
    plots.table(head, list(zip(*columns)))


def draw_change_kept(
    curve: dict[float, dict[str, float]], real: dict[str, tuple[float, float]], yours: float | None
) -> None:
    """Draw the share of the change that is left over its size, with real adapters in it, and print the numbers.

    Args:
        curve: what `nbutils.adapters.change_kept.change_kept` gives, by size.
        real: what `real_places` gives.
        yours: size of the change of the adapter of this run, if it was measured.
    """
    figure, axes = plt.subplots(figsize=(6.8, 3.6))
    for way, called, place in (
        (INTO_BF16, "merged into the bf16 base, then rounded to NF4", (0.0021, 1.04)),
        (INTO_NF4, "merged into the NF4 base ", (0.066, 0.6)),
    ):
        (line,) = axes.plot(curve.keys(), [kept[way] for kept in curve.values()])
        side = "left" if way == INTO_BF16 else "right"  # of the rising line: nothing else is drawn there
        axes.annotate(called, place, color=line.get_color(), fontsize=10, ha=side)
    for label, (size, left) in real.items():
        axes.plot(size, left, "*", color=plots.BLACK, markersize=11)
        side = "left" if size < 0.01 else "right"
        axes.annotate(label.replace(", ", "\n"), (size, left + 0.07), fontsize=9, ha=side)
    if yours is not None:
        axes.axvline(yours, color=plots.BLACK, linestyle="--", linewidth=1, marker="")
        axes.annotate("your adapter, \none layer ", (yours, 0.15), fontsize=9, ha="right")
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{100 * size:g}%" for size in TICKS])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel(
        "size of the change, in percent of the weights (stars: measured, merged into the NF4 base)"
    )
    axes.set(ylim=(-0.06, 1.15), ylabel="share of the change that is left")
    axes.set_title("In the NF4 base a small change is lost; in the bf16 base it survives", loc="left")
    numbers = "; ".join(
        f"at {size:.1%} {kept[INTO_BF16]:.0%} and {kept[INTO_NF4]:.0%}" for size, kept in curve.items()
    )
    marked = [f"{label}, {size:.1%}, {left:.0%} left" for label, (size, left) in real.items()]
    marked += [] if yours is None else [f"your adapter, one layer, {yours:.1%}"]
    plots.show(
        figure,
        f"Two lines over the size of an adapter's change: the share of it that is left, merged into bf16 and rounded "
        f"to NF4, and merged into the NF4 base. {numbers}. Marked: {'; '.join(marked)}.",
    )
    rows = [
        [f"{size:.1%}", f"{kept[INTO_BF16]:.0%}", f"{kept[INTO_NF4]:.0%}"]
        for size, kept in curve.items()
        if size in PRINTED
    ]
    plots.table(["size of the change", f"left {INTO_BF16}", f"left {INTO_NF4}"], rows)
