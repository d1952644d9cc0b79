"""What is looked at in an environment: a lesson, a patch, the tests, the training. Each answers with one `Item`."""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import CompletedProcess

from nbutils.common.paths import ROOT
from nbutils.publishing.newest_environment import ENDED, Environment
from nbutils.publishing.refresh import REFRESH_DIR

SAME, DRIFTED, OBSOLETE, BROKEN, NOT_REACHED = "SAME", "DRIFTED", "OBSOLETE", "BROKEN", "NOT REACHED"
LESSON_TIMEOUT, TESTS_TIMEOUT, TRAINING_TIMEOUT, PATCH_TIMEOUT = 1800, 3600, 1200, 300  # seconds
# Errors of a clock: they say that the machine had other work, or that something hangs, and not which.
OUT_OF_TIME = ("CellTimeoutError", "LaunchStopped", "TimeoutExpired")
LOOK_ALONE = (
    "Nothing is known: look again with nothing else running (--keep --only). Out of time then too: it hangs."
)
RUN_DIR = str(REFRESH_DIR)  # in the copy: where a shown command breaks depends on the folder's length
NO_RUN = "there is no run to look at"  # what nbutils.common.paths.latest says where notebook 04 did not end

ASK_A_PATCH = """
import importlib, json, sys
patch = importlib.import_module(sys.argv[1])
patch.check()
print(json.dumps(patch.still_needed()))
"""


@dataclass
class Item:
    """One line of the report.

    Attributes:
        name: like `lesson 03_custom_prep`.
        state: SAME, DRIFTED (it says something else), OBSOLETE (a text to fix), BROKEN (code to fix) or NOT REACHED
            (what it needs is not there, or time ran out).
        details: sentences.
        culprit: the package that makes it SAME again if it is put back; filled in later.
        seconds: that the first look took; filled in later.
        again: looks at less, where less is enough to find the culprit.
    """

    name: str
    state: str
    details: list[str] = field(default_factory=list)
    culprit: str = ""
    seconds: int = 0
    again: "Look | None" = None


Look = Callable[[Environment], Item]


def lessons() -> dict[str, Look]:
    """A look for each notebook; in their order, because 05 reads the run of 04."""
    paths = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    return {
        f"lesson {path.stem}": lambda environment, name=path.name: lesson(name, environment) for path in paths
    }


def patches() -> dict[str, Look]:
    """A look for each file of `nbutils/patches`."""
    stems = sorted(path.stem for path in (ROOT / "nbutils/patches").glob("[a-z]*.py"))
    return {f"patch {stem}": lambda environment, stem=stem: patch(stem, environment) for stem in stems}


def lesson(name: str, environment: Environment) -> Item:
    """Execute a notebook to its end and judge what it says.

    Args:
        name: of the file in `notebooks/`.
        environment: where.
    """
    report = environment.tree / "runs" / f"{name}.json"
    report.unlink(missing_ok=True)
    words = ("-m", "nbutils.publishing.newest_lesson", f"notebooks/{name}", str(report), RUN_DIR)
    done = environment.run(*words, timeout=LESSON_TIMEOUT)
    title = f"lesson {Path(name).stem}"
    if done.returncode == ENDED or (not report.exists() and "CellTimeoutError" in done.stderr):
        return out_of_time(title, done.stderr)
    if not report.exists():
        return Item(title, BROKEN, [f"It could not be executed: {_last_line(done.stderr)}"])
    return judge_lesson(title, json.loads(report.read_text(encoding="utf-8")))


def judge_lesson(title: str, report: dict) -> Item:
    """The state of a lesson from what `newest_lesson.look_at` reports.

    Args:
        title: of the item.
        report: `errors`, `differences` and `not_reached`.
    """
    errors, details = report["errors"], []
    for error in errors:
        details.append(f"cell {error['cell']}: {error['name']}: {_last_line(error['said'], first=True)}")
    if report["not_reached"]:
        details.append(f"{report['not_reached']} cells were not reached.")
    details += report["differences"]
    broken = [error for error in errors if error["name"] != "LessonObsolete"]
    if broken and NO_RUN in broken[0]["said"]:
        return Item(title, NOT_REACHED, details)
    if broken and broken[0]["name"] in OUT_OF_TIME:
        return Item(title, NOT_REACHED, [LOOK_ALONE, *details])
    if broken or report["not_reached"]:
        return Item(title, BROKEN, details)
    if errors:
        return Item(title, OBSOLETE, details)
    return Item(title, DRIFTED if report["differences"] else SAME, details)


def patch(stem: str, environment: Environment) -> Item:
    """Ask a patch whether what it changes is there as it knows it, and whether the patch is still needed.

    Args:
        stem: of the file in `nbutils/patches`.
        environment: where.
    """
    done = environment.run("-c", ASK_A_PATCH, f"nbutils.patches.{stem}", timeout=PATCH_TIMEOUT)
    if done.returncode:
        return Item(f"patch {stem}", BROKEN, [_last_line(done.stderr)])
    needed = json.loads(done.stdout.strip().splitlines()[-1])
    if needed is False:
        return Item(f"patch {stem}", OBSOLETE, ["It is no longer needed: what it works around is gone."])
    return Item(f"patch {stem}", SAME, [] if needed else ["Whether it is still needed shows on a GPU only."])


