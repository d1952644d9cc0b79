"""Links within the repository: each leads to a file that is there, and to a place that is in it."""

import subprocess
import sys

from nbutils.common.paths import ROOT

# Every text a reader may open, beside those of the site; data/prose is what the tiny model learns from.
PAGES = ["*.md", "docs/**.md", "*/README.md", "notebooks/*.ipynb"]


def checked(root, out, pages=PAGES) -> subprocess.CompletedProcess:
    """Sphinx's reading of the pages, without a site: it warns of a link or an image that leads nowhere."""
    settings = {
        "include_patterns": ",".join(pages),
        "exclude_patterns": ".*,runs,site,workshop",
        "suppress_warnings": "toc.not_included",
    }
    words = [f"-D{name}={value}" for name, value in settings.items()]
    words += ["-b", "dummy", "-c", str(ROOT / "docs"), "-E", "-q", "-W", "--keep-going", str(root), str(out)]
    return subprocess.run([sys.executable, "-m", "sphinx", *words], capture_output=True, text=True)


def test_every_link_leads_to_a_file_and_a_place(tmp_path):
    done = checked(ROOT, tmp_path / "out")
    assert done.returncode == 0, done.stderr


FAULTS = """# R

[a file](none.md) [a place here](#none) [a place there](docs/d.md#none) ![an image](none.png)

Whole: [there](docs/d.md#some-place), [all of it](docs/d.md), [no text](LICENSE), [here](#here-it-is)

## Here it is
"""


def test_a_link_to_nowhere_is_named(tmp_path):
    for name in ("notebooks", "docs"):
        (tmp_path / name).mkdir()
    for name in ("LICENSE", "CONTRIBUTING.md", "notebooks/n.md", "docs/d.md"):
        (tmp_path / name).write_text("# D\n\n## Some place\n")
    (tmp_path / "README.md").write_text(FAULTS)
    done = checked(tmp_path, tmp_path / "out", ["*.md", "docs/*.md", "notebooks/*.md"])
    told = done.stderr.splitlines()
    assert done.returncode == 1 and len(told) == 4, told
    assert all("README.md:3: " in line for line in told), told
    for named in (
        "image file not readable: none.png",
        "not found: 'none.md'",
        "not found: 'none'",
        "in doc 'docs/d': 'none'",
    ):
        assert sum(named in line for line in told) == 1, (named, told)
