"""One environment, said in four places: pyproject.toml, requirements.lock, environment.yml and the Makefile."""

import re
import shlex
import subprocess
import sys
import tomllib

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook, new_output
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from nbutils.common.paths import ROOT
from nbutils.common.versions import STACK

PINS = {
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "accelerate": "1.15.0",
    "peft": "0.21.2",
    "trl": "1.16.0",
    "bitsandbytes": "0.50.2",
    "datasets": "5.2.0",
    "papermill": "2.7.0",
    "nbclient": "0.11.0",
    "jupyterlab": "4.6.6",
    "matplotlib": "3.11.2",
}


def read_lock():
    return (ROOT / "requirements.lock").read_text().splitlines()


def locked():
    return {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in read_lock())
    }


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_lock_serves_everybody():
    """Exact versions only: no local suffix like +cpu, no hash of one wheel, no index, no file, no address."""
    odd = [line for line in read_lock() if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line)]
    assert odd == []
    assert len(locked()) == len(read_lock()), "a package is named twice"


@pytest.mark.parametrize("name", PINS)
def test_the_lock_holds_the_tested_stack(name):
    assert locked()[name] == PINS[name]


def test_every_range_of_the_package_holds_its_locked_version():
    wanted = [*project()["dependencies"], *project()["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, wanted):
        version = locked()[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} does not allow the locked {version}"


@pytest.mark.parametrize("name", STACK)
def test_a_range_goes_from_the_oldest_version_seen_to_the_newest(name):
    """As the table of docs/newest/README.md has it, with the record of each version."""
    rows = (ROOT / "docs/newest/README.md").read_text().splitlines()
    ((_, _, written, seen, where, _),) = [
        [cell.strip() for cell in row.split("|")] for row in rows if row.startswith(f"| {name} |")
    ]
    (wanted,) = [need for need in map(Requirement, project()["dependencies"]) if need.name == name]
    versions = [Version(version) for version in seen.split(", ")]
    above = ".".join(map(str, [*max(versions).release[:1], max(versions).release[1] + 1]))
    assert wanted.specifier == SpecifierSet(written) == SpecifierSet(f">={min(versions)},<{above}")
    for version in seen.split(", "):
        assert locked()[name].startswith(f"{version}.") or locked()[name] == version or version in where
    for path in re.findall(r"`(benchmarks/[^`]+)`", where):
        assert (ROOT / path).exists()


def test_conda_and_binder_get_the_same_environment():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, _, pip = environment["dependencies"]
    assert SpecifierSet(project()["requires-python"]).contains(python.removeprefix("python="))
    assert pip == {"pip": ["-r requirements.lock", "-e ."]}


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_make_and_the_package_accept_the_same_pythons(version):
    check = re.search(r"\((\d), (\d+)\) <= v < \((\d), (\d+)\)", (ROOT / "Makefile").read_text())
    a, b, c, d = map(int, check.groups())
    accepted = (a, b) <= tuple(map(int, version.split("."))) < (c, d)
    assert accepted == SpecifierSet(project()["requires-python"]).contains(version)


def make(*words, **options):
    return subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True, **options)


def test_a_python_that_is_too_old_is_refused_with_a_sentence(tmp_path):
    old = tmp_path / "python3"
    old.write_text(
        '#!/bin/sh\n[ "$1" = -c ] && exec python3 -c "import sys; sys.version_info = (3, 10, 0); $2"\nexit 9\n'
    )
    old.chmod(0o755)
    done = make("test", f"VENV={tmp_path}/venv", f"PYTHON={old}")
    assert done.returncode != 0
    assert f"This project needs Python 3.11, 3.12 or 3.13; {old} is 3.10." in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("target", ["tutorial", "test", "lint"])
def test_a_second_call_installs_nothing(tmp_path, target):
    first = make("-n", target, f"VENV={tmp_path}/venv").stdout
    assert "pip install" in first and "requirements.lock" in first
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/.installed").touch()  # what the first call leaves, newer than the lock
    assert "pip" not in make("-n", target, f"VENV={tmp_path}/venv").stdout


def test_every_target_that_make_names_exists():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r'@echo "make (\w+)', makefile))
    assert named == set(re.findall(r"^(\w+):", makefile, re.M)) - {"help"}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/workshop.md"])
def test_every_command_that_a_page_names_exists(page):
    text, makefile = (ROOT / page).read_text(), (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^    |`)make (\w+)", text, re.M))
    assert targets and targets <= set(re.findall(r"^(\w+):", makefile, re.M))
    for path in re.findall(r"`((?:nbutils|tests|configs|benchmarks|docs|data)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_hook_strips_private_metadata_and_keeps_outputs_and_ids(tmp_path):
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    words = shlex.split(next(hook["entry"] for hook in hooks if hook["id"] == "nbstripout"))
    cell = new_code_cell(
        "1 + 1", execution_count=1, metadata={"papermill": {"duration": 1}, "tags": ["kept"]}
    )
    cell.outputs = [new_output("execute_result", {"text/plain": "2"}, execution_count=1)]
    notebook = new_notebook(cells=[cell], metadata={"papermill": {"output_path": "/home/me"}})
    path = tmp_path / "a.ipynb"
    nbformat.write(notebook, path)
    subprocess.run([sys.executable, "-m", "nbstripout", *words[1:], str(path)], check=True)
    clean = nbformat.read(path, as_version=4)
    assert clean.cells[0].outputs == cell.outputs
    assert (clean.cells[0].id, clean.cells[0].execution_count) == (cell.id, 1)
    assert clean.cells[0].metadata == {"tags": ["kept"]}
    assert "papermill" not in clean.metadata
