"""What the links that were measured here mean for a run: the doctor's lines about `runs/links.json`."""

import json
import math
from pathlib import Path

from nbutils.planning.check import FAIL, WARN, Check
from nbutils.planning.model_needs import Model
from nbutils.planning.run_setup import Choices, Setup
from nbutils.planning.step_estimate import Links, estimate

MEASURE = "Type `python -m nbutils links`: it takes under a minute, and finds GPUs that hang."
WAITS = 0.1  # of a step: more than that is said
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
    if record.get("without_peers"):
        return Check("GPU to GPU", f"{speed}, through host memory, as NCCL_P2P_DISABLE=1 was set then")
    if all(len(rank["peers"]) == len(ranks) - 1 for rank in ranks):
        return Check("GPU to GPU", f"{speed}, with peer access")
    return Check("GPU to GPU", f"{speed}, through host memory; no peer access, and NCCL needs no setting")


def _host(model: Model, record: dict) -> Check:
    """Whether a step of the fastest settings would wait for the link."""
    ranks = record["ranks"]
    links = Links(
        *(min(rank[name] for rank in ranks) for name in ("host_to_device_gbs", "between_gbs", "tflops"))
    )
    fastest = Choices(embeddings_on_host=True, compile_layers=True)
    step = estimate(model.shape, Setup(len(ranks), 2, True), ROWS, LENGTH, links, fastest)
    found = (
        f"{links.host_gbs:.1f} GB/s; a step of {ROWS} x {LENGTH} tokens with offload computes for "
        f"{step.computing:.1f} s and waits for weights for {step.waiting:.1f} s, {step.tokens_per_second:.0f} tokens/s "
        "(estimate)"
    )
    if step.waiting < WAITS * step.step:
        return Check("host to GPU", found)
    rows = math.ceil(ROWS * step.moving / step.computing)
    fix = (
        f"The link decides. Look at the slots (x16 or x8, not behind the chipset); or take more rows a step, about "
        f"{rows}, with activation_checkpointing_kwargs: {{offload: true}}; or keep the weights on the GPUs "
        "(configs/goals/resident_2x24gb.yaml)."
    )
    return Check("host to GPU", found, WARN, fix)
