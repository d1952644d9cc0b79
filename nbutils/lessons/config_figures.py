"""Figures of lessons 01 and 01b: what a strategy keeps and moves, and in what order weights are asked for."""

import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from nbutils.lessons.plots import BLACK, BLUE, GREEN, ORANGE, SKY, show, table


def backward_order(events: list, layers: list[str]) -> list[tuple[str, str]]:
    """The events of the backward pass that concern whole layers.

    Args:
        events: what a rank logged in one step: ("gather", unit, bytes), ("forward", layer), ("backward", layer), ...
        layers: names of the layers to follow, like "layers.3".

    Returns:
        ("get" or "do", layer) in the order in which the rank issued them.
    """
    begin = max(i for i, event in enumerate(events) if event[0] == "forward")
    words = {"gather": "get", "backward": "do"}
    return [(words[e[0]], e[1]) for e in events[begin + 1 :] if e[0] in words and e[1] in layers]


def draw_strategies(rows: dict[str, tuple[float, float, float]], title: str, card: float) -> None:
    """Bars of the GiB on a rank beside the GiB that it receives, each with its number.

    Args:
        rows: setting to GiB (kept all the time, gathered between the passes, received in a step).
        title: what the figure says.
        card: memory of a GPU in GiB, drawn as a line.
    """
    names = list(rows)
    kept, held, moved = zip(*rows.values())
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.4, 3.3), sharey=True, width_ratios=(3, 2))
    left.barh(names, kept, color=BLUE, label="kept all the time")
    left.barh(names, held, left=kept, color=SKY, hatch="///", label="gathered, between the passes")
    left.axvline(card, color=BLACK, marker="", linestyle="--", label=f"a 24 GB card: {card} GiB")
    right.barh(names, moved, color=GREEN)
    for row, (base, extra, received) in enumerate(rows.values()):
        total = f"{base + extra:.1f}" if extra else f"{base:.1f}"
        left.text(max(base + extra, card) + 0.8, row, total, va="center", fontsize=9)
        right.text(received + 0.6, row, f"{received:.1f}", va="center", fontsize=9)
    left.set(xlabel="GiB of weights on a GPU", xlim=(0, 1.18 * max(map(sum, zip(kept, held)))))
    right.set(xlabel="GiB that a GPU receives in a step", xlim=(0, 1.2 * max(moved)))
    left.invert_yaxis()
    figure.suptitle(title, fontsize=10)
    figure.legend(*left.get_legend_handles_labels(), ncols=3, fontsize=9, loc="outside lower center")
    told = [f"{n}: {a:.1f} GiB kept, {b:.1f} gathered, {c:.1f} received" for n, (a, b, c) in rows.items()]
    show(figure, f"{title}. Bars for each setting, beside a card of {card} GiB. " + "; ".join(told) + ".")


def draw_orders(orders: dict[str, list[tuple[str, str]]]) -> None:
    """One row of boxes for each setting, in the order in which the rank issued gathers and computation; and as a table.

    Args:
        orders: setting to what `backward_order` returned; a line break in a setting's name is kept in the figure.
    """
    figure, axis = plt.subplots(figsize=(7.2, 3.6))
    for row, events in enumerate(orders.values()):
        for column, (word, unit) in enumerate(events):
            early = is_early(events, column)
            colour = GREEN if early else SKY if word == "get" else ORANGE
            axis.barh(row, 0.94, left=column, color=colour, hatch="///" if early else "", edgecolor="white")
            label = {"ha": "center", "va": "center", "fontsize": 9}
            label["bbox"] = {"facecolor": colour, "edgecolor": "none", "pad": 1.5}
            axis.text(column + 0.47, row, f"{word} {unit[-1]}", **label)
    axis.set_yticks(range(len(orders)), list(orders))
    axis.invert_yaxis()
    axis.set_xticks([])
    axis.grid(False)
    axis.set_xlabel("order in the backward pass.  get 3: ask for the weights of layer 3;  do 3: compute it")
    axis.set_title("Only with whole layers as units is the next layer asked for early", loc="left")
    names = {SKY: "asked for late: little time to travel", GREEN: "asked for early", ORANGE: "computation"}
    patches = [Patch(color=colour, label=name) for colour, name in names.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=3)
    rows = [
        [name.replace("\n", " "), " ".join(word + unit[-1] for word, unit in order)]
        for name, order in orders.items()
    ]
    show(figure, "Order of events in the backward pass. " + "; ".join(": ".join(row) for row in rows) + ".")
    table(["setting", "order"], rows)


def is_early(events: list[tuple[str, str]], place: int) -> bool:
    """Whether this event asks for a layer while another one still waits for its computation.

    Args:
        events: as `backward_order` returned them.
        place: of the event among them.
    """
    asked = {unit for word, unit in events[:place] if word == "get"}
    done = {unit for word, unit in events[:place] if word == "do"}
    return events[place][0] == "get" and bool(asked - done)
