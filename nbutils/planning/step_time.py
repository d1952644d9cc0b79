"""Seconds and hours: what a machine's links were measured to carry, and how long so many tokens take."""

import json
from pathlib import Path


def measured_links(file: str | Path = "runs/links.json") -> dict[str, float]:
    """What `python -m nbutils links` measured here, of the slowest rank: what `step_estimate.Links` takes.

    Args:
        file: the record.

    Returns:
        `host_gbs` and `between_gbs` in GB/s, and `tflops`.

    Raises:
        FileNotFoundError: nothing was measured yet.
        ValueError: it was measured on CPUs or on one GPU, which says nothing of such a step.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: type `python -m nbutils links` first.")
    ranks = json.loads(path.read_text(encoding="utf-8"))["ranks"]
    names = {"host_gbs": "host_to_device_gbs", "between_gbs": "between_gbs", "tflops": "tflops"}
    slowest = {
        name: min((rank[key] for rank in ranks if rank[key] is not None), default=None)
        for name, key in names.items()
    }
    if None in slowest.values():
        raise ValueError(
            f"{path} was measured on {len(ranks)} x {ranks[0]['device']}; wanted two GPUs or more."
        )
    return slowest


def hours(tokens: float, tokens_per_second: float) -> float:
    """Hours for so many tokens at a speed over all GPUs."""
    return tokens / tokens_per_second / 3600
