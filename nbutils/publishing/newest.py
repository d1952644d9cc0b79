"""`make newest`: does the course still hold with today's releases? An hour on two cores; nothing tested is touched."""

import argparse
import difflib
import json
import sys
from pathlib import Path
from time import monotonic

from nbutils.common.paths import ROOT, go_to_root
from nbutils.common.provenance import provenance
from nbutils.common.versions import STACK
from nbutils.publishing import newest_environment, newest_items, newest_report
from nbutils.publishing.newest_environment import CannotInstall, Environment
from nbutils.publishing.newest_items import BROKEN, NOT_REACHED, SAME, Item, Look

VENV, OUT = Path(".venv-newest"), Path("runs/newest")
PARTS = {
    "patches": "patch ",
    "lessons": "lesson ",
    "tests": "tests",
    "training": "training ",
}  # part: its items
# Read from its file: importing torch takes seconds.
BUILD_OF_TORCH = """
import importlib.util, pathlib, runpy
place = pathlib.Path(importlib.util.find_spec("torch").origin).with_name("version.py")
print(runpy.run_path(str(place))["__version__"])
"""
NO_PACKAGE = "no package: it is so with the tested ones too"
NO_SINGLE = "no single package"


def looks(locked: Environment) -> dict[str, Look]:
    """Everything that is looked at, by name.

    Args:
        locked: the environment with the tested stack, for the training beside it.
    """
    return (
        newest_items.patches()
        | newest_items.lessons()
        | newest_items.suite()
        | newest_items.trainings(locked)
    )


def chosen(names: list[str], wanted: list[str]) -> list[str]:
    """The names of the items that are wanted.

    Args:
        names: of all items.
        wanted: parts (of `PARTS`), or any piece of a name, as `03` or `FSDP 2`.

    Raises:
        ValueError: a word of `wanted` fits no item.
    """
    fitting = {
        word: [name for name in names if (name.startswith(PARTS[word]) if word in PARTS else word in name)]
        for word in wanted
    }
    if nothing := [word for word, found in fitting.items() if not found]:
        raise ValueError(
            f"nothing is called {', '.join(nothing)}; wanted some of {', '.join(PARTS)}, or of: {names}"
        )
    return [name for name in names if any(name in found for found in fitting.values())]


def find_culprit(item: Item, look: Look, places: list[Environment], packages: list[str], folder: Path) -> str:
    """Put back one package at a time until the item says again what it says with the tested stack.

    Args:
        item: as it was found with all packages new; where it says how to look at less, only that is looked at.
        look: to look again.
        places: the environment with the tested stack, asked first, and the one with all packages new.
        packages: those that changed.
        folder: for the packages that are put back.

    Returns:
        The package; or a sentence if no single one does it, or if it is so with the tested stack too.
    """
    locked, environment = places
    look = item.again or look
    tested = look(locked)  # what it is without any of them: SAME, unless the committed outputs are stale
    if (tested.state, tested.details) == (item.state, item.details) or tested.state == item.state == BROKEN:
        return NO_PACKAGE
    for package in packages:
        try:
            back = newest_environment.put_back(environment, package, folder)
        except CannotInstall as problem:
            print(f"    {problem}", flush=True)
            continue
        again = look(back)
        if again.state == tested.state and (tested.state == SAME or again.details == tested.details):
            return package
    return NO_SINGLE


def run(
    locked: Environment,
    environment: Environment,
    wanted: list[str],
    out: Path,
    keep: bool = False,
    command: str = "python -m nbutils newest",
) -> list[Item]:
    """Look at what is wanted, name the culprits, and write the report after each item: an hour is long.

    Args:
        locked: with the tested stack.
        environment: with the newest.
        wanted: see `chosen`.
        out: folder for the report, `lock.txt` and `lock.diff`.
        keep: keep the items of a report that lies there, if it is of the same commit and the same packages.
        command: that is said to have made the report.

    Returns:
        All items of the report.
    """
    about = describe(environment, out, command)
    ours = [name for name in STACK if name in about["changed"]]
    everything = looks(locked)
    found = newest_report.earlier(out, about) if keep else {}
    for name in chosen(list(everything), wanted):
        began = monotonic()
        item = everything[name](environment)
        item.seconds = round(monotonic() - began)
        if item.state not in (SAME, NOT_REACHED) and ours:
            item.culprit = find_culprit(item, everything[name], [locked, environment], ours, out / "put_back")
        found[name] = item
        because = f" (because of: {item.culprit})" if item.culprit else ""
        print(f"{item.state:<12} {name}{because}, {item.seconds} s", flush=True)
        newest_report.write(out, about, [found[name] for name in everything if name in found])
    return [found[name] for name in everything if name in found]


