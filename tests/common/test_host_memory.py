"""The limit of a control group counts, and not only the machine's memory."""

import os
import subprocess
import sys

import psutil
import pytest

from nbutils.common import host_memory
from nbutils.planning import doctor

MIB = 2**20


def group(folder, limit, used, cached, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used)):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cached}\n")


@pytest.mark.parametrize(
    ("version", "line", "place"),
    [("v2", "0::/slurm/job_7/step", ""), ("v1", "9:cpu,memory:/slurm/job_7/step", "memory")],
)
def test_the_limits_of_all_groups_around_a_process_are_found(tmp_path, version, line, place):
    names = host_memory.FILES[version]
    base = tmp_path / "groups" / place
    group(base / "slurm/job_7/step", "max", 1, 0, names)  # no limit of its own
    group(base / "slurm/job_7", 2048 * MIB, 1024 * MIB, 512 * MIB, names)
    group(base / "slurm", 4096 * MIB, 3000 * MIB, 0, names)
    own = tmp_path / "own"
    own.write_text(f"3:freezer:/elsewhere\n{line}\n")
    found = host_memory.limits(tmp_path / "groups", own)
    assert found == [(2048 * MIB, 512 * MIB), (4096 * MIB, 3000 * MIB)]


def test_in_a_container_the_mounts_own_files_count_whatever_path_the_kernel_tells(tmp_path):
    group(tmp_path / "groups", 64 * MIB, 16 * MIB, 0, host_memory.FILES["v2"])
    own = tmp_path / "own"
    own.write_text("0::/docker/0123abcd\n")
    assert host_memory.limits(tmp_path / "groups", own) == [(64 * MIB, 16 * MIB)]


def test_the_smallest_limit_is_what_there_is(monkeypatch):
    monkeypatch.setattr(host_memory, "limits", lambda: [(10 * MIB, 4 * MIB), (20 * MIB, 25 * MIB)])
    assert host_memory.total() == 10 * MIB
    assert host_memory.available() == 0
    monkeypatch.setattr(host_memory, "limits", lambda: [])
    assert host_memory.total() == psutil.virtual_memory().total


def test_without_control_groups_nothing_is_limited(tmp_path):
    assert host_memory.limits(tmp_path, tmp_path / "missing") == []


@pytest.mark.parametrize(
    "told", [{}, {"HF_HOME": "~/hf"}, {"XDG_CACHE_HOME": "/dev/shm"}, {"HF_HUB_CACHE": "/dev"}]
)
def test_the_doctor_looks_where_the_hubs_client_does(monkeypatch, told):
    for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    says = "from huggingface_hub import constants as c; print(c.HF_HOME, c.HF_HUB_CACHE)"
    home, cache = subprocess.run(
        [sys.executable, "-c", says], env=dict(os.environ), capture_output=True, text=True, check=True
    ).stdout.split()
    assert str(doctor.hub_home()) == home
    assert cache.startswith(str(doctor.hub_cache()))  # itself, or the nearest folder that exists
