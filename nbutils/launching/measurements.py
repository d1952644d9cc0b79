"""What a measured run left behind: memory of GPUs and host, seconds, losses."""

import itertools
import json
import re
import statistics
import threading
import time
from pathlib import Path

import psutil

from nbutils.common.progress_file import read_progress


class HostMemory:
    """Watch the host memory of all ranks together while a launch runs; a page that ranks share counts once.

    Args:
        folder: where each rank's file names its process id.
        interval: seconds between two looks.
    """

    def __init__(self, folder: Path, interval: float = 1.0):
        self.folder, self.interval = folder, interval
        self.samples: list[dict] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def peak(self) -> dict:
        """The sample with the most memory that cannot be taken back: anonymous, shared and pinned."""
        return max(self.samples, key=lambda sample: sample["held"], default={})

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            sample = {"time": time.time(), "rss": 0, "anonymous": 0, "shared": 0, "file": 0, "pinned": 0}
            for rank in sorted(self.folder.glob("rank*.jsonl")):
                lines = rank.read_text(encoding="utf-8").splitlines()
                if not lines:
                    continue
                sample["pinned"] += json.loads(lines[-1]).get("pinned", 0)
                for name, value in _smaps(json.loads(lines[0])["pid"]).items():
                    sample[name] += value
            sample["system"] = psutil.virtual_memory().total - psutil.virtual_memory().available
            sample["held"] = sample["anonymous"] + sample["shared"]
            self.samples.append(sample)


def _smaps(pid: int) -> dict[str, int]:
    """A process's memory from `/proc/PID/smaps_rollup`, each shared page divided among those who share it."""
    names = {"Rss": "rss", "Pss_Anon": "anonymous", "Pss_Shmem": "shared", "Pss_File": "file"}
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    except OSError:  # the process has ended, or the system has no such file
        return {}
    found = re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)
    return {names[name]: int(value) * 1024 for name, value in found if name in names}


def measured(run_dir: Path, host: HostMemory | None, tokens_a_step: int) -> dict:
    """What a run under `nbutils.launching.measured_run` left behind; benchmarks/README.md names the keys.

    Args:
        run_dir: with `ranks/` and `train/`.
        host: that watched it; None leaves host memory at 0.
        tokens_a_step: over all ranks.
    """
    ranks = [_lines(path) for path in sorted((run_dir / "ranks").glob("rank*.jsonl"))]
    samples = host.samples if host else []
    peak = host.peak() if host else {}
    steps = [line for line in ranks[0] if line["phase"] == "step"] if ranks else []
    seconds = [round(b["time"] - a["time"], 3) for a, b in itertools.pairwise(steps)]
    counted = seconds[1:]  # from the end of step 2 on: the first two steps warm up
    mean = sum(counted) / len(counted) if counted else None
    peaks = [max((line.get("peak", 0) for line in lines), default=0) for lines in ranks]
    run = run_dir / "train" / "run.json"
    return {
        "gpu_peak_bytes": max(peaks, default=0),
        "gpu_peak_bytes_per_rank": peaks,
        "gpu_reserved_bytes": max(
            (line.get("reserved_peak", 0) for lines in ranks for line in lines), default=0
        ),
        "gpu_outside_allocator_bytes": max(
            (line.get("outside", 0) for lines in ranks for line in lines), default=0
        ),
        "phases": {
            name: [_peak_until(lines, name) for lines in ranks]
            for name in ("loaded", "wrapped", "trained", "end")
        },
        "host_bytes": peak.get("held", 0),
        "host": peak,
        "host_file_bytes": max((sample["file"] for sample in samples), default=0),
        "host_pinned_bytes": sum(
            max((line.get("pinned", 0) for line in lines), default=0) for lines in ranks
        ),
        "seconds": {
            "load": _between(ranks, "load begins", "loaded"),
            "wrap": _between(ranks, "train begins", "wrapped"),
            "to_first_step": _between(ranks, "start", "step"),
            "total": _between(ranks, "start", "end"),
        },
        "all_step_seconds": seconds,
        "compiled_graphs": [line.get("graphs", 0) for line in steps],  # after each step, of rank 0
        "host_moments": host_moments(ranks[0], samples) if ranks else {},
        "step_seconds": round(mean, 4) if mean else None,
        "tokens_per_second": round(tokens_a_step / mean, 1) if mean else None,
        "losses": [line["loss"] for line in read_progress(run_dir / "train") if "loss" in line],
        "run": json.loads(run.read_text(encoding="utf-8")) if run.exists() else None,
    }


def steady(run_dir: Path, seconds: list[float]) -> dict:
    """Real tokens a second of the second half of a run, the median of its steps; padding does not count.

    A median, because a batch of a new length is compiled for: seconds that a night of training does not notice, and
    that would rule a mean of six steps.

    Args:
        run_dir: of a dry run that logs each step.
        seconds: `all_step_seconds` of its record: from the end of each step to the end of the next.

    Returns:
        `tokens_per_second` over all ranks, `step_seconds` (both medians), and `tokens_a_step` of each of these steps.
    """
    lines = [line for line in read_progress(run_dir / "train") if "num_tokens" in line]
    total = {line["step"]: line["num_tokens"] for line in lines}
    after = len(seconds) // 2 + 1  # the last step of the first half
    tokens = [total[step] - total[step - 1] for step in range(after + 1, len(seconds) + 2)]
    taken = seconds[after - 1 :]
    rates = [count / second for count, second in zip(tokens, taken, strict=True)]
    return {
        "tokens_per_second": round(statistics.median(rates), 1),
        "step_seconds": round(statistics.median(taken), 4),
        "tokens_a_step": tokens,
    }


def host_moments(lines: list[dict], samples: list[dict]) -> dict[str, dict]:
    """The sample with the most host memory between each two phases of a rank's life.

    Args:
        lines: of one rank.
        samples: of `HostMemory`.

    Returns:
        By the phase that ended then: `held`, `anonymous`, `shared` and `pinned` of all ranks, in bytes.
    """
    moments = {}
    for before, after in itertools.pairwise(lines):
        seen = [sample for sample in samples if before["time"] < sample["time"] <= after["time"]]
        if seen:
            name = f"{after['phase']} {after['step']}" if "step" in after else after["phase"]
            peak = max(seen, key=lambda sample: sample["held"])
            moments[name] = {key: peak[key] for key in ("held", "anonymous", "shared", "pinned")}
    return moments


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _peak_until(lines: list[dict], phase: str) -> int | None:
    """The highest allocation between the phase before (of those that are reported) and this one."""
    order = {"loaded": "start", "wrapped": "loaded", "trained": "wrapped", "end": "trained"}
    names = [line["phase"] for line in lines]
    if phase not in names or order[phase] not in names:
        return None
    first, last = names.index(order[phase]), names.index(phase)
    return max((line.get("peak", 0) for line in lines[first + 1 : last + 1]), default=0)


def _between(ranks: list[list[dict]], first: str, last: str) -> float | None:
    """Seconds from a moment to another, of the slowest rank."""
    found = []
    for lines in ranks:
        times = {}
        for line in lines:
            times.setdefault(line["phase"], line["time"])
        if first in times and last in times:
            found.append(times[last] - times[first])
    return round(max(found), 2) if found else None
