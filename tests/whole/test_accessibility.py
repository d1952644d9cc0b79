"""The committed notebooks for readers who see no figure, or see its colours otherwise."""

import itertools
import re

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from bs4 import BeautifulSoup
from headings import headings
from matplotlib.colors import to_rgb

from nbutils.common.paths import ROOT
from nbutils.lessons import plots
from nbutils.lessons.course_map import number

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def images(cell) -> list:
    found = []
    for output in cell.outputs:
        data = output.get("data", {})
        assert not [kind for kind in data if kind.startswith("image/")], "an image that carries no alt text"
        found += BeautifulSoup(data.get("text/html", ""), "html.parser").select("img")
    return found


def printed(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def is_twin(text: str) -> bool:
    """A table: a head and at least two rows below it, of two columns or more."""
    columns = [len(re.split(r"\s{2,}", line.strip())) for line in text.splitlines()]
    return any(min(three) >= 2 for three in zip(columns, columns[1:], columns[2:]))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_figure_has_alt_text_and_a_twin_in_text(path):
    cells = code_cells(path)
    for place, cell in enumerate(cells):
        for image in images(cell):
            assert len(image.get("alt", "").split()) >= 8, f"cell {cell.id}: say what the figure shows"
            after = cells[place + 1] if place + 1 < len(cells) else cell
            assert is_twin(printed(cell)) or is_twin(printed(after)), f"cell {cell.id}: print the numbers too"


def test_prose_beside_a_figure_is_no_twin_of_it(capsys):
    assert not is_twin(
        "Writing runs/latest/probe.py\nstep 3/3 | loss 1.0 | finished after 2 s\nheld out: 4.2\n"
    )
    plots.table(["setting", "kept KiB"], [["FULL_SHARD", "337"], ["NO_SHARD", "674"]])
    assert is_twin(capsys.readouterr().out)


def test_some_notebooks_have_figures():
    assert sum(len(images(cell)) for path in NOTEBOOKS for cell in code_cells(path)) >= 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_headings_are_in_order(path):
    """JupyterLab's table of contents and a screen reader's list are made of them."""
    found = headings(path)
    levels = [level for level, _ in found]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels)), found
    titles = [title for _, title in found]
    assert len(titles) == len(set(titles)), "two sections of one name"
    assert titles[0].startswith(f"{number(path.stem)} · ")


# ---- colours --------------------------------------------------------------------------------------------------------

# What the three kinds of dichromats see, in linear RGB: Machado, Oliveira and Fernandes 2009, severity 1.0.
SEEN_BY = {
    "everybody else": np.eye(3),
    "protanopes": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopes": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopes": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
ENOUGH = 10  # distance in CIELAB; 2.3 can just be told apart side by side


def lab(rgb: np.ndarray) -> np.ndarray:
    """Linear RGB to CIELAB under D65; shape (3,)."""
    to_xyz = [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
    x, y, z = (
        v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116
        for v in (to_xyz @ rgb) / [0.95047, 1.0, 1.08883]
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def as_seen(colour: str, kind: str) -> np.ndarray:
    srgb = np.array(to_rgb(colour))
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return lab(np.clip(np.array(SEEN_BY[kind]) @ linear, 0, 1))


def closest(colours, kind) -> float:
    seen = [as_seen(colour, kind) for colour in colours]
    return min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2))


@pytest.mark.parametrize("kind", SEEN_BY)
def test_the_palette_can_be_told_apart(kind):
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    assert closest(colours, kind) > ENOUGH


def test_the_measure_of_the_palette_finds_a_bad_one():
    assert (
        closest(["#d62728", "#2ca02c"], "everybody else")
        > ENOUGH
        > closest(["#a06000", "#608000"], "deuteranopes")
    )


def test_each_line_has_a_marker_of_its_own_and_each_dtype_a_hatch():
    cycle = plt.rcParams["axes.prop_cycle"].by_key()
    assert len(set(cycle["marker"])) == len(cycle["color"]) == 7
    figure, axes = plt.subplots()
    lines = [axes.plot([0, 1], [n, n])[0] for n in range(7)]
    plt.close(figure)
    assert [line.get_marker() for line in lines] == cycle["marker"]
    hatches = [plots.DTYPE_HATCHES[kind] for kind in ("bfloat16", "float32", "float16", "uint8")]
    assert len(set(hatches)) == 4 and plots.DTYPE_HATCHES.keys() == plots.DTYPE_COLOURS.keys()


def test_figures_take_their_colours_from_the_palette():
    sources = {
        path.name: path.read_text() for path in (ROOT / "nbutils").rglob("*.py") if path.stem != "plots"
    }
    sources |= {path.name: "\n".join(cell.source for cell in code_cells(path)) for path in NOTEBOOKS}
    for name, text in sources.items():
        for colour in re.findall(r"""\b(?:color|c|edgecolor|facecolor)=["']([^"']+)["']""", text):
            assert colour in ("white", "black", "none"), f"{name}: {colour} is not of the palette"
