"""The site: whole, searchable and readable without a network, in both themes, by keyboard and by ear."""

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

from nbutils.common.paths import ROOT
from nbutils.publishing import site

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
DOCS = sorted(path.relative_to(ROOT).with_suffix("") for path in (ROOT / "docs").rglob("*.md"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return site.build(tmp_path_factory.mktemp("site") / "out")


@pytest.fixture(scope="module")
def soups(built):
    return {path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in built}


def leads_to(page: Path, address: str) -> tuple[Path, str]:
    """The file that a relative address on a page names, and the place in it."""
    parts = urlparse(address)
    return (page.parent / unquote(parts.path)).resolve() if parts.path else page, unquote(parts.fragment)


# ---- without a browser ----------------------------------------------------------------------------------------------


def test_there_is_a_page_for_each_notebook_and_document_in_order(built):
    top = built[0].parent
    names = ["README", *(f"notebooks/{path.stem}" for path in NOTEBOOKS)]
    names += [str(path) for path in DOCS if path.stem != "teachers_notes"] + ["CONTRIBUTING"]
    assert [str(path.relative_to(top)) for path in built] == [f"{name}.html" for name in names]
    assert (top / "index.html").read_bytes() == built[0].read_bytes()


def test_the_contents_at_the_side_have_the_titles_of_the_notebooks(soups):
    titles = {page.stem: soup.find("h1").get_text().rstrip("¶#") for page, soup in soups.items()}
    for page, soup in soups.items():
        listed = {leads_to(page, a["href"])[0].stem: a.get_text() for a in soup.select(".sidebar-tree a")}
        listed[page.stem] = titles[page.stem]  # a page links to itself as "#"
        assert {name: listed.get(name) for name in titles if name != "README"} == {
            name: title for name, title in titles.items() if name != "README"
        }, page


def test_every_cell_is_on_its_page_with_its_outputs(soups):
    for path, (page, soup) in zip(NOTEBOOKS, list(soups.items())[1:]):
        assert page.stem == path.stem
        cells = [c for c in nbformat.read(path, as_version=4).cells if c.source.strip()]
        code = [c for c in cells if c.cell_type == "code"]
        shown = [tag.get_text().strip("\n") for tag in soup.select("div.cell_input pre")]
        assert shown == [c.source.strip("\n") for c in code], path.name
        assert len(soup.select("div.cell_output")) == sum(bool(c.outputs) for c in code), path.name
        text = soup.find("article").get_text()
        for cell in code:
            for output in cell.outputs:
                assert output.output_type != "stream" or output.text.strip() in text, cell.id
        html = "".join(o.get("data", {}).get("text/html", "") for c in code for o in c.outputs)
        sources = {tag["src"] for tag in soup.select("div.cell_output img")}
        assert sources >= {tag["src"] for tag in BeautifulSoup(html, "html.parser").select("img")}, path.name


def test_every_link_leads_to_a_page_and_a_place_on_it(soups):
    for page, soup in soups.items():
        for link in soup.select("a[href], link[href]"):
            if urlparse(link["href"]).scheme in ("http", "https"):
                continue  # a reader's own click; `make links` asks them
            target, place = leads_to(page, link["href"])
            assert target.is_file(), f"{page.name}: {link['href']}"
            assert not place or target not in soups or soups[target].find(id=place), (
                f"{page.name}: {link['href']}"
            )


def test_nothing_is_fetched_from_elsewhere(soups, built):
    for page, soup in soups.items():
        assert not soup.select("iframe, object, embed"), page
        fetched = [tag["src"] for tag in soup.select("[src]")]
        fetched += [tag["href"] for tag in soup.select("link[href]")]
        for address in fetched:
            assert urlparse(address).scheme in ("", "data"), f"{page.name}: {address[:80]}"
    for style in built[0].parent.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text()), style


def test_pages_can_be_read_by_ear_and_by_keyboard(soups):
    for page, soup in soups.items():
        assert soup.html["lang"] == "en" and soup.title.get_text()
        ids = [tag["id"] for tag in soup.select("[id]")]
        assert len(ids) == len(set(ids)), page
        levels = [int(heading.name[1]) for heading in soup.select("h1, h2, h3, h4, h5, h6")]
        assert levels[0] == 1 and levels.count(1) == 1, page
        assert all(after - before <= 1 for before, after in pairwise(levels)), f"{page}: {levels}"
        assert all(len(image.get("alt", "")) > 40 for image in soup.select("img")), page
        assert all(table.select("th") for table in soup.select("table")), page


BROKEN = {
    "a link to no notebook": (
        new_markdown_cell("[next](08_none.ipynb)"),
        "notebooks/00_first.ipynb, cell 2: WARNING: 'myst' cross-reference target not found: '08_none.ipynb'",
    ),
    "an image without alt text": (
        new_code_cell(
            "1", execution_count=1, outputs=[new_output("display_data", {"text/html": '<img src="data:,">'})]
        ),
        "notebooks/00_first.html has an image without alt text",
    ),
}


@pytest.mark.parametrize("cell, sentence", BROKEN.values(), ids=BROKEN.keys())
def test_a_page_with_something_missing_is_refused(tmp_path, cell, sentence):
    for name in ("notebooks", "docs"):
        (tmp_path / name).mkdir()
    for name in ("README.md", "CONTRIBUTING.md", "docs/d.md"):
        (tmp_path / name).write_text(f"# {name}\n")
    book = new_notebook(
        cells=[new_markdown_cell("# T"), cell], metadata={"language_info": {"name": "python"}}
    )
    nbformat.write(book, tmp_path / "notebooks/00_first.ipynb")
    with pytest.raises(site.BrokenPage, match=re.escape(sentence)):
        site.build(tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


def test_only_an_earlier_site_is_replaced(built, tmp_path):
    (tmp_path / "thesis.md").touch()
    with pytest.raises(FileExistsError, match="is no earlier site, and is left as it is"):
        site.build(tmp_path)
    assert (tmp_path / "thesis.md").exists()


# ---- with a browser -------------------------------------------------------------------------------------------------

LOOK = """({
  address: location.href.split('#')[0],
  links: [...document.links].map(link => link.href),
  ids: [...document.querySelectorAll('[id]')].map(tag => tag.id),
  blank: [...document.images].filter(image => !image.naturalWidth || !image.alt).map(image => image.src.slice(0, 60)),
  // Furo's column scrolls by itself if something in it is too wide; code and tables scroll within their own frames.
  sideways: Math.max(...[document.documentElement, ...document.querySelectorAll('.content')]
    .map(tag => tag.scrollWidth - tag.clientWidth)),
})"""

# Words whose colour does not stand out from what lies behind them: contrast below 4.5, or 3 for large ones (WCAG 2.2).
FAINT = """(() => {
  const parts = colour => {
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const seen = new Map();
  const known = colour => { if (!seen.has(colour)) seen.set(colour, parts(colour)); return seen.get(colour); };
  const light = rgb => rgb.slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = tag => {
    for (; tag; tag = tag.parentElement) {
      const colour = known(getComputedStyle(tag).backgroundColor);
      if (colour[3] > 250) return colour;
    }
    return [255, 255, 255, 255];
  };
  const found = {};
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let words = 0;
  while (walk.nextNode()) {
    const tag = walk.currentNode.parentElement, how = getComputedStyle(tag);
    if (!walk.currentNode.data.trim() || !tag.checkVisibility({visibilityProperty: true})) continue;
    if (['SCRIPT', 'STYLE', 'NOSCRIPT'].includes(tag.tagName)) continue;
    words += 1;
    const size = parseFloat(how.fontSize), large = size >= 24 || (size >= 18.66 && how.fontWeight >= 700);
    const [a, b] = [light(known(how.color)), light(ground(tag))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < (large ? 3 : 4.5))
      found[`${how.color} on ${ground(tag)}: ${contrast.toFixed(2)}`] = walk.currentNode.data.trim().slice(0, 40);
  }
  return {words, found};
})()"""
THEMES = ("light", "dark")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if browser.find() is None:
        pytest.skip(browser.MISSING)
    profile = tmp_path_factory.mktemp("profile")
    with browser.browser(profile) as opened:
        yield opened
    left = [p for p in psutil.process_iter(["cmdline"]) if str(profile) in " ".join(p.info["cmdline"] or [])]
    assert psutil.wait_procs(left, timeout=10)[1] == [], "a browser is left"


@pytest.fixture(params=THEMES)
def theme(page, request):
    page.call(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": request.param}]
    )
    yield request.param
    page.call("Emulation.setEmulatedMedia", features=[])


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
        elif anchor and target in known and unquote(anchor) not in known[target]:
            found.append(f"no place: {link}")
    return found


def test_a_browser_walks_through_the_site_without_a_complaint(page, built, theme):
    page.open(built[0].as_uri())
    seen, grounds, further = {}, set(), "document.querySelector('.related-pages a.next-page')"
    while True:
        look, faint = page.show(LOOK), page.show(FAINT)
        assert look["sideways"] <= 0, f"{look['address']} is wider than the window"
        assert faint["words"] > 50 and faint["found"] == {}, look["address"]
        grounds.add(page.show("getComputedStyle(document.body).backgroundColor"))
        seen[look["address"]] = (look, page.complaints, page.requests)
        if not page.show(f"!!{further}"):
            break
        page.follow(lambda: page.show(f"{further}.click()"))
    assert list(seen) == [path.as_uri() for path in built]
    (ground,) = grounds
    assert (ground == "rgb(255, 255, 255)") == (theme == "light"), ground
    known = {address: set(look["ids"]) for address, (look, *_) in seen.items()}
    for look, complaints, requests in seen.values():
        page.complaints, page.requests = complaints, requests
        assert problems(page, look, known) == []


def test_words_are_found_by_the_search_without_a_server(page, built):
    page.open(f"{(built[0].parent / 'search.html').as_uri()}?q=corrupt")
    found = page.show("""new Promise((done, fail) => {
      let before = 0;  // results come one after the other: all are there when no more come
      const look = () => {
        const links = [...document.querySelectorAll('#search-results li a')].map(link => link.href);
        if (links.length && links.length === before) return done(links);
        before = links.length;
        setTimeout(look, 500);
      };
      look(); setTimeout(() => done([]), 10000);
    })""")
    assert page.complaints == [] and found, page.complaints
    wanted = [path for path in NOTEBOOKS if re.search(r"\bcorrupt", path.read_text(encoding="utf-8"))]
    assert wanted and {path.stem for path in wanted} <= {Path(urlparse(a).path).stem for a in found}


def test_code_has_a_button_that_copies_it(page, built):
    page.open(built[1].as_uri())
    inputs, buttons, others = page.show("""[
      document.querySelectorAll('div.cell_input pre').length,
      document.querySelectorAll('div.cell_input button.copybtn').length,
      document.querySelectorAll('div.cell_output button.copybtn').length]""")
    assert inputs == buttons > 10 and others == 0


def test_the_first_key_skips_to_the_content(page, built):
    page.open(built[1].as_uri())
    page.press("Tab", 9)
    assert page.show("document.activeElement.textContent") == "Skip to content"
    assert page.show("document.activeElement.getBoundingClientRect().left >= 0"), (
        "focused, and not to be seen"
    )
    page.press("Enter", 13)
    target = page.show("document.querySelector(location.hash)?.contains(document.querySelector('h1'))")
    assert target is True


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
        "<a href='#nowhere'>a</a><a href='other.html'>b</a><p style='color: #999'>faint</p>"
        "<script>console.error('oh'); undefined_name</script>"
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
    assert list(page.show(FAINT)["found"].values()) == ["faint"]
