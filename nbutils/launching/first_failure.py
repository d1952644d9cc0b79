"""Which rank of a launch failed first, and with what.

torchrun ends the other ranks when one has failed, and ranks that wait for a dead one raise errors of their own: the
last traceback in a log is seldom the cause. A rank that was killed from outside comes first; else the rank whose error
was written first.
"""

import json
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nbutils.common.paths import ROOT

WHY_KILLED = {
    signal.SIGKILL: " The kernel does this when host memory runs out.",
    signal.SIGBUS: " A file that it had mapped became shorter or its disk went away: the model's, most likely.",
    signal.SIGXFSZ: " A file it wrote reached the limit for its size: see `ulimit -f`.",
}
_FAILED = re.compile(r"rank\s+: (\d+) \(local_rank: (\d+)\)\s+exitcode\s+: (-?\d+) \(pid: (\d+)\)")
_ENDED_BY_AGENT = re.compile(r"Sending process (\d+) closing signal")
_PREFIX = re.compile(r"^\[rank (\d+)\] ", re.MULTILINE)
_RANK = r"(?:\[rank \d+\] ?:?)?\s*"
_THROWN = re.compile(_RANK + r"what\(\):\s+(.+)")
_RAISED = re.compile(_RANK + r"[\w.]+(Error|Exception|Exit|Interrupt|Failed)\b")
_ABORTED = re.compile(_RANK + r"Fatal Python error: ")
_ALONE = re.compile(
    r"subprocess\.CalledProcessError: .* non-zero exit status (\d+)\."
)  # one process, no torchrun


@dataclass
class Failure:
    """What is said of a launch that failed: the first failing rank over all machines (None: no rank had begun)."""

    message: str
    rank: int | None
    error: str


class _Exit(NamedTuple):
    local_rank: int
    code: int
    ended_by_agent: bool


def exits(text: str) -> dict[int, _Exit]:
    """What torchrun's summary in a log says of the ranks that failed, by their number over all machines."""
    ended_by_agent = set(_ENDED_BY_AGENT.findall(text))
    return {
        int(rank): _Exit(int(local), int(code), pid in ended_by_agent)
        for rank, local, code, pid in _FAILED.findall(text)
    }


def exit_statuses(log: Path) -> set[int]:
    """With which exit status ranks ended by themselves, as far as the log says; minus a signal's number."""
    text = log.read_text(encoding="utf-8", errors="replace")
    codes = {one.code for one in exits(text).values() if not one.ended_by_agent}
    return codes or {int(code) for code in _ALONE.findall(text)}


def first_failure(log: Path, rank_logs: Path, returncode: int) -> Failure:
    """Find out which rank failed first, and with what.

    Args:
        log: the output of all ranks.
        rank_logs: the `--log_dir` of the launch, with `error.json` and `stderr.log` for each rank of this machine.
        returncode: the exit status of `accelerate launch`.
    """
    text = log.read_text(encoding="utf-8", errors="replace")
    where = f"The log of all ranks: {log}\n"  # the cause comes last: a terminal shows it at the bottom
    ended = exits(text)
    if killed := _killed_from_outside(ended):
        return Failure(where + killed.message, killed.rank, killed.error)
    errors = _errors(ended, rank_logs, text)
    if errors:
        _, rank, error, place = min(errors)
        return Failure(f"{where}Rank {rank} failed first{place}:\n{error}", rank, error)
    error = last_words(text)
    message = f"accelerate launch ended with exit status {returncode} before any rank reported an error:\n"
    return Failure(where + message + error, None, error)


def _killed_from_outside(ended: dict[int, _Exit]) -> Failure | None:
    for rank, (_, code, ended_by_agent) in sorted(ended.items()):
        if code < 0 and not ended_by_agent and -code not in (signal.SIGABRT, signal.SIGTERM):
            error = f"Rank {rank} was killed by {_signal(code)}.{WHY_KILLED.get(-code, '')}"
            return Failure(error, rank, error)
    return None


def _signal(code: int) -> str:
    known = {one.value for one in signal.Signals}
    return f"signal {-code} ({signal.Signals(-code).name})" if -code in known else f"signal {-code}"


def _errors(ended: dict[int, _Exit], rank_logs: Path, text: str) -> list[tuple[int, int, str, str]]:
    """For each rank that left an error: nanoseconds, rank, message, and what is said of its place."""
    folders = {
        int(path.name): path for path in rank_logs.glob("*/attempt_*/*") if path.name.isdigit()
    }  # by the number on this machine
    first_here = _first_rank_here(ended, text, len(folders))
    errors = []
    for local, folder in folders.items():
        rank = first_here + local
        if (recorded := folder / "error.json").exists():
            errors.append((recorded.stat().st_mtime_ns, rank, *_recorded(recorded)))
        elif rank in ended and not ended[rank].ended_by_agent and (said := folder / "stderr.log").exists():
            code = ended[rank].code
            place = f", ended by {_signal(code)}" if code < 0 else ""
            error = last_words(said.read_text(encoding="utf-8", errors="replace"))
            errors.append((said.stat().st_mtime_ns, rank, error, place))
    return errors


def _first_rank_here(ended: dict[int, _Exit], text: str, here: int) -> int:
    """The number, over all machines, of this machine's rank 0: torchrun's folders carry this machine's numbers.

    Its summary says both numbers; without one, the numbers in front of the lines of the log do.
    """
    for rank, one in ended.items():
        return rank - one.local_rank
    spoke = [int(rank) for rank in _PREFIX.findall(text)]
    return min(spoke) // here * here if spoke and here else 0


def _recorded(path: Path) -> tuple[str, str]:
    """The error that `torch.distributed.elastic`'s `record` wrote, and the place in the code where it arose."""
    try:
        message = json.loads(path.read_text(encoding="utf-8"))["message"]
    except (ValueError, KeyError):  # the rank was ended while it wrote
        return "(its error file is damaged; see the log)", ""
    if isinstance(message, str):
        return message, ""
    stack = message.get("extraInfo", {}).get("py_callstack", "")
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', stack)
    if not frames:
        return message["message"], ""
    file, line, function = frames[-1]
    return message["message"], f", in {function}(), {_short(file)}, line {line}"


def _short(path: str) -> str:
    """A path without what is private to this machine."""
    if "site-packages/" in path:
        return path.rsplit("site-packages/")[-1]
    return os.path.relpath(path, ROOT) if path.startswith(str(ROOT)) else Path(path).name


def last_words(text: str) -> str:
    """The last error of a text: from the last line that is no part of a traceback's frames, or its last lines.

    A thread of C++, such as NCCL's watchdog, ends the process without a Python error. Its words follow `what():`. An
    abort's cause stands above `Fatal Python error`, and below it hundreds of lines of what each thread was doing.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    for number in range(len(lines) - 1, -1, -1):
        if thrown := _THROWN.match(lines[number]):
            return thrown.group(1)
        if _RAISED.match(lines[number]):
            return "\n".join(lines[number : number + 10])
        if _ABORTED.match(lines[number]):
            thrown = [found.group(1) for found in map(_THROWN.match, lines[:number]) if found]
            return thrown[-1] if thrown else "\n".join(lines[max(0, number - 4) : number + 1])
    return "\n".join(lines[-5:]) or "(it printed nothing)"
