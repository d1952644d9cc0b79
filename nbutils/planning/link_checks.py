"""What the links that were measured here mean for a run: the doctor's lines about `runs/links.json`."""

import json
from pathlib import Path

from nbutils.planning.check import FAIL, WARN, Check
from nbutils.planning.model_needs import Model
from nbutils.planning.step_time import step_estimate

MEASURE = "Type `python -m nbutils links`: it takes under a minute, and finds GPUs that hang."
ROWS, LENGTH = 4, 2048  # of a rank and step: configs/goals/fastest_2x24gb.yaml


def check_links(model: Model, gpus: list[dict], file: Path) -> list[Check]:
    """What was measured, and what follows: a setting that each launch needs, no peer access, a slow link to the host.

    Args:
        model: that is to be trained.
        gpus: of this machine, from `nbutils.common.nvidia_smi.find_gpus`.
        file: the record of `python -m nbutils links`.

    Returns:
        No line where nothing passes between GPUs or the model needs none.
    """
    if len(gpus) < 2 or not model.gpu_needed:
        return []
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        ranks = record["ranks"]
        device = ranks[0]["device"]
    except FileNotFoundError:
        return [Check("links", "not measured yet", WARN, MEASURE)]
    except (ValueError, KeyError, IndexError, TypeError):
        return [Check("links", f"{file.name} cannot be read", WARN, MEASURE)]
    if (len(ranks), device) != (len(gpus), gpus[0]["name"]):
        found = f"measured on {len(ranks)} x {device}, here are {len(gpus)} x {gpus[0]['name']}"
        return [Check("links", found, WARN, MEASURE)]
    return [_between(record), _host(model, record)]


def _between(record: dict) -> Check:
    """Whether the GPUs reach each other, and how fast."""
    ranks = record["ranks"]
    speed = f"{min(rank['between_gbs'] for rank in ranks):.1f} GB/s in a gather"
    if record["settings"]:
        told = " ".join(f"{name}={value}" for name, value in record["settings"].items())
        return Check("GPU to GPU", f"{record['failed']} {speed} with {told}", FAIL, record["advice"])
    if all(len(rank["peers"]) == len(ranks) - 1 for rank in ranks):
        return Check("GPU to GPU", f"{speed}, with peer access")
    return Check("GPU to GPU", f"{speed}, through host memory; no peer access, and NCCL needs no setting")


def _host(model: Model, record: dict) -> Check:
    """Whether moving the weights would take longer than computing with them."""
    slowest = min(record["ranks"], key=lambda rank: rank["host_to_device_gbs"])
    speed = slowest["host_to_device_gbs"]
    step = step_estimate(
        model, ROWS * LENGTH, len(record["ranks"]), speed,
        min(rank["between_gbs"] for rank in record["ranks"]), min(rank["tflops"] for rank in record["ranks"]),
    )  # fmt: skip
    moving, computing = step["transfer"], step["compute"]
    found = (
        f"{speed:.1f} GB/s; with offload, a step of {ROWS} x {LENGTH} tokens moves weights for {moving:.1f} s and "
        f"computes for {computing:.1f} s (estimate)"
    )
    if moving <= computing:
        return Check("host to GPU", found)
    rows = -(-ROWS * moving // computing)
    fix = (
        f"The link decides. Look at the slot (x16 or x8, not behind the chipset); or take more rows a step, {rows:.0f} "
        "with activation_checkpointing_kwargs: {offload: true}; or keep the weights on the GPUs "
        "(configs/goals/resident_2x24gb.yaml)."
    )
    return Check("host to GPU", found, WARN, fix)
