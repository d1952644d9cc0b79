"""Host memory that a process may use: the machine's, or less in a container and under Slurm."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

# Limit, use, and the part of the use that the kernel gives back when asked: files that were read or written.
FILES = {
    "v2": ("memory.max", "memory.current", "inactive_file"),
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def total() -> int:
    """Bytes of host memory, or the smallest limit of a control group that this process is in."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in limits())])


def available() -> int:
    """Bytes that new processes may take: free memory and swap, or the room that is left in a control group."""
    machine = psutil.virtual_memory().available + psutil.swap_memory().free
    return min([machine, *(max(limit - used, 0) for limit, used in limits())])


def limits(groups: Path = GROUPS, own: Path = OWN) -> list[tuple[int, int]]:
    """The memory limits that hold for this process; a container, systemd and Slurm set them.

    Args:
        groups: where the control groups are mounted.
        own: the file in which the kernel tells the groups of this process.

    Returns:
        (limit, used) in bytes, of its group and of each group around it that has a limit; empty outside Linux. What is
        used leaves out cached files, which the kernel gives back.
    """
    found = []
    for folder, (limit, used, cached) in _groups(groups, own):
        with suppress(OSError, ValueError):  # no such file, or the word "max"
            allowed = int((folder / limit).read_text(encoding="utf-8"))
            lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
            files = next((int(line.split()[1]) for line in lines if line.startswith(f"{cached} ")), 0)
            found.append((allowed, int((folder / used).read_text(encoding="utf-8")) - files))
    return found


def _groups(groups: Path, own: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The folder of each control group around this process, with the names of its files."""
    lines = []
    with suppress(OSError):
        lines = own.read_text(encoding="utf-8").splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = groups / "memory" if controllers else groups
        here = base / path.lstrip("/")
        for folder in (here, *here.parents):
            yield folder, FILES["v1" if controllers else "v2"]
            if folder == base:
                break
