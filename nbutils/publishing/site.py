"""The site, read from disk: Sphinx makes it as docs/conf.py says, and a page with something missing is refused."""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bs4 import BeautifulSoup

from nbutils.common.paths import ROOT

CONFIG = ROOT / "docs"
FIRST = "README.html"
MARK = "searchindex.js"  # a folder that holds it is a site


class BrokenPage(ValueError):
    """A page that would be shown with something missing."""


def build(out: Path, root: Path = ROOT) -> list[Path]:
    """Write a page for the README, for each notebook with its committed outputs, and for the docs.

    Args:
        out: folder; made if missing. An earlier site in it is replaced.
        root: folder with README.md, CONTRIBUTING.md, notebooks/ and docs/.

    Returns:
        The pages in the order in which one leads to the next, README first; `index.html` is the same as it.

    Raises:
        BrokenPage: a link that leads nowhere, anything else that Sphinx warns of, or an image without alt text.
        FileExistsError: there is something else than an earlier site.
    """
    if out.exists() and not (out.is_dir() and ((out / MARK).exists() or not any(out.iterdir()))):
        raise FileExistsError(
            f"{out} is no earlier site, and is left as it is. Name a new or an empty folder."
        )
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder, "site")
        words = ["-b", "html", "-c", CONFIG, "-d", Path(folder, "doctrees"), "-E", "-q", "-W", "--keep-going"]
        command = [sys.executable, "-m", "sphinx", *map(str, words), str(root), str(new)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BrokenPage(f"Sphinx cannot make the site:\n{_readable(done.stderr, root)}")
        names = _in_order(new)
        shutil.copyfile(new / FIRST, new / "index.html")
        if out.exists():
            shutil.rmtree(out)
        shutil.copytree(new, out)
    return [out / name for name in names]


def _readable(warnings: str, root: Path) -> str:
    """What Sphinx said, without the folder, and with the cell: its lines of a notebook are 10,000 times the cell."""
    return re.sub(r"\.ipynb:(\d+)\d{4}:", r".ipynb, cell \1:", warnings.replace(f"{root}/", ""))


def _in_order(site: Path) -> list[str]:
    """The pages, found by following each page's link to the next; no image on them may lack alt text."""
    names = [FIRST]
    while True:
        page = site / names[-1]
        soup = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
        if any(not image.get("alt", "").strip() for image in soup.select("img")):
            raise BrokenPage(
                f"{names[-1]} has an image without alt text; show figures with nbutils.lessons.plots.show."
            )
        following = soup.select_one("link[rel=next]")
        if following is None:
            return names
        names.append(str((page.parent / following["href"]).resolve().relative_to(site.resolve())))


def main(out: Path) -> int:
    """Write the site and say where it begins; return the exit status."""
    pages = build(out)
    print(f"{len(pages)} pages; open {out / 'index.html'}")
    return 0
