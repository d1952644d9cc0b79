"""Threads for what a rank computes on the CPU: an optimizer whose parameters wait in host memory, tokens looked up."""

import os

import torch

MOST = 8  # more is no faster: memory is the limit


def use_cpu_cores() -> int:
    """Let a rank that trains on a GPU compute on its share of the machine's cores.

    torchrun sets OMP_NUM_THREADS=1 for each rank unless the launcher was given another number. That is for ranks that
    feed a GPU. Here they also clip, step and look up on the CPU, and one thread takes 0.07 s more of each step of 12
    layers of 70B (`docs/speed_log.md`). A number above one is left alone, and so is a rehearsal, where ranks compute on
    the CPU anyway.

    Returns:
        The threads of this rank.
    """
    if torch.cuda.is_available() and torch.get_num_threads() == 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, min(MOST, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))))
    return torch.get_num_threads()
