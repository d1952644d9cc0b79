"""The site: whole, readable without a network, by keyboard and by ear. With a browser if there is one, and without."""

import re
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import browser
import nbformat
import psutil
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from pygments.styles import get_style_by_name

from nbutils.common.paths import ROOT
from nbutils.publishing import site

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return site.build(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def soups(built):
    return {path.name: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in built}


# ---- without a browser ----------------------------------------------------------------------------------------------


def test_there_is_a_page_for_each_notebook_and_they_are_linked_in_order(soups):
    names = ["index.html", *(f"{path.stem}.html" for path in NOTEBOOKS), "workshop.html"]
    assert list(soups) == names
    for name, after in pairwise(names):
        assert {link["href"] for link in soups[name].select("a[rel=next]")} == {after}
    for name, before in zip(names[2:], names[1:]):
        assert {link["href"] for link in soups[name].select("a[rel=prev]")} == {before}
    listed = [link["href"] for link in soups["index.html"].select("main table a")]
    assert listed == names[1:-1]


def test_every_cell_is_on_its_page(soups):
    for path in NOTEBOOKS:
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.source.strip()]
        shown = soups[f"{path.stem}.html"].select("main div.cell")
        assert [cell["id"] for cell in shown] == [f"cell-id-{cell.id}" for cell in cells]


def test_every_link_leads_to_a_page_and_a_place_on_it(soups):
    for name, soup in soups.items():
        for link in soup.select("a[href], link[href]"):
            target, anchor = urldefrag(link["href"])
            if re.match(r"https?://", target) or target.startswith("data:"):
                continue  # a reader's own click
            page = soups.get(target or name)
            assert page is not None or target == "style.css", f"{name}: {link['href']}"
            assert not anchor or page.find(id=anchor), f"{name}: {link['href']}"


def test_nothing_is_fetched_from_elsewhere(soups, built):
    for name, soup in soups.items():
        assert not soup.select("script, iframe, object, embed"), name
        for tag in soup.select("[src]"):
            assert tag["src"].startswith("data:image/"), f"{name}: {tag['src'][:80]}"
    style = (built[0].parent / "style.css").read_text()
    assert "url(" not in style and "@import" not in style


def test_pages_can_be_read_by_ear_and_by_keyboard(soups):
    for name, soup in soups.items():
        assert soup.html["lang"] == "en" and soup.title.get_text()
        ids = [tag["id"] for tag in soup.select("[id]")]
        assert len(ids) == len(set(ids)), name
        skip = soup.body.find("a")
        assert skip["href"] == "#content" and soup.find(id="content").name == "main"
        levels = [int(heading.name[1]) for heading in soup.select("h1, h2, h3, h4, h5, h6")]
        assert levels[0] == 1 and levels.count(1) == 1, name
        assert all(after - before <= 1 for before, after in pairwise(levels)), f"{name}: {levels}"
        assert all(len(image.get("alt", "")) > 40 for image in soup.select("img")), name
        assert all(table.select("th") for table in soup.select("table")), name
        labels = [nav["aria-label"] for nav in soup.select("nav")]
        assert len(labels) == len(set(labels))


