"""The figure of lesson 06 about losses: the same rows taken packed, padded, accumulated, on one rank or two."""

import matplotlib.pyplot as plt

from nbutils.lessons import plots


def draw_ways(record: dict) -> None:
    """Draw and print the held-out loss before and after the same three steps, by how the rows were taken.

    Args:
        record: `ways` in it holds `loss` (each step) and `eval_loss` (before and after), in nats a token.
    """
    ways = record["ways"]
    figure, axes = plt.subplots(figsize=(6.4, 0.26 * len(ways) + 1.1))
    places = range(len(ways))
    for number, (moment, marker) in enumerate((("before", "s"), ("after 3 steps", "o"))):
        losses = [way["eval_loss"][number] for way in ways.values()]
        axes.plot(losses, places, linestyle="", marker=marker, label=moment)
        axes.axvline(losses[0], marker="", linestyle=":", linewidth=1, color=plots.BLACK)
    axes.set_yticks(places, ways)
    axes.invert_yaxis()
    axes.set_xlabel("held-out loss, nats a token; dotted: that of the first line")
    axes.legend(fontsize=8)
    ends = [[way["eval_loss"][moment] for way in ways.values()] for moment in (0, 1)]
    spread = [f"{min(losses):.4f} and {max(losses):.4f}" for losses in ends]
    plots.show(
        figure,
        f"Held-out loss of one model in {len(ways)} ways of taking the same rows. Before the first step it lies "
        f"between {spread[0]} in all of them, after three steps between {spread[1]}.",
    )
    rows = [
        [name, *(f"{loss:.4f}" for loss in way["eval_loss"]), f"{way['loss'][0]:.4f}"]
        for name, way in ways.items()
    ]
    plots.table(["way", "held out, before", "after", "loss of the first step"], rows)
