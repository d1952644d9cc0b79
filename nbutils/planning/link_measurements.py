"""What one rank of `python -m nbutils links` measures. Each result is a line in its file, so that a hang can be placed.

Run by `nbutils.planning.links`, once a rank: python -m nbutils.planning.link_measurements FOLDER RANK RANKS
"""

import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from nbutils.planning.memory_items import packed_bytes
from nbutils.planning.shapes import SHAPES

COPY_BYTES = 256 * 2**20
MATRIX = {"cuda": 8192, "cpu": 1024}  # rows and columns
# What FSDP gathers at once: a packed layer of 70B. A CPU gathers less, to be done in seconds.
GATHERED_BYTES = {"cuda": packed_bytes(SHAPES["llama31_70b"].linear_parameters), "cpu": 16 * 2**20}
REPEATS = 10


def main(folder: str, rank: int, ranks: int) -> None:
    """Measure everything in the order of `PHASES`, and write each result when it is there.

    Args:
        folder: shared by the ranks; they meet through a file in it.
        rank: of this process.
        ranks: how many there are.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        init_method=f"file://{Path(folder).resolve() / 'meeting'}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(minutes=10),  # whoever started the ranks ends them long before
    )
    with (Path(folder) / f"rank{rank}.jsonl").open("w", encoding="utf-8") as file:
        for phase, measure in PHASES.items():
            _together()
            print(json.dumps({"phase": phase, **measure(device)}), file=file, flush=True)


def start(device: torch.device) -> dict:
    """Which device this is, and which others it reaches without the host."""
    if device.type == "cpu":
        return {"device": "cpu", "peers": []}
    others = [other for other in range(dist.get_world_size()) if other != device.index]
    peers = [other for other in others if torch.cuda.can_device_access_peer(device.index, other)]
    return {"device": torch.cuda.get_device_name(device), "peers": peers}


def host_links(device: torch.device) -> dict:
    """GB/s between pinned host memory and the GPU: to it, from it, and each way when both go at once.

    All ranks copy at the same time, as they do in training. Nothing on a CPU, which has no such link.
    """
    if device.type == "cpu":
        return {"host_to_device_gbs": None, "device_to_host_gbs": None, "both_at_once_gbs": None}
    there, back = (torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    first, second = (torch.empty(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    streams = [torch.cuda.Stream() for _ in range(2)]

    def both() -> None:
        with torch.cuda.stream(streams[0]):
            first.copy_(there, non_blocking=True)
        with torch.cuda.stream(streams[1]):
            back.copy_(second, non_blocking=True)

    return {
        "host_to_device_gbs": COPY_BYTES / _seconds(lambda: first.copy_(there, non_blocking=True)) / 1e9,
        "device_to_host_gbs": COPY_BYTES / _seconds(lambda: back.copy_(second, non_blocking=True)) / 1e9,
        "both_at_once_gbs": COPY_BYTES / _seconds(both) / 1e9,
    }


def matrix_rate(device: torch.device) -> dict:
    """TFLOP/s of a large product in bf16: 2 n^3 operations."""
    size = MATRIX[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return {"tflops": 2 * size**3 / _seconds(lambda: left @ right) / 1e12}


def gather(device: torch.device) -> dict:
    """GB/s that a rank receives while all gather a layer, as FSDP does; `whole`: the bytes are the right ones."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if ranks == 1:
        return {"between_gbs": None, "whole": True, "piece_bytes": None}
    piece = torch.full((GATHERED_BYTES[device.type] // ranks,), rank + 1, dtype=torch.uint8, device=device)
    whole = torch.empty(ranks * piece.numel(), dtype=torch.uint8, device=device)
    seconds = _seconds(lambda: dist.all_gather_into_tensor(whole, piece))
    wanted = torch.arange(1, ranks + 1, dtype=torch.uint8, device=device).unsqueeze(1)
    return {
        "between_gbs": (ranks - 1) * piece.numel() / seconds / 1e9,
        "whole": bool((whole.view(ranks, -1) == wanted).all()),
        "piece_bytes": piece.numel(),
    }


PHASES: dict[str, Callable[[torch.device], dict]] = {
    "start": start,
    "host links": host_links,
    "matrix rate": matrix_rate,
    "gather": gather,
}


def _together() -> None:
    """Wait for the other ranks, through gloo: NCCL may be what hangs."""
    dist.all_reduce(torch.zeros(1))


def _seconds(action: Callable[[], object]) -> float:
    """The median of `REPEATS` runs on all ranks at once, after one to warm up."""
    taken = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return sorted(taken[1:])[REPEATS // 2]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
