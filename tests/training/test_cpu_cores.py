"""A rank beside a GPU gets its share of the cores; who asked for threads, or rehearses, keeps what it has."""

import os

import pytest
import torch

from nbutils.training.cpu_cores import MOST, use_cpu_cores


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("gpu", "had", "cores", "ranks", "gets"),
    [
        (True, 1, 32, 2, MOST),
        (True, 1, 12, 2, 6),
        (True, 1, 2, 4, 1),
        (True, 3, 32, 2, 3),
        (False, 1, 32, 2, 1),
    ],
)
def test_the_cores_are_shared(monkeypatch, threads, gpu, had, cores, ranks, gets):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    torch.set_num_threads(had)
    assert use_cpu_cores() == torch.get_num_threads() == gets
