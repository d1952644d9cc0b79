"""A kernel gives back what it keeps on the GPUs before a launch, says what it keeps, and uses one of them alone."""

import subprocess
import sys
import weakref
from types import SimpleNamespace

import nbformat
import pytest
import torch
from peft import LoraConfig, get_peft_model

from nbutils.common.paths import ROOT
from nbutils.launching.kernel_memory import give_back, too_large_for_a_gpu
from nbutils.launching.launch import launch
from nbutils.models.loading import load_nf4, load_tokenizer
from nbutils.models.tiny import tiny_base

NOTEBOOK_05 = nbformat.read(ROOT / "notebooks" / "05_save_verify_merge.ipynb", as_version=4)


def test_a_process_that_used_no_gpu_is_left_alone():
    """Above all it is not made to use one: that alone would take half a GiB on each card."""
    code = (
        "import sys; from nbutils.launching.kernel_memory import give_back; "
        "print([give_back()], 'torch' in sys.modules)"
    )
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
    monkeypatch.setattr("nbutils.launching.launch.give_back", lambda: "This kernel holds 3.0 GiB on GPU 1.")
    config = ROOT / "configs/accelerate/rehearsal_fsdp1.yaml"
    launch(tmp_path / "script.py", [], config, log=tmp_path / "log", rehearsal=False, timeout=60)
    printed = capsys.readouterr().out
    places = [printed.find(words) for words in ("accelerate launch", "This kernel holds", "finished after")]
    assert -1 not in places and places == sorted(places)


def cell(words: str) -> str:
    """The one code cell of notebook 05 that holds these words."""
    (source,) = (c.source for c in NOTEBOOK_05.cells if c.cell_type == "code" and words in c.source)
    return source


def before_the_losses(folder) -> dict:
    """What notebook 05 knows when it comes to the cell that defines `heldout_loss`, with the base as its model."""
    settings = {
        "model": str(tiny_base()),
        "dataset": "data/instructions/train.jsonl",
        "heldout_dataset": "data/instructions/heldout.jsonl",
        "max_length": 64,
        "max_cut_share": 1,
        "per_device_eval_batch_size": 32,
        "eval_rows": 32,
    }
    return {
        "adapter": tiny_base(),
        "settings": settings,
        "run_dir": folder,
        "load_nf4": load_nf4,
        "load_tokenizer": load_tokenizer,
    }


def test_notebook_05_measures_its_losses_where_two_gpus_are_visible(tmp_path, monkeypatch):
    """No such machine is here: the count is what made the Trainer choose DataParallel, and TRL refuse it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    known = before_the_losses(tmp_path)
    exec(cell("heldout_rows = "), known)
    exec(cell("def heldout_loss"), known)
    assert len(known["heldout_rows"]) == 32  # those that the run evaluated
    model = get_peft_model(load_nf4(str(tiny_base())), LoraConfig(target_modules=["q_proj"]))
    assert 1 < known["heldout_loss"](model) < 7


def test_a_card_that_cannot_hold_the_weights_is_known_beforehand(monkeypatch):
    if not torch.cuda.is_available():
        assert too_large_for_a_gpu(10**15) == ""  # nothing is put on a GPU
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for card, weights, room in [(24, 5.6, True), (24, 36.9, False), (47.4, 36.9, True), (140, 131, False)]:
        monkeypatch.setattr(
            "torch.cuda.get_device_properties",
            lambda device, card=card: SimpleNamespace(total_memory=int(card * 2**30)),
        )
        said = too_large_for_a_gpu(int(weights * 2**30))
        assert (said == "") is room, (card, weights)
        if not room:
            assert f"needs {weights:.1f} GiB of weights on one GPU; GPU 0 has {card:.1f} GiB" in said
            assert (ROOT / "benchmarks" / "use_adapter.py").is_file() and "benchmarks/use_adapter.py" in said


def test_notebook_05_leaves_out_what_one_card_cannot_hold(tmp_path, monkeypatch, capsys):
    """All cells that need the losses: none fails, and none puts the model on a GPU."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("nbutils.launching.kernel_memory.too_large_for_a_gpu", lambda weights: "Skipped.")
    peft_model = SimpleNamespace(from_pretrained=lambda base, adapter: base)  # no adapter was trained here
    known = before_the_losses(tmp_path)
    exec(cell("heldout_rows = "), known)
    known |= {
        "PeftModel": peft_model,
        "training": {},
        "done": {"bytes": 1},
        "max_new_tokens": 1,
        "not_merged": "",
    }
    known |= {"heldout_loss": None, "AutoModelForCausalLM": None}  # to call None fails
    for words in ("with_adapter = ", "def answer", "def out_of_nf4", "tuned = ", "in_bf16 = "):
        exec(cell(words), known)
    assert capsys.readouterr().out.count("Skipped.") == 3  # the answers are shown as Markdown


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_on_a_real_card():
    tensor = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    assert "1.0 GiB on GPU 0" in give_back()
    del tensor
    assert torch.cuda.memory_reserved() >= 2**30
    assert give_back() == "" and torch.cuda.memory_reserved() < 2**30
