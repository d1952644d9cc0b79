"""A kernel gives back what it keeps on the GPUs before a launch, and says what it cannot give back."""

import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch

from nbutils.course import ROOT
from nbutils.kernel_memory import give_back
from nbutils.launch import launch


def test_a_process_that_used_no_gpu_is_left_alone():
    """Above all it is not made to use one: that alone would take half a GiB on each card."""
    code = "import sys; from nbutils.kernel_memory import give_back; print([give_back()], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[''] False\n"
    assert give_back() == "" or torch.cuda.is_available()


def cards(monkeypatch, *allocated: int) -> list[str]:
    """Stand in for GPUs whose tensors hold this many bytes; the list tells what was called."""
    called = []
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        empty_cache=lambda: called.append("empty_cache"),
        device_count=lambda: len(allocated),
        memory_allocated=lambda device: allocated[device],
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    return called


def test_what_tensors_hold_is_said_card_by_card(monkeypatch):
    called = cards(monkeypatch, 0, 3 * 2**30)
    assert give_back().startswith(
        "This kernel holds 3.0 GiB on GPU 1, which the ranks cannot have. If the launch"
    )
    assert called == ["empty_cache"]


def test_a_little_is_not_worth_a_sentence(monkeypatch):
    called = cards(monkeypatch, 2**20, 2**20)
    assert give_back() == "" and called == ["empty_cache"]


def test_torch_alone_is_no_use_of_a_gpu(monkeypatch):
    called = cards(monkeypatch, 3 * 2**30)
    sys.modules["torch"].cuda.is_initialized = lambda: False
    assert give_back() == "" and called == []


def test_a_tensor_that_only_points_at_itself_is_given_back_too(monkeypatch):
    class Tensor:
        pass

    tensor = Tensor()
    tensor.itself, alive = tensor, weakref.ref(tensor)
    del tensor  # a traceback, or a Trainer, leaves such a ring; it goes when Python looks for rings
    called = cards(monkeypatch, 0)
    cuda = sys.modules["torch"].cuda
    cuda.empty_cache = lambda: called.append("while it lived" if alive() else "empty_cache")
    cuda.memory_allocated = lambda device: 3 * 2**30 if alive() else 0
    assert give_back() == "" and called == ["empty_cache"]


@pytest.mark.launch
def test_a_launch_says_it_between_the_command_and_the_first_line_of_progress(tmp_path, monkeypatch, capsys):
    (tmp_path / "script.py").write_text("")
    monkeypatch.setattr("nbutils.launch.give_back", lambda: "This kernel holds 3.0 GiB on GPU 1.")
    config = ROOT / "configs/accelerate/rehearsal_fsdp1.yaml"
    launch(tmp_path / "script.py", [], config, log=tmp_path / "log", rehearsal=False, timeout=60)
    printed = capsys.readouterr().out
    places = [printed.find(words) for words in ("accelerate launch", "This kernel holds", "finished after")]
    assert -1 not in places and places == sorted(places)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_on_a_real_card():
    tensor = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    assert "1.0 GiB on GPU 0" in give_back()
    del tensor
    assert torch.cuda.memory_reserved() >= 2**30
    assert give_back() == "" and torch.cuda.memory_reserved() < 2**30
