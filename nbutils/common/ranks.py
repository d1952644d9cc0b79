"""Ranks of a launch: the number of this one, and what they agree on."""

from collections.abc import Callable

import torch.distributed as dist


def rank() -> int:
    """Return this process's number: 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks of the launch: 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def agree(problem: str | None, error: type[Exception]) -> None:
    """Raise on every rank what any rank found, so that none waits for one that has given up.

    Args:
        problem: what this rank found, or None.
        error: the type to raise.
    """
    problems = [problem]
    if dist.is_initialized():
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    for number, found in enumerate(problems):
        if found is not None:
            raise error(found if number == rank() else f"Rank {number}: {found}")


def on_every_rank(action: Callable[[], object], error: type[Exception]) -> None:
    """Run something on every rank; if it fails on one, raise on all, so that none waits for one that has given up.

    Args:
        action: must hold no collective.
        error: the type to raise.
    """
    problem = None
    try:
        action()
    except Exception as failure:
        known = type(failure).__module__.startswith("nbutils.")  # it says what happened in a sentence
        problem = str(failure) if known else f"{type(failure).__name__}: {failure}"
    agree(problem, error)


def in_step(value):
    """Give every rank rank 0's value; every rank must call it."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]
