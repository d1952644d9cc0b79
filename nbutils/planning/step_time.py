"""How long a step and a run take, by arithmetic, with links that were measured or assumed."""

import json
from pathlib import Path

from nbutils.planning.memory_items import BF16, packed_bytes
from nbutils.planning.model_needs import Model


def measured_links(file: str | Path = "runs/links.json") -> dict[str, float]:
    """What `python -m nbutils links` measured here, as `pcie_estimate` takes it: of the slowest rank.

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


def pcie_estimate(
    weights: float,
    parameters: float,
    tokens: int,
    ranks: int,
    host_gbs: float,
    between_gbs: float,
    tflops: float,
) -> dict[str, float]:
    """An estimate, not a measurement: seconds of a step of FSDP with offload on cards joined by PCIe.

    Each rank copies its shard from host memory and receives the others', both once for the forward and once for the
    backward pass. Frozen weights cost 6 FLOP a parameter and token when the forward pass is computed twice (forward,
    again, gradients of the inputs). Transfers and computing come one after the other (`step`), or the shorter hides
    behind the longer (`hidden_step`): a real run lies between.

    Args:
        weights: bytes of the whole packed model, embedding and head included.
        parameters: weights of the model.
        tokens: a rank and step.
        ranks: number of GPUs.
        host_gbs: GB/s from host memory to a GPU.
        between_gbs: GB/s between two GPUs.
        tflops: what a GPU really reaches in bf16, in TFLOP/s.

    Returns:
        `transfer`, `compute`, `step`, `hidden_step` in seconds and `tokens_per_second` over all ranks for each of the
        two: `tokens_per_second`, `hidden_tokens_per_second`.
    """
    copied = 2 * weights / ranks
    received = 2 * weights * (ranks - 1) / ranks
    transfer = copied / (host_gbs * 1e9) + received / (between_gbs * 1e9)
    compute = 6 * parameters * tokens / (tflops * 1e12)
    step, hidden = transfer + compute, max(transfer, compute)
    return {
        "transfer": transfer,
        "compute": compute,
        "step": step,
        "hidden_step": hidden,
        "tokens_per_second": tokens * ranks / step,
        "hidden_tokens_per_second": tokens * ranks / hidden,
    }


def step_estimate(
    model: Model, tokens: int, ranks: int, host_gbs: float, between_gbs: float, tflops: float
) -> dict[str, float]:
    """`pcie_estimate` of a model of `nbutils.planning.model_needs`.

    Args:
        model: what is trained.
        tokens: a rank and step.
        ranks: number of GPUs.
        host_gbs: GB/s from host memory to a GPU.
        between_gbs: GB/s between two GPUs.
        tflops: what a GPU really reaches in bf16, in TFLOP/s.
    """
    weights = packed_bytes(model.linear) + BF16 * model.kept
    return pcie_estimate(weights, model.linear + model.kept, tokens, ranks, host_gbs, between_gbs, tflops)
