"""The figure of lesson 04b: one run that is never stopped, and one that is killed and goes on."""

import matplotlib.pyplot as plt

from nbutils.lessons import plots

NEW, AGAIN = {"facecolor": plots.SKY}, {"facecolor": plots.ORANGE, "hatch": "///"}


def draw_resume(steps: int, save_steps: int, killed_in: int, damaged: int) -> None:
    """Draw the steps of both runs as boxes and their checkpoints as diamonds, and print them.

    Args:
        steps: of the whole run.
        save_steps: a checkpoint is written after every so many.
        killed_in: the step in which the second run is killed.
        damaged: this checkpoint is unusable; the second run goes on from the one before it.
    """
    begins = damaged - save_steps
    runs = {
        "never stopped": range(1, steps + 1),
        "killed": range(1, killed_in),
        "goes on": range(begins + 1, steps + 1),
    }
    saved = [[step for step in made if step % save_steps == 0] for made in runs.values()]
    figure, axes = plt.subplots(figsize=(7.2, 2.7))
    for row, made in enumerate(runs.values()):
        for step in made:
            _box(axes, row, step, again=row == 2 and step < killed_in)
        good = [step for step in saved[row] if (row, step) != (1, damaged)]
        axes.plot(good, [row] * len(good), "D", color=plots.BLACK, markersize=7)
    axes.text(killed_in - 0.85, 1, "signal 9", va="center", color=plots.VERMILION, fontweight="bold")
    axes.plot(damaged, 1, "X", markersize=11, color=plots.VERMILION)
    axes.annotate("", (begins + 0.1, 1.8), (begins, 1.15), arrowprops={"arrowstyle": "->", "shrinkB": 4})
    axes.set(xlim=(0, steps + 0.4), ylim=(2.5, -0.5), xticks=[])
    axes.set_yticks(range(3), runs)
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title(
        f"Checkpoint {damaged} is damaged, so the run goes on from checkpoint {begins}", loc="left"
    )
    _legend(figure, axes)
    plots.show(
        figure, f"Steps of three launches. Killed in step {killed_in}; goes on from checkpoint {begins}."
    )
    written = [", ".join(map(str, each)) for each in saved]
    written[1] += f"; {damaged} is damaged"
    plots.table(
        ["run", "steps", "checkpoints"],
        [(name, f"{made[0]} to {made[-1]}", each) for (name, made), each in zip(runs.items(), written)],
    )


def _box(axes: plt.Axes, row: int, step: int, again: bool) -> None:
    axes.barh(row, 0.7, 0.5, step - 0.85, edgecolor="white", **(AGAIN if again else NEW))
    behind = {"fc": "white", "ec": "none", "pad": 0.8} if again else None
    axes.text(step - 0.5, row, str(step), ha="center", va="center", bbox=behind)


def _legend(figure: plt.Figure, axes: plt.Axes) -> None:
    """The legend, from marks outside of the picture."""
    for label, look in (("step", NEW), ("step made again", AGAIN)):
        axes.add_patch(plt.Rectangle((-9, 0), 0.1, 0.1, label=label, edgecolor="white", **look))
    axes.plot([-9], [0], "D", color=plots.BLACK, label="checkpoint", markersize=7)
    axes.plot([-9], [0], "X", color=plots.VERMILION, label="damaged checkpoint", markersize=10)
    figure.legend(ncols=4, loc="outside lower center")
