"""The life of a unit: what two ranks hold while they gather, compute and free one layer."""

import ast
import re
from pathlib import Path

import matplotlib.pyplot as plt

from nbutils.lessons import plots

MOMENTS = ("before", "gathered: compute", "freed")


def told_by_ranks(log: Path) -> dict[str, tuple[list[tuple[int, int]], int]]:
    """What the ranks of `one_layer.py` printed, in the order of the ranks.

    Args:
        log: of a launch; each rank prints `held [(shard, gathered copy), ...] checksum N` in it.

    Returns:
        rank's name to ((shard, gathered copy) in bytes at each moment, sum of its result).
    """
    told = re.findall(r"rank (\d+)\] held (\[.*\]) checksum (\d+)", log.read_text(encoding="utf-8"))
    lines = sorted((int(rank), ast.literal_eval(held), int(total)) for rank, held, total in told)
    return {f"rank {rank}": (held, total) for rank, held, total in lines}


def draw_life(held: dict[str, list[tuple[float, float]]], unit: str) -> None:
    """Draw what each rank holds of one layer at three moments, its shard and the gathered copy, and print it.

    Args:
        held: rank's name to (shard, gathered copy) at each of MOMENTS.
        unit: of the numbers, as "KiB".
    """
    figure, axes = plt.subplots(1, len(held), figsize=(7.2, 2.8), sharey=True)
    for number, (axis, (rank, moments)) in enumerate(zip(axes, held.items())):
        shards, copies = zip(*moments)
        axis.bar(MOMENTS, shards, 0.6, color=plots.BLUE, label="shard, kept all the time")
        axis.bar(MOMENTS, copies, 0.6, bottom=shards, color=plots.SKY, hatch="///", edgecolor="white",
                 label="gathered copy")  # fmt: skip
        for place, (shard, copy) in enumerate(moments):
            axis.text(place, shard / 2, f"{shard:,.0f}", ha="center", va="center", color="white")
            if copy:
                axis.text(place, shard + copy + 8, f"+ {copy:,.0f}", ha="center", va="bottom")
        axis.set(title=f"{rank}: slice {number + 1} of {len(held)}", ylim=(0, 1.15 * max(map(sum, moments))))
        axis.title.set_fontsize(9)
    axes[0].set_ylabel(f"{unit} of one layer")
    title = "A rank keeps its slice. The whole layer is there only while it computes"
    figure.suptitle(title, fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=2, fontsize=8, loc="outside lower center")
    rows = [
        [rank, moment, f"{shard:,.0f}", f"{copy:,.0f}"]
        for rank, moments in held.items()
        for moment, (shard, copy) in zip(MOMENTS, moments)
    ]
    told = "; ".join(f"{r}, {moment}: shard {shard}, gathered copy {copy}" for r, moment, shard, copy in rows)
    plots.show(figure, f"{title}. What each rank holds, in {unit}: {told}.")
    plots.table(["rank", "moment", f"shard {unit}", f"gathered copy {unit}"], rows)
