"""Headings of a notebook, as JupyterLab and a screen reader list them."""

import re

import nbformat


def headings(path) -> list[tuple[int, str]]:
    found = []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"^```.*?^```", "", cell.source, flags=re.MULTILINE | re.DOTALL)
            found += [(len(marks), title) for marks, title in re.findall(r"^(#+) (.*)", text, re.MULTILINE)]
    return found