def suite() -> dict[str, Look]:
    """A look for the tests of `make test`."""
    return {"tests": tests}


def tests(environment: Environment, names: tuple[str, ...] = ()) -> Item:
    """Run the tests of `make test`, and those that fail a second time, alone.

    Args:
        environment: where.
        names: of tests, as pytest writes them; none means all.

    Returns:
        BROKEN if a test fails twice, with the name of each that does. One that passes alone is told, and is no fault.
    """
    done, failed = _pytest(environment, names)
    details = [_last_line(done.stdout) or _last_line(done.stderr)]
    if done.returncode == ENDED:
        return out_of_time("tests", done.stderr)
    if done.returncode == 0:
        return Item("tests", SAME, details)
    if not failed:  # pytest itself did not get far
        return Item("tests", BROKEN, details)
    alone, still = _pytest(environment, tuple(failed))
    if alone.returncode == ENDED:
        return out_of_time("tests", alone.stderr)
    details += [f"Failed at first, passed alone: {name}" for name in failed if name not in still]
    details += [f"{name}: {said}" for name, said in still.items()]
    if not still:
        return Item("tests", SAME, details)
    return Item("tests", BROKEN, details, again=lambda where: tests(where, tuple(still)))


def _pytest(environment: Environment, names: tuple[str, ...]) -> tuple[CompletedProcess, dict[str, str]]:
    """The finished run, and what pytest says of each test that failed."""
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *names)
    done = environment.run(*words, timeout=TESTS_TIMEOUT)
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - (.*))?$", done.stdout, re.MULTILINE)
    return done, dict(failed)


def out_of_time(title: str, said: str) -> Item:
    """The item whose time ran out: no fault of a release, as far as is known.

    Args:
        title: of the item.
        said: standard error, whose last line says how long it took.
    """
    return Item(title, NOT_REACHED, [_last_line(said), LOOK_ALONE])


def trainings(locked: Environment) -> dict[str, Look]:
    """A look for the training under each FSDP.

    Args:
        locked: with the tested stack; it trains once, whatever is laid beside it.
    """
    trained = functools.cache(lambda version: train(version, locked, "locked"))
    return {
        f"training FSDP {version}": lambda environment, version=version: training(
            version, trained, environment
        )
        for version in (1, 2)
    }


def training(version: int, locked: Callable[[int], dict | Item], environment: Environment) -> Item:
    """Train in an environment, and lay losses, adapter and warnings beside those of the tested stack.

    Args:
        version: of FSDP.
        locked: version to what `train` says with the tested stack, on this machine.
        environment: with the newest.
    """
    there = locked(version)
    here = there if isinstance(there, Item) else train(version, environment, "newest")
    return here if isinstance(here, Item) else compare_training(f"training FSDP {version}", there, here)


def train(version: int, environment: Environment, name: str) -> dict | Item:
    """Train the steps of notebook 04.

    Args:
        version: of FSDP.
        environment: where.
        name: of its stack, in the folder's name and in sentences.

    Returns:
        `sha256` of the adapter, `losses` and `warnings`; the item, if it did not come to its end.
    """
    title, folder = f"training FSDP {version}", f"runs/training_{name}_{version}"
    words = ("--only", "04", "--run-dir", folder, "-p", "fsdp_version", str(version))
    done = environment.run("-m", "nbutils", "run", *words, timeout=TRAINING_TIMEOUT)
    if done.returncode == ENDED:
        return out_of_time(title, done.stderr)
    if done.returncode:
        return Item(title, BROKEN, [f"With the {name} stack: {_last_line(done.stderr)}"])
    return _trained(environment.tree / folder)


def compare_training(title: str, locked: dict, newest: dict) -> Item:
    """SAME if both adapters are the same bytes; DRIFTED, with both numbers, if not. New warnings are told.

    Args:
        title: of the item.
        locked: `sha256`, `losses` (name to number) and `warnings` of the run with the tested stack.
        newest: the same of the other run.
    """
    fresh = [f"New warning: {line}" for line in newest["warnings"] if line not in locked["warnings"]]
    if locked["sha256"] == newest["sha256"]:
        return Item(title, SAME, [f"Both adapters are {locked['sha256'][:12]}.", *fresh])
    said = [f"{name}: {value} → {newest['losses'][name]}" for name, value in locked["losses"].items()]
    return Item(title, DRIFTED, [f"The adapters differ. {', '.join(said)}.", *fresh])


def _trained(folder: Path) -> dict:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    names = ("loss_first", "loss_last", "held_out_loss_before", "held_out_loss_after")
    log = (folder / "train.log").read_text(encoding="utf-8", errors="replace")
    warnings = {
        re.sub(r"^.*?(\w*Warning: .*)$", r"\1", line) for line in log.splitlines() if "Warning: " in line
    }
    return {
        "sha256": summary["adapter"]["sha256"],
        "losses": {name: summary["training"][name] for name in names},
        "warnings": sorted(warnings),
    }


def _last_line(text: str, first: bool = False) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return (lines[0] if first else lines[-1]) if lines else ""