def describe(environment: Environment, out: Path, command: str) -> dict:
    """What the report says of the environment; `lock.txt` and `lock.diff` say the rest.

    Args:
        environment: with the newest releases.
        out: folder for both files.
        command: that is said to have made the report.

    Returns:
        `provenance`, `changed` (package to locked and installed version), `torch_build` and `pip_check` (lines).
    """
    out.mkdir(parents=True, exist_ok=True)
    installed = environment.installed()
    write_lock(installed, out)
    changed = newest_environment.changed(installed)
    check = environment.run(*newest_environment.PIP, "check", timeout=120).stdout.strip().splitlines()
    news = ", ".join(f"{name} {new}" for name, (_, new) in changed.items())
    print(f"Newer than the lock: {news or 'nothing'}", flush=True)
    return {
        "provenance": provenance(command),
        "changed": changed,
        "torch_build": environment.run("-c", BUILD_OF_TORCH, timeout=300).stdout.strip(),
        "pip_check": [] if check == ["No broken requirements found."] else check,
    }


def write_lock(installed: dict[str, str], out: Path) -> None:
    """Write `lock.txt` with what is installed, and `lock.diff` with how it differs from requirements.lock."""
    old = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    names = {line.split("==")[0].lower() for line in old}
    new = sorted((f"{n}=={v}" for n, v in installed.items() if n.lower() in names), key=str.lower)
    (out / "lock.txt").write_text("\n".join(f"{n}=={v}" for n, v in sorted(installed.items())) + "\n")
    lines = difflib.unified_diff(
        sorted(old, key=str.lower), new, "requirements.lock", "newest", n=0, lineterm=""
    )
    (out / "lock.diff").write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """The command line; status 1 if anything is not SAME."""
    parser = argparse.ArgumentParser(
        prog="python -m nbutils newest",
        description="Try the course with the newest releases, in an environment of its own. CPU only. "
        "pip takes its indexes from its own configuration, so a CPU build of torch can be chosen there.",
    )
    parser.add_argument(
        "--only", default=",".join(PARTS),
        help=f"parts, of {','.join(PARTS)}, or pieces of an item's name, as 03; with --keep the report keeps the rest",
    )  # fmt: skip
    parser.add_argument("--venv", type=Path, default=VENV, help="folder of the virtual environment")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the report")
    parser.add_argument("--keep", action="store_true", help="use the virtual environment that lies there")
    parser.add_argument(
        "--beside", type=Path, help="a report.json of before: status 3 if this one says the same"
    )
    options = parser.parse_args(arguments)
    go_to_root()
    locked = Environment(Path(sys.executable).absolute(), (options.out / "tree").absolute())
    try:
        chosen(list(looks(locked)), wanted := options.only.split(","))
    except ValueError as unknown:
        parser.error(str(unknown))
    environment = newest_environment.make(options.venv, locked.tree, options.keep)
    items = run(locked, environment, wanted, options.out, options.keep)
    print(f"\n{options.out}/report.md and report.json tell the rest.")
    if options.beside and options.beside.exists():
        reports = [
            json.loads(p.read_text(encoding="utf-8")) for p in (options.beside, options.out / "report.json")
        ]
        if newest_report.fingerprint(reports[0]) == newest_report.fingerprint(reports[1]):
            print(f"It says the same as {options.beside}.")
            return 3
    return int(any(item.state != SAME for item in items))
