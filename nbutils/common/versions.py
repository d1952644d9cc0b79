"""Versions: locked, installed, and allowed by the ranges of pyproject.toml."""

import os
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from nbutils.common.nvidia_smi import find_gpus
from nbutils.common.paths import ROOT
from nbutils.common.refused import Refused

# What decides how a run goes: every record names their versions.
STACK = ("torch", "transformers", "accelerate", "peft", "trl", "bitsandbytes", "datasets", "safetensors")
# Of the older records in benchmarks/results; the newer are of the lock's.
RECORDED_ON_GPUS = {"torch": "2.11.0"}
UNTESTED = "NBUTILS_UNTESTED"  # the environment variable that turns the refusal of versions into a sentence
# What executes and shows the notebooks besides.
TOOLS = ("papermill", "nbclient", "jupyterlab", "matplotlib")


def locked_versions(lock: Path = ROOT / "requirements.lock") -> dict[str, str]:
    """Package to version, as requirements.lock pins them."""
    lines = lock.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))


def allowed_versions(project: Path = ROOT / "pyproject.toml") -> dict[str, SpecifierSet]:
    """Package to the versions that the code was written for, as pyproject.toml has them."""
    needs = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    return {need.name: need.specifier for need in map(Requirement, needs)}


def installed_versions() -> dict[str, str | None]:
    """Package to installed version, None if it is missing; a local suffix as in 2.13.0+cpu is cut off."""
    found = {}
    for name in (*STACK, *TOOLS):
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = None
    return found


def is_outside(name: str, found: str | None, allowed: dict[str, SpecifierSet]) -> bool:
    """Whether a version of the stack lies outside its range, where the code is not known to work.

    Args:
        name: of the package.
        found: its version.
        allowed: from `allowed_versions`.
    """
    return name in STACK and found is not None and not allowed[name].contains(found, prereleases=True)


def goes_on_untested() -> bool:
    """Whether the reader has said to go on with any version: `NBUTILS_UNTESTED=1`."""
    return os.environ.get(UNTESTED) == "1"


def not_tested_together() -> str | None:
    """One sentence that names each package of the stack whose version was not tested; None if all were.

    On GPUs the torch of the records counts as tested too.
    """
    locked, allowed, others = locked_versions(), allowed_versions(), []
    found = installed_versions()
    recorded = RECORDED_ON_GPUS if found["torch"] != locked["torch"] and find_gpus() else {}
    for name in STACK:
        if found[name] in (None, locked[name], recorded.get(name)):
            continue
        outside = f"outside {allowed[name]}, " if is_outside(name, found[name], allowed) else ""
        others.append(f"{name} {found[name]} ({outside}tested: {locked[name]})")
    return f"Not tested together: {', '.join(others)}. pip install -r requirements.lock" if others else None


def refuse_versions(say: Callable[[str], object] = print) -> None:
    """Outside pyproject's ranges the code is not known to work; inside them, only the locked versions were tested.

    Args:
        say: told what is not tested.

    Raises:
        Refused: packages lie outside their ranges, each named, and `NBUTILS_UNTESTED` is not 1.
    """
    locked, allowed, found = locked_versions(), allowed_versions(), installed_versions()
    outside = [name for name in STACK if is_outside(name, found[name], allowed)]
    if outside and not goes_on_untested():
        said = [
            f"{name} is {found[name]}, and this code works with {name}{allowed[name]} only."
            for name in outside
        ]
        tested = " ".join(f"{name}=={locked[name]}" for name in outside)
        raise Refused(
            f"{' '.join(said)} Install what was tested: pip install {tested}. Or go on at your own risk: {UNTESTED}=1"
        )
    if sentence := not_tested_together():
        say(sentence)
