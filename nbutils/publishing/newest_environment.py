"""The newest releases in an environment of their own, beside a copy of the repository: nothing tested is touched."""

import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from nbutils.common.paths import ROOT
from nbutils.common.versions import locked_versions
from nbutils.launching.process_tree import ProcessTree
from nbutils.publishing.workshop_proof import copy_tiny_bases

INSTALL_TIMEOUT, PIP = 1800, ("-m", "pip", "--quiet", "--disable-pip-version-check")
ENDED = 124  # the status of a command whose time ran out, as of timeout(1)


class CannotInstall(RuntimeError):
    """pip could not make the environment."""


@dataclass(frozen=True)
class Environment:
    """A Python, the copy of the repository that it works in, and packages that are put in front of its own."""

    python: Path
    tree: Path
    in_front: tuple[Path, ...] = ()

    def run(self, *words: str, timeout: float) -> subprocess.CompletedProcess:
        """Run this Python in the copy; a command that outlasts `timeout` seconds ends with status `ENDED`."""
        variables = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
        # What is looked at is untested by its nature: without this the script refuses its versions.
        variables |= {
            "NBUTILS_UNTESTED": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (*self.in_front, self.tree))),
        }
        variables["PATH"] = os.pathsep.join([str(self.python.parent), os.environ.get("PATH", "")])
        with subprocess.Popen(
            [str(self.python), *words], cwd=self.tree, env=variables,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            tree = ProcessTree(process)
            try:
                said, complained = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                tree.end()  # a kernel and its ranks would go on
                late = f"It took more than {timeout:.0f} s and was ended."
                return subprocess.CompletedProcess(words, ENDED, "", late)
            except BaseException:
                tree.end()
                raise
        return subprocess.CompletedProcess(words, process.returncode, said, complained)

    def installed(self) -> dict[str, str]:
        """Package to version, the build of torch included, as pip lists them."""
        listed = self.run(*PIP, "freeze", "--all", timeout=120).stdout.splitlines()
        return dict(line.split("==", 1) for line in listed if "==" in line)


def direct_dependencies() -> list[str]:
    """The packages that pyproject.toml asks for, those of the tests included; without their ranges."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return [Requirement(need).name for need in needs]


def make(venv: Path, tree: Path, keep: bool = False) -> Environment:
    """Install the newest release of each direct dependency, and copy the repository beside it.

    Args:
        venv: folder of the virtual environment; made anew.
        tree: folder for the copy of what git tracks; made anew.
        keep: use a `venv` that lies there as it is, and keep the runs of the copy.

    Raises:
        CannotInstall: with the last line that pip said.
    """
    copy_repository(tree, keep)
    python = venv / "bin" / "python"
    if keep and python.exists():
        return Environment(python.absolute(), tree.absolute())
    shutil.rmtree(venv, ignore_errors=True)
    _checked([sys.executable, "-m", "venv", str(venv)])
    _checked([str(python), *PIP, "install", "--upgrade", *direct_dependencies()])
    return Environment(python.absolute(), tree.absolute())


def copy_repository(tree: Path, keep: bool = False) -> None:
    """Copy the files that git tracks, as they are now, and the tiny base, which takes a minute to make.

    Args:
        tree: folder for the copy; made anew.
        keep: keep `runs` of a copy that lies there: lesson 05 reads the run of lesson 04.
    """
    for old in tree.glob("*"):
        if not (keep and old.name == "runs"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    # Tests ask git what is part of the repository; the one around this folder ignores it.
    named = ("-c", "user.name=newest", "-c", "user.email=newest@example.com")
    for words in (["init", "-q"], ["add", "-A"], [*named, "commit", "-qm", "a copy"]):
        subprocess.run(["git", "-C", str(tree), *words], check=True)
    copy_tiny_bases(tree)


def put_back(environment: Environment, package: str, folder: Path) -> Environment:
    """The same environment with one package as the lock has it, in a folder that is searched first.

    Args:
        environment: with the newest releases; it stays as it is.
        package: name, as in requirements.lock.
        folder: for the packages that were put back; one that lies there is used again.

    Raises:
        CannotInstall: with the last line that pip said.
    """
    place = folder / package / "site-packages"  # a lesson shows what lies below a folder of that name
    if not place.exists():
        words = ["install", "--no-deps", "--target", str(place), f"{package}=={locked_versions()[package]}"]
        _checked([str(environment.python), *PIP, *words])
    return Environment(environment.python, environment.tree, (place.absolute(), *environment.in_front))


def changed(installed: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Package to (locked, installed) for each package of the lock that is newer here, or older."""
    locked = locked_versions()
    return {
        name: (locked[name], version)
        for name, version in installed.items()
        if name in locked and version.partition("+")[0] != locked[name]
    }


def _checked(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_TIMEOUT)
    if done.returncode:
        said = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["nothing"]
        raise CannotInstall(f"{' '.join(command[1:5])} … failed with status {done.returncode}: {said[-1]}")
