"""JupyterLab as people use it: what `make lab` opens, and notebooks that are run again in another order."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.request import Request, urlopen

import browser
import nbformat
import pytest
from headings import headings

from nbutils.common.paths import ROOT
from nbutils.publishing import workshop_proof as proving

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
TOKEN = "only-for-this-test"


def answers(address: str) -> bool:
    try:
        return urlopen(f"{address}/api?token={TOKEN}", timeout=10).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """`make lab` itself, in the environment that runs the tests: the address of its server."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "venv").mkdir()
    (folder / "venv/bin").symlink_to(Path(sys.executable).parent)
    (folder / "venv/.installed").touch()  # nothing to install
    server = {"open_browser": False, "port": 0, "allow_root": True}
    config = {"ServerApp": server, "IdentityProvider": {"token": TOKEN}}
    (folder / "jupyter_server_config.json").write_text(json.dumps(config))
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            ["make", "lab", f"VENV={folder}/venv", f"LAB={folder}/workspaces"],
            cwd=ROOT,
            env={**os.environ, "JUPYTER_CONFIG_DIR": str(folder)},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 60
        while not (found := re.search(r"http://[^\s/]+:\d+(?=/lab)", log.read_text())):
            assert time.monotonic() < end and process.poll() is None, log.read_text()
            time.sleep(0.2)
        while not answers(found[0]):  # the address may be in the log before somebody listens to it
            assert time.monotonic() < end and process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield found[0]
        urlopen(Request(f"{found[0]}/api/shutdown?token={TOKEN}", method="POST"), timeout=10)  # kernels too
        with suppress(subprocess.TimeoutExpired):  # on a busy machine; it is killed below
            process.wait(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.notebook
def test_the_server_lists_the_notebooks_and_gives_them_as_they_are(lab):
    def ask(path):
        return json.load(urlopen(f"{lab}/api/contents/{path}?token={TOKEN}", timeout=10))

    listed = sorted(entry["name"] for entry in ask("")["content"] if entry["type"] == "notebook")
    assert listed == [path.name for path in NOTEBOOKS]
    for path in NOTEBOOKS:
        served = ask(path.name)["content"]["cells"]
        assert [cell["source"] for cell in served] == [c.source for c in nbformat.read(path, 4).cells]


@pytest.mark.notebook
def test_it_opens_with_the_table_of_contents(lab, tmp_path):
    if browser.find() is None:
        pytest.skip(browser.MISSING)
    entries = (
        "[...document.querySelectorAll('.jp-TableOfContents .jp-tocItem-content')].map(e => e.textContent)"
    )
    shown = "document.querySelector('#table-of-contents')?.offsetWidth"
    with browser.browser(tmp_path) as page:
        size = {"width": 1300, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        page.open(f"{lab}/lab?token={TOKEN}")
        end = time.monotonic() + 60
        while not (page.show(entries) and page.show(shown)):
            assert time.monotonic() < end, "no table of contents"
            time.sleep(0.3)
        assert page.show(shown) > 100
        assert page.show(entries) == [title for _, title in headings(NOTEBOOKS[0])]


@pytest.mark.matrix
def test_after_04_every_notebook_runs_again_in_any_order(tmp_path):
    """A restart and a run of all cells, in an order that no reader was told to take; 5 minutes."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns("runs", "site", "workshop", ".git", ".venv*"))
    if (ROOT / "runs/cache").is_dir():
        shutil.copytree(ROOT / "runs/cache", tree / "runs/cache")
    trained, *others = sorted(
        (tree / "notebooks").glob("*.ipynb"), key=lambda path: (not path.name.startswith("04_"), path.name)
    )
    for path in [trained, *reversed(others)]:
        assert proving.failing_cells(proving.run_through(path, tree)) == {}, path.name
    (last,) = (tree / "notebooks").glob("05_*.ipynb")  # once more, behind those that made newer run folders
    assert proving.failing_cells(proving.run_through(last, tree)) == {}