def test_two_builds_are_equal(built, tmp_path):
    for path in site.build(tmp_path):
        assert path.read_bytes() == (built[0].parent / path.name).read_bytes()


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour.lstrip("#")[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_stands_out_from_its_background():
    colours = dict(re.findall(r"--(\w+): (#\w{6});", site.STYLE))
    words = {"ink": colours["ink"], "link": colours["link"]}
    words |= {
        str(token): f"#{how['color']}" for token, how in get_style_by_name(site.HIGHLIGHTING) if how["color"]
    }
    assert len(words) > 10
    for name, colour in words.items():
        for ground in (colours["paper"], colours["soft"]):
            assert contrast(colour, ground) >= 4.5, f"{name} {colour} on {ground}"


BROKEN = {
    "a link to no notebook": (new_markdown_cell("# T\n\n[next](08_none.ipynb)"), "links to 08_none.ipynb"),
    "an image without alt text": (
        new_code_cell(
            "1", execution_count=1, outputs=[new_output("display_data", {"text/html": '<img src="data:,">'})]
        ),
        "without alt text",
    ),
}


@pytest.mark.parametrize("cell, sentence", BROKEN.values(), ids=BROKEN.keys())
def test_a_page_with_something_missing_is_refused(tmp_path, cell, sentence):
    nbformat.write(new_notebook(cells=[new_markdown_cell("# T"), cell]), tmp_path / "00_first.ipynb")
    with pytest.raises(site.BrokenPage, match=sentence):
        site.build(tmp_path / "out", tmp_path)


# ---- with a browser -------------------------------------------------------------------------------------------------

LOOK = """({
  address: location.href,
  links: [...document.links].map(link => link.href),
  ids: [...document.querySelectorAll('[id]')].map(tag => tag.id),
  blank: [...document.images].filter(image => !image.naturalWidth || !image.alt).map(image => image.src.slice(0, 60)),
  sideways: document.documentElement.scrollWidth - document.documentElement.clientWidth,
})"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if browser.find() is None:
        pytest.skip(browser.MISSING)
    profile = tmp_path_factory.mktemp("profile")
    with browser.browser(profile) as opened:
        yield opened
    left = [p for p in psutil.process_iter(["cmdline"]) if str(profile) in " ".join(p.info["cmdline"] or [])]
    assert psutil.wait_procs(left, timeout=10)[1] == [], "a browser is left"


def problems(page, seen: dict, known: dict[str, set[str]]) -> list[str]:
    """What is wrong with the page that was opened last.

    Args:
        seen: what LOOK found there.
        known: address of a page -> ids on it.
    """
    outside = [a for a in page.requests if urlparse(a).scheme not in ("file", "data")]
    found = [*page.complaints, *(f"asked the network for {address}" for address in outside)]
    found += [f"no image: {source}" for source in seen["blank"]]
    for link in seen["links"]:
        target, anchor = urldefrag(link)
        if urlparse(target).scheme != "file":
            continue
        if not Path(unquote(urlparse(target).path)).is_file():
            found.append(f"no page: {target}")
        elif anchor and anchor not in known[target]:
            found.append(f"no place: {link}")
    return found


def test_a_browser_walks_through_the_site_without_a_complaint(page, built):
    page.open(built[0].as_uri())
    seen = {}
    while True:
        look = page.show(LOOK)
        assert look["sideways"] <= 0, f"{look['address']} is wider than the window"
        seen[look["address"]] = (look, page.complaints, page.requests)
        if not page.show("!!document.querySelector('a[rel=next]')"):
            break
        page.follow(lambda: page.show("document.querySelector('a[rel=next]').click()"))
    assert list(seen) == [path.as_uri() for path in built]
    known = {address: set(look["ids"]) for address, (look, *_) in seen.items()}
    for look, complaints, requests in seen.values():
        page.complaints, page.requests = complaints, requests
        assert problems(page, look, known) == []


def test_the_first_key_skips_to_the_content(page, built):
    page.open(built[1].as_uri())
    page.press("Tab", 9)
    assert page.show("document.activeElement.className") == "skip"
    assert page.show("document.activeElement.getBoundingClientRect().left >= 0"), (
        "focused, and not to be seen"
    )
    page.press("Enter", 13)
    assert page.show("[location.hash, document.activeElement.id]") == ["#content", "content"]


def test_the_pages_fit_a_phone(page, built):
    page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    try:
        for path in built:
            page.open(path.as_uri())
            assert page.show(LOOK)["sideways"] <= 0, path.name
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")


def test_the_browser_notices_what_is_broken(page, tmp_path):
    """The same eyes on a page with each fault: without this, silence would prove nothing."""
    path = tmp_path / "broken.html"
    path.write_text(
        "<!DOCTYPE html><title>t</title><img alt='gone' src='gone.png'><img alt='far' src='http://127.0.0.1:9/far.png'>"
        "<a href='#nowhere'>a</a><a href='other.html'>b</a><script>console.error('oh'); undefined_name</script>"
    )
    page.open(path.as_uri())
    found = "\n".join(problems(page, page.show(LOOK), {path.as_uri(): set()}))
    for part in (
        "loading failed",
        "asked the network for http://127.0.0.1:9/far.png",
        "no image: file:",
        "oh",
    ):
        assert part in found
    for part in ("exception: Uncaught", "#nowhere", "no page: "):
        assert part in found
