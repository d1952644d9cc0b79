"""`make newest` with three faults put into today's releases by hand: each is found, named, and laid to its package.

By hand, some ten minutes: python -m pytest -m matrix tests/publishing/test_newest_faults.py
With RECORD=docs/newest/faults.json the report is kept there, and as Markdown beside it.
"""

import os
import shutil
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from nbutils.publishing import newest, newest_environment
from nbutils.publishing.newest_environment import Environment
from nbutils.publishing.newest_items import BROKEN, DRIFTED, OBSOLETE

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(7200)]

COMMAND = "python -m pytest -m matrix tests/publishing/test_newest_faults.py"
# item: package, the file that is changed (none: all), what stands there, what stands there then, state, what is said.
FAULTS = {
    "patch linear4bit_forward": (  # a patched target renamed
        "bitsandbytes", "", "matmul_4bit", "matmul_nf4", BROKEN, "matmul_4bit",
    ),
    "lesson 07_when_it_breaks": (  # a message that the lesson shows, in other words
        "accelerate", "commands/config/config_args.py", "had unknown keys", "has keys that nobody knows",
        OBSOLETE, "with other words",
    ),
    "lesson 02_why_fp32_casting_fails": (  # a number off by 10 %
        "transformers", "loss/loss_utils.py", "    return loss\n\n\ndef ForCausalLMLoss(",
        "    return 1.1 * loss\n\n\ndef ForCausalLMLoss(", DRIFTED, "now says",
    ),
}  # fmt: skip


def link(source: str, place: str) -> None:
    """A second name for a file; on another disk, a copy."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copy2(source, place)


def release(package: str, file: str, old: str, new: str, folder: Path) -> str:
    """Make a release of an installed package that differs in some words, and give it a version of its own.

    Args:
        package: name.
        file: path in the package; empty: every Python file in which the words stand.
        old: words.
        new: what is put in their place.
        folder: for the package and what pip knows of it.

    Returns:
        The version.
    """
    installed = distribution(package)
    shutil.copytree(installed.locate_file(package), folder / package, copy_function=link)
    files = [folder / package / file] if file else sorted((folder / package).rglob("*.py"))
    changed = [path for path in files if old in path.read_text(encoding="utf-8")]
    assert changed, f"{old!r} is not in {package} {installed.version}"
    for path in changed:
        text = path.read_text(encoding="utf-8").replace(old, new)
        path.unlink()  # the file is the installed one; its name here is not
        path.write_text(text, encoding="utf-8")
    version = f"{installed.version}.post1"
    known = folder / f"{package}-{version}.dist-info"
    known.mkdir()
    metadata = installed.read_text("METADATA").replace(
        f"\nVersion: {installed.version}\n", f"\nVersion: {version}\n"
    )
    (known / "METADATA").write_text(metadata, encoding="utf-8")
    return version


def test_each_fault_is_found_named_and_laid_to_its_package(tmp_path):
    faulty = tmp_path / "faulty/site-packages"
    faulty.mkdir(parents=True)
    versions = {fault[0]: release(*fault[:4], faulty) for fault in FAULTS.values()}
    tree = tmp_path / "tree"
    newest_environment.copy_repository(tree)
    locked = Environment(Path(sys.executable).absolute(), tree)
    environment = Environment(locked.python, tree, (faulty,))
    assert {name: environment.installed()[name] for name in versions} == versions
    items = newest.run(locked, environment, list(FAULTS), tmp_path / "out", command=COMMAND)
    if kept := os.environ.get("RECORD"):
        shutil.copy(tmp_path / "out/report.json", kept)
        shutil.copy(tmp_path / "out/report.md", Path(kept).with_suffix(".md"))
    said = {item.name: (item.state, item.culprit) for item in items}
    assert said == {name: (fault[4], fault[0]) for name, fault in FAULTS.items()}
    for item in items:
        assert any(FAULTS[item.name][5] in text for text in item.details), item.details
