"""`make newest`: does the course still hold with today's releases? An hour on two cores; nothing tested is touched."""

import argparse
import difflib
import json
import sys
from pathlib import Path

from nbutils.common.paths import ROOT, go_to_root
from nbutils.common.provenance import provenance
from nbutils.common.versions import STACK
from nbutils.publishing import newest_environment, newest_items, newest_report
from nbutils.publishing.newest_environment import CannotInstall, Environment
from nbutils.publishing.newest_items import NOT_REACHED, SAME, Item, Look

VENV, OUT = Path(".venv-newest"), Path("runs/newest")
PARTS = ("patches", "lessons", "tests", "training")


def looks(parts: list[str], locked: Environment) -> dict[str, Look]:
    """What is looked at, by name.

    Args:
        parts: of `PARTS`.
        locked: the environment with the tested stack, for the training beside it.
    """
    found: dict[str, Look] = {}
    if "patches" in parts:
        found |= newest_items.patches()
    if "lessons" in parts:
        found |= newest_items.lessons()
    if "tests" in parts:
        found["tests"] = newest_items.tests
    if "training" in parts:
        for version in (1, 2):
            found[f"training, FSDP {version}"] = lambda environment, version=version: newest_items.training(
                version, locked, environment
            )
    return found


def find_culprit(item: Item, look: Look, environment: Environment, packages: list[str], folder: Path) -> str:
    """Put back one package at a time until the item says again what it said.

    Args:
        item: as it was found with all packages new.
        look: to look again.
        environment: with all packages new.
        packages: those that changed.
        folder: for the packages that are put back.

    Returns:
        The package; or a sentence if no single one does it.
    """
    for package in packages:
        try:
            back = newest_environment.put_back(environment, package, folder)
        except CannotInstall as problem:
            print(f"    {problem}", flush=True)
            continue
        if look(back).state == SAME:
            return package
    return "no single package"


def run(parts: list[str], venv: Path, out: Path, keep: bool) -> list[Item]:
    """Make the environment, look at everything, name the culprits, and write the report.

    Args:
        parts: of `PARTS`.
        venv: folder of the virtual environment.
        out: folder for the report, `lock.txt`, `lock.diff`, and the copy of the repository.
        keep: use a virtual environment that lies there.

    Returns:
        The items.

    Raises:
        CannotInstall: the environment could not be made.
    """
    out.mkdir(parents=True, exist_ok=True)
    environment = newest_environment.make(venv, out / "tree", keep)
    locked = Environment(Path(sys.executable).absolute(), environment.tree)
    installed = environment.installed()
    changed = newest_environment.changed(installed)
    write_lock(installed, out)
    check = environment.run(*newest_environment.PIP, "check", timeout=120).stdout.strip().splitlines()
    about = {"provenance": provenance("python -m nbutils newest"), "changed": changed}
    about["pip_check"] = [] if check == ["No broken requirements found."] else check
    ours = [name for name in STACK if name in changed]
    print(
        f"Newer than the lock: {', '.join(f'{n} {new}' for n, (_, new) in changed.items()) or 'nothing'}",
        flush=True,
    )
    items = []
    for name, look in looks(parts, locked).items():
        item = look(environment)
        if item.state not in (SAME, NOT_REACHED) and ours:
            item.culprit = find_culprit(item, look, environment, ours, out / "put_back")
        items.append(item)
        print(
            f"{item.state:<12} {name}{f' (because of: {item.culprit})' if item.culprit else ''}", flush=True
        )
        newest_report.write(out, about, items)  # after each: an hour is long
    return items


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
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {','.join(PARTS)}")
    parser.add_argument("--venv", type=Path, default=VENV, help="folder of the virtual environment")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the report")
    parser.add_argument("--keep", action="store_true", help="use the virtual environment that lies there")
    parser.add_argument(
        "--beside", type=Path, help="a report.json of before: status 3 if this one says the same"
    )
    options = parser.parse_args(arguments)
    parts = options.only.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"there is no part {', '.join(unknown)}; wanted some of {', '.join(PARTS)}")
    go_to_root()
    items = run(parts, options.venv, options.out, options.keep)
    print(f"\n{options.out}/report.md and report.json tell the rest.")
    if options.beside and options.beside.exists():
        reports = [
            json.loads(p.read_text(encoding="utf-8")) for p in (options.beside, options.out / "report.json")
        ]
        if newest_report.fingerprint(reports[0]) == newest_report.fingerprint(reports[1]):
            print(f"It says the same as {options.beside}.")
            return 3
    return int(any(item.state != SAME for item in items))
