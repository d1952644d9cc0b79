"""What was in GPU memory at the moment of its peak, by the line of code that asked for it."""

import json
from collections import defaultdict
from pathlib import Path

import torch

# The frame that says most about an allocation is the innermost one outside the machinery.
MACHINERY = (
    "torch/autograd/",
    "torch/nn/modules/module.py",
    "torch/_",
    "torch/utils/",
    "contextlib",
    "functools",
)


def at_peak(trace: list[dict]) -> tuple[int, list[tuple[str, int, int]]]:
    """Replay a trace of allocations and group what was live at its highest point.

    Args:
        trace: the events of one device, as `torch.cuda.memory._snapshot()["device_traces"][device]` holds them.

    Returns:
        `(bytes, groups)`: bytes at the peak, and for each line of code `(place, bytes, blocks)`, largest first.
    """
    live: dict[int, dict] = {}
    total = peak = 0
    peak_at = -1
    for number, event in enumerate(trace):
        if event["action"] == "alloc":
            live[event["addr"]] = event
            total += event["size"]
            if total > peak:
                peak, peak_at = total, number
        elif event["action"] == "free_requested" and event["addr"] in live:
            total -= live.pop(event["addr"])["size"]
    live = {}
    for event in trace[: peak_at + 1]:
        if event["action"] == "alloc":
            live[event["addr"]] = event
        elif event["action"] == "free_requested":
            live.pop(event["addr"], None)
    groups: dict[str, list[int]] = defaultdict(list)
    for event in live.values():
        groups[_place(event.get("frames", []))].append(event["size"])
    table = [(place, sum(sizes), len(sizes)) for place, sizes in groups.items()]
    return peak, sorted(table, key=lambda row: -row[1])


def write_peak(path: Path) -> None:
    """Write `at_peak` of this process's GPU as JSON.

    Args:
        path: the file.
    """
    snapshot = torch.cuda.memory._snapshot()
    peak, table = at_peak(snapshot["device_traces"][torch.cuda.current_device()])
    path.write_text(json.dumps({"peak_bytes": peak, "live": table[:60]}, indent=1) + "\n")


def _place(frames: list[dict]) -> str:
    named = []
    for frame in frames:
        file = frame["filename"]
        if any(part in file for part in MACHINERY) or not file.endswith(".py"):
            continue
        short = "/".join(file.rsplit("/", 2)[-2:])
        named.append(f"{short}:{frame['line']} {frame['name']}")
        if len(named) == 3:
            break
    return " < ".join(named) or "(no Python frame: the backward pass)"
