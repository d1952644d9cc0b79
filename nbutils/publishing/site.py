"""The series as static HTML: read from disk, without a network, a script or a font from elsewhere."""

import re
from html import escape
from pathlib import Path
from string import Template

import nbformat
from bs4 import BeautifulSoup
from nbconvert import HTMLExporter
from nbconvert.filters.markdown import markdown2html
from pygments.formatters import HtmlFormatter

from nbutils.common.paths import ROOT
from nbutils.lessons.course_map import LESSONS
from nbutils.publishing.runner import NOTEBOOKS

HIGHLIGHTING = "xcode"  # of Pygments' styles the one whose colours all reach a contrast of 4.5 to 1
WIDE = 80  # characters; a wider output scrolls sideways, so it must be reachable by keyboard
NO_ALT = "No description has been provided for this image"  # what nbconvert fills in
PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<link rel="stylesheet" href="style.css">
<title>$title</title>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<nav class="series" aria-label="Series">$links</nav>
<main id="content" tabindex="-1">
$body
</main>
<nav class="series" aria-label="Series, end of page">$links</nav>
</body>
</html>
""")
STYLE = """\
:root { color-scheme: light; --ink: #1b1f24; --paper: #ffffff; --soft: #f6f8fa; --link: #0550ae; --line: #8c959f; }
body { margin: 0 auto; padding: 0 1rem 3rem; max-width: 52rem; color: var(--ink); background: var(--paper);
  font: 1.05rem/1.6 system-ui, sans-serif; }
a { color: var(--link); text-decoration: underline; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
main:focus { outline: none; }
.skip { position: absolute; left: -100rem; padding: .5rem 1rem; background: var(--paper); }
.skip:focus { left: 1rem; top: .5rem; }
nav.series { display: flex; flex-wrap: wrap; gap: .25rem 2rem; padding: .75rem 0;
  border-bottom: 1px solid var(--line); }
main + nav.series { margin-top: 3rem; border-bottom: 0; border-top: 1px solid var(--line); }
nav.page { margin: 1.5rem 0; padding: .5rem 1.25rem; border-left: 4px solid var(--line); }
h1, h2, h3 { line-height: 1.25; margin: 2em 0 .6em; }
h1 { margin-top: 1em; }
code, pre { font: .88rem/1.45 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.input_area pre, .text_cell_render pre { padding: .75rem; background: var(--soft); white-space: pre-wrap; }
.output pre { margin: .25rem 0; padding: .25rem .75rem; overflow-x: auto; border-left: 4px solid var(--line); }
.prompt { font-size: .8rem; }
table { border-collapse: collapse; margin: 1rem 0; }
.sideways { overflow-x: auto; }
th, td { padding: .3rem .7rem; border: 1px solid var(--line); text-align: left; vertical-align: top; }
img { max-width: 100%; height: auto; }
@media print { nav, .skip { display: none; } }
"""


class BrokenPage(ValueError):
    """A page that would be shown with something missing."""


def build(out: Path, folder: Path = NOTEBOOKS) -> list[Path]:
    """Write a contents page, a page for each notebook, the plan of the workshop, and the style.

    Args:
        out: folder; made if missing. Pages of an earlier build are replaced.
        folder: of the notebooks, with their outputs.

    Returns:
        The pages, the contents page first.

    Raises:
        BrokenPage: a link to a notebook that is not there, or an image without alt text.
    """
    notebooks = sorted((ROOT / folder).glob("[0-9]*_*.ipynb"))
    bodies = {path.stem: _notebook_body(path) for path in notebooks}
    bodies["workshop"] = markdown2html((ROOT / "docs" / "workshop.md").read_text(encoding="utf-8"))
    names = ["index", *bodies]
    soups = {name: _dressed(body, name, names) for name, body in bodies.items()}
    titles = {name: soup.h1.get_text() for name, soup in soups.items()}
    soups["index"] = _dressed(markdown2html(_contents(titles)), "index", names)
    titles["index"] = soups["index"].h1.get_text()

    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("[0-9]*_*.html"), out / "workshop.html"]:
        old.unlink(missing_ok=True)
    for place, name in enumerate(names):
        links = _links(names, place, titles)
        page = PAGE.substitute(title=escape(titles[name]), links=links, body=str(soups[name]))
        (out / f"{name}.html").write_text(page, encoding="utf-8")
    colours = HtmlFormatter(style=HIGHLIGHTING, nobackground=True).get_style_defs(".highlight")
    (out / "style.css").write_text(f"{STYLE}{colours}\n", encoding="utf-8")
    return [out / f"{name}.html" for name in names]


def _notebook_body(path: Path) -> str:
    """The cells as nbconvert's plainest template has them: it links to no script, style or font."""
    exporter = HTMLExporter(template_name="basic", exclude_anchor_links=True)
    return exporter.from_notebook_node(nbformat.read(path, as_version=4))[0]


def _dressed(body: str, name: str, names: list[str]) -> BeautifulSoup:
    """The body with ids for its headings, a list of them, links between pages, and outputs a keyboard can reach."""
    soup = BeautifulSoup(body, "html.parser")
    for mark in soup.select(
        "a.anchor-link"
    ):  # the sign behind a heading, which a screen reader would read out
        mark.decompose()
    for cell in soup.select("div.cell"):
        cell["id"] = cell["id"].replace("=", "-")
    taken = {"content"}
    for heading in soup.select("h1, h2, h3, h4"):
        slug = re.sub(r"[^a-z0-9]+", "-", heading.get_text().lower()).strip("-") or "section"
        while slug in taken:
            slug += "-again"
        heading["id"] = slug
        taken.add(slug)
    for link in soup.select("a[href]"):
        target, dot, anchor = link["href"].partition(".ipynb")
        if dot and "://" not in target:
            if target not in names:
                raise BrokenPage(f"{name} links to {link['href']}, and there is no such notebook.")
            link["href"] = f"{target}.html{anchor}"
    for image in soup.select("img"):
        if image.get("alt", "").strip() in ("", NO_ALT):
            raise BrokenPage(
                f"{name} has an image without alt text; show figures with nbutils.lessons.plots.show."
            )
    for number, text in enumerate(soup.select(".output pre"), 1):
        if max(map(len, text.get_text().splitlines()), default=0) > WIDE:
            text.attrs |= {"tabindex": "0", "role": "region", "aria-label": f"Output {number}"}
    for number, table in enumerate(soup.select("table"), 1):
        region = {"class": "sideways", "tabindex": "0", "role": "region", "aria-label": f"Table {number}"}
        table.wrap(soup.new_tag("div", attrs=region))
    headings = soup.select("h2")
    if len(headings) > 1:
        items = "".join(f'<li><a href="#{h["id"]}">{escape(h.get_text())}</a></li>' for h in headings)
        nav = f'<nav class="page" aria-label="On this page"><ul>{items}</ul></nav>'
        # Behind the first cell of a notebook: title, answer, what will be learned.
        first = soup.select_one("div.cell") or soup.h1
        first.insert_after(BeautifulSoup(nav, "html.parser"))
    return soup


def _contents(titles: dict[str, str]) -> str:
    """The contents page, in Markdown: how the README begins, and the notebooks that are there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lessons = {lesson.name: lesson for lesson in LESSONS}
    rows = [
        f"| [{titles[name]}]({name}.ipynb) | {lessons[name].question} | {lessons[name].reading} "
        f"| {lessons[name].exercises} |"
        for name in titles
        if name in lessons
    ]
    return "\n".join(
        [
            readme[: readme.index("\n| ")],
            "## Contents\n",
            "| notebook | the question it answers | minutes to read | exercises |",
            "| --- | --- | --- | --- |",
            *rows,
            "\nFor a class: [a half-day workshop](workshop.ipynb).",
            "\nOutputs are those of a run with the tiny model on two CPU cores. To run the notebooks yourself, type "
            "`make tutorial` and `make lab` in a clone of the repository.",
        ]
    )


def _links(names: list[str], place: int, titles: dict[str, str]) -> str:
    """Previous page, contents, next page."""
    links = []
    if place > 1:
        links.append(
            f'<a rel="prev" href="{names[place - 1]}.html">Previous: {escape(titles[names[place - 1]])}</a>'
        )
    current = ' aria-current="page"' if place == 0 else ""
    links.append(f'<a href="index.html"{current}>Contents</a>')
    if place + 1 < len(names):
        links.append(
            f'<a rel="next" href="{names[place + 1]}.html">Next: {escape(titles[names[place + 1]])}</a>'
        )
    return "".join(links)


def main(out: Path) -> int:
    """Write the site and say where it begins; return the exit status."""
    pages = build(out)
    print(f"{len(pages)} pages; open {pages[0]}")
    return 0
