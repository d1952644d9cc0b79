"""One house style for all figures, and a way to show a figure with its text for those who cannot see it."""

import base64
import html
from io import BytesIO

import matplotlib.pyplot as plt
from IPython.display import HTML, display

# Okabe and Ito's palette (2008): it can be told apart with any kind of colour vision.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def show(figure: plt.Figure, alt: str) -> None:
    """Show a figure as a small PNG with alternative text, and close it.

    Args:
        figure: what to show.
        alt: one or two sentences that say what the figure shows, with its numbers.

    Raises:
        ValueError: `alt` is empty.
    """
    if not alt.strip():
        raise ValueError("A figure needs alt text: one or two sentences that say what it shows.")
    png = BytesIO()
    figure.savefig(png, format="png", dpi=100, bbox_inches="tight")
    plt.close(figure)
    data = base64.b64encode(png.getvalue()).decode()
    display(HTML(f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'))
