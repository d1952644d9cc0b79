"""Versions: locked, installed, and allowed by the ranges of pyproject.toml."""

import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

from nbutils.common.paths import ROOT
from nbutils.common.refused import Refused

# What decides how a run goes: every record names their versions.
STACK = ("torch", "transformers", "accelerate", "peft", "trl", "bitsandbytes", "datasets", "safetensors")
# What executes and shows the notebooks besides.
TOOLS = ("papermill", "nbclient", "jupyterlab", "matplotlib")


def locked_versions(lock: Path = ROOT / "requirements.lock") -> dict[str, str]:
    """Package to version, as requirements.lock pins them."""
    lines = lock.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))


def installed_versions() -> dict[str, str | None]:
    """Package to installed version, None if it is missing; a local suffix as in 2.13.0+cpu is cut off."""
    found = {}
    for name in (*STACK, *TOOLS):
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = None
    return found


def refuse_versions(say: Callable[[str], object] = print) -> None:
    """Outside pyproject's ranges the code does not work; inside them, only the locked versions were tested.

    Args:
        say: told what is not tested.

    Raises:
        Refused: a package lies outside its range.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ranges = {need.name: need.specifier for need in map(Requirement, project["dependencies"])}
    locked, untested = locked_versions(), []
    for name, found in installed_versions().items():
        if found is None or name not in ranges:
            continue
        if not ranges[name].contains(found, prereleases=True):
            raise Refused(
                f"{name} is {found}, and this code works with {name}{ranges[name]} only. "
                f"Install the tested one: pip install {name}=={locked[name]}"
            )
        if found != locked[name]:
            untested.append(f"{name} {found} (tested: {locked[name]})")
    if untested:
        say(f"Not tested together: {', '.join(untested)}. pip install -r requirements.lock")
