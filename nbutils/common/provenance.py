"""Where a result comes from: machine, versions, commit, date, command. Every record begins with them."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import psutil

from nbutils.common.devices import no_accelerator
from nbutils.common.nvidia_smi import every_gpu
from nbutils.common.paths import ROOT
from nbutils.common.versions import STACK


def provenance(command: str, commit_here: str = "") -> dict:
    """What every record says about itself; `nbutils.lessons.records.label` reads it.

    Args:
        command: that made it, without what is this machine's own.
        commit_here: of this repository, for a machine that has the files and no history; left out: as git says.

    Returns:
        `machine`, `versions`, `commit`, `date` and `command`.
    """
    return {
        "machine": machine(),
        "versions": versions(),
        "commit": commit_here or commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": command,
    }


def machine() -> dict:
    """What this machine is, without its name: CPU, cores, bytes of host memory, GPUs and their driver."""
    gpus = [] if no_accelerator() else every_gpu()
    return {
        "cpu": _processor(),
        "cpus": psutil.cpu_count(),
        "host_memory_bytes": psutil.virtual_memory().total,
        "gpus": [f"{gpu['name']} {_memory(gpu['gib'])}" for gpu in gpus],
        "driver": gpus[0]["driver"] if gpus else None,
    }


def versions(packages: Iterable[str] = STACK) -> dict[str, str]:
    """The installed version of Python and of each package.

    Args:
        packages: names; one that is missing is said to be.
    """
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """The commit of the repository, with `-dirty` if tracked files were changed since; `unknown` outside git.

    A changed record makes no tree dirty: several are made one after the other, and none changes what the next measures.
    """
    try:
        head = _git("describe", "--always", "--exclude=*")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _processor() -> str:
    with suppress(OSError):  # there is no such file outside Linux
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def _memory(gib: float | None) -> str:
    return "memory unknown" if gib is None else f"{round(gib * 1024)} MiB"
