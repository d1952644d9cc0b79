"""The house style of the figures: colours that everybody can tell apart, markers as well, alt text, small files."""

import base64
import io
from collections.abc import Sequence
from html import escape

import matplotlib.pyplot as plt
from cycler import cycler
from IPython.display import HTML, display

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), without yellow, which is too light for lines on white.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
# One colour for each dtype, the same in all lessons; the hatch says it again without colour.
DTYPE_COLOURS = {"bfloat16": SKY, "float32": VERMILION, "float16": PURPLE, "uint8": BLACK, "int8": BLACK}
DTYPE_HATCHES = {"bfloat16": "", "float32": "///", "float16": "...", "uint8": "xxx", "int8": "xxx"}
MAX_BYTES = 100_000

plt.rcParams.update(
    {
        "axes.prop_cycle": cycler(color=[BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK])
        + cycler(marker=["o", "s", "^", "D", "v", "P", "X"]),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "figure.figsize": (6.4, 3.2),
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "hatch.linewidth": 0.6,
        "legend.frameon": False,
        "lines.markersize": 4,
    }
)


def show(figure: plt.Figure, alt: str, dpi: int = 110) -> None:
    """Display a figure as an `<img>` with alt text, and close it.

    Args:
        figure: a matplotlib figure; closed afterwards, so that the notebook does not show it twice.
        alt: what the figure says, in a sentence or two, with its main numbers, for readers who cannot see it.
        dpi: dots an inch; lowered if the PNG would exceed 100 kB.

    Raises:
        ValueError: there is no alt text.
    """
    if not alt.strip():
        raise ValueError(
            "A figure needs alt text: one or two sentences that say what it shows, with its numbers."
        )
    data = _png(figure, dpi)
    while len(data) > MAX_BYTES and dpi > 50:
        dpi -= 15
        data = _png(figure, dpi)
    plt.close(figure)
    image = base64.b64encode(data).decode()
    text = escape(" ".join(alt.split()), quote=True)
    display(HTML(f'<img alt="{text}" src="data:image/png;base64,{image}">'))


def table(head: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Print rows under a head, columns aligned: numbers to the right, text to the left.

    Args:
        head: column names.
        rows: one sequence a row, as long as `head`; format numbers as text with the digits that matter.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(head), *cells]) for i in range(len(head))]
    right = [all(_is_number(row[i]) for row in cells) for i in range(len(head))]
    for row in [list(head), *cells]:
        line = "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, right)
        )
        print(line.rstrip())


def _is_number(text: str) -> bool:
    return text.strip(" +-.%0123456789,eGMKiBs") == "" and any(c.isdigit() for c in text)


def _png(figure: plt.Figure, dpi: int) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
