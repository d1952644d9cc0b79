"""How fast this machine moves and multiplies: host memory to GPU, GPU to GPU, bf16. A hang is found, with its cure.

Run as: `python -m nbutils links`
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from nbutils.common.command import also_as
from nbutils.common.devices import gpus_shown
from nbutils.common.paths import RUNS, from_here
from nbutils.common.provenance import provenance

RANK = (sys.executable, "-m", "nbutils.planning.link_measurements")
# Seconds that each phase may take after the one before; the first imports torch and lets the ranks meet.
LIMITS = {"start": 120.0, "host links": 30.0, "matrix rate": 30.0, "gather": 45.0}
FILE = RUNS / "links.json"
WITHOUT_PEERS = {"NCCL_P2P_DISABLE": "1"}
CURE = (
    "GPUs of this machine do not reach each other although NCCL was told that they do. Set NCCL_P2P_DISABLE=1 for each "
    "launch; or switch off IOMMU and ACS in the firmware (NVIDIA/nccl-tests#117), and take NVIDIA's own driver in the "
    "place of one that forces peer access (tinygrad/open-gpu-kernel-modules#45)."
)


class LinksFailed(RuntimeError):
    """Ranks that hang, end early or receive other bytes than were sent; the message says where and what to do."""


def measure(
    ranks: int,
    settings: dict[str, str] | None = None,
    limits: dict[str, float] = LIMITS,
    program: Sequence[str] = RANK,
) -> list[dict]:
    """Let ranks measure together, and end them when a phase takes too long.

    Args:
        ranks: how many; one a GPU, or processes of a CPU.
        settings: environment variables for them.
        limits: seconds by phase.
        program: what a rank runs; it is given a folder, its number, and the number of ranks.

    Returns:
        What each rank found.

    Raises:
        LinksFailed: a phase did not end within its limit, a rank failed, or a gather brought wrong bytes.
    """
    with tempfile.TemporaryDirectory(prefix="links-") as folder:
        place = Path(folder)
        processes = [_begin(program, place, rank, ranks, settings or {}) for rank in range(ranks)]
        try:
            for phase, limit in limits.items():
                _wait_for(phase, limit, processes, place)
        finally:
            _end(processes)
        found = [_said(place, rank) for rank in range(ranks)]
    wrong = [rank for rank, said in enumerate(found) if not said["whole"]]
    if wrong:
        raise LinksFailed(f"Rank {wrong[0]} gathered other bytes than the ranks had sent.")
    return found


def _end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):  # held by the driver: it goes when that lets it
            process.wait(timeout=10)


def _begin(program: Sequence[str], place: Path, rank: int, ranks: int, settings: dict) -> subprocess.Popen:
    with (place / f"rank{rank}.log").open("w") as log:
        words = [*program, str(place), str(rank), str(ranks)]
        return subprocess.Popen(words, env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT)


def _wait_for(phase: str, limit: float, processes: list[subprocess.Popen], place: Path) -> None:
    until = time.monotonic() + limit
    while missing := [rank for rank in range(len(processes)) if phase not in _phases(place, rank)]:
        for rank in missing:
            if processes[rank].poll() is not None:
                said = (place / f"rank{rank}.log").read_text(errors="replace").strip().splitlines()
                raise LinksFailed(
                    f"Rank {rank} ended before `{phase}`: {said[-1] if said else 'it said nothing'}"
                )
        if time.monotonic() > until:
            who = ", ".join(map(str, missing))
            raise LinksFailed(f"No answer from rank {who} within {limit:.0f} seconds of `{phase}`: it hangs.")
        time.sleep(0.05)


def _lines(place: Path, rank: int) -> list[dict]:
    file = place / f"rank{rank}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _phases(place: Path, rank: int) -> list[str]:
    return [line["phase"] for line in _lines(place, rank)]


def _said(place: Path, rank: int) -> dict:
    found = {}
    for line in _lines(place, rank):
        found |= line
    return {name: value for name, value in found.items() if name != "phase"}


def look(ranks: int, **how) -> dict:
    """Measure; if GPUs hang or gather wrong bytes, measure again without peer access, and say so.

    Args:
        ranks: how many.
        how: `limits` and `program` of `measure`.

    Returns:
        `ranks` (what each found), `settings` (environment variables that a launch needs here), `failed` (what went
        wrong without them, or None) and `advice` (a sentence).

    Raises:
        LinksFailed: it fails without peer access, too, or on a CPU.
    """
    try:
        found = measure(ranks, **how)
    except LinksFailed as failure:
        if not gpus_shown() or ranks == 1:
            raise
        try:
            found = measure(ranks, WITHOUT_PEERS, **how)
        except LinksFailed as again:
            raise LinksFailed(
                f"{failure} With NCCL_P2P_DISABLE=1: {again} Look at /dev/shm and the driver."
            ) from None
        return {"ranks": found, "settings": WITHOUT_PEERS, "failed": str(failure), "advice": CURE}
    return {"ranks": found, "settings": {}, "failed": None, "advice": advice(found)}


def without_peers() -> bool:
    """Whether NCCL is told, by the environment, to leave peer access alone."""
    return os.environ.get("NCCL_P2P_DISABLE") == "1"


def advice(found: list[dict]) -> str:
    """What follows from what was measured, in a sentence.

    Args:
        found: of each rank, as `measure` returns it.
    """
    if found[0]["device"] == "cpu":
        return "A rehearsal on CPUs: gloo between processes, no link to a GPU."
    if len(found) == 1:
        return "One GPU: nothing passes between ranks."
    if without_peers():
        return "NCCL_P2P_DISABLE=1 is set here, so the gather went through host memory. Measure without it as well."
    if all(len(rank["peers"]) == len(found) - 1 for rank in found):
        return "The GPUs reach each other. NCCL needs no setting."
    return "The GPUs do not reach each other; NCCL goes through host memory by itself and needs no setting."


def as_text(record: dict) -> str:
    """A line a rank, and the advice.

    Args:
        record: from `look`.
    """
    names = {
        "host_to_device_gbs": "host to GPU, GB/s",
        "device_to_host_gbs": "GPU to host, GB/s",
        "both_at_once_gbs": "each way, both at once, GB/s",
        "between_gbs": "received in a gather, GB/s",
        "tflops": "bf16, TFLOP/s",
    }
    lines = []
    for name, text in names.items():
        values = [rank[name] for rank in record["ranks"]]
        lines.append(f"{text:<30}" + "".join(f"{'-' if v is None else f'{v:.2f}':>10}" for v in values))
    head = f"{'rank':<30}" + "".join(f"{rank:>10}" for rank in range(len(record["ranks"])))
    told = [record["failed"]] if record["failed"] else []
    return "\n".join([record["ranks"][0]["device"], head, *lines, *told, record["advice"]])


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, and write the record that `nbutils.planning.step_time.measured_links` reads.

    Args:
        arguments: `--num-processes N` and `--out FILE`.

    Returns:
        0, also where a setting is needed: the record holds it.
    """
    parser = argparse.ArgumentParser(
        prog="python -m nbutils links", description="How fast are this machine's links?"
    )
    parser.add_argument("--num-processes", type=int, help="ranks; left out: one a GPU, or two without any")
    also_as(parser, "--num-processes", "--processes", int)
    parser.add_argument("--out", type=Path, default=from_here(FILE), help="the record, JSON")
    options = parser.parse_args(arguments or [])
    ranks = options.num_processes or gpus_shown() or 2
    if gpus_shown() and not 1 <= ranks <= gpus_shown():
        raise ValueError(
            f"--num-processes is {ranks}; this machine shows {gpus_shown()} GPUs, wanted one a rank."
        )
    record = look(ranks)
    print(as_text(record))
    whole = {"what": "links of one machine", **provenance("python -m nbutils links"), **record}
    whole["without_peers"] = without_peers()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = options.out.with_name(f"{options.out.name}.unfinished")
    unfinished.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(options.out)
    print(f"written to {options.out}")
    return 0
