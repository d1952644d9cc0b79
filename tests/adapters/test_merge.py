"""Merging tensor by tensor: bit for bit what PEFT does with the whole model, in little memory, restartable."""

import json
import os
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from nbutils.adapters import merge as merging
from nbutils.adapters.merge import merge
from nbutils.adapters.merge_plan import MergeError
from nbutils.common.paths import ROOT

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},  # PEFT matches endings: all five norms
    "patterns": {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"layers.1.self_attn.q_proj": 40}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random bf16 Llama in several files."""
    folder = tmp_path_factory.mktemp("merge") / "base"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    (folder / "LICENSE.txt").write_text("terms")
    (folder / "NOTICE").write_text("they stay with the weights")
    (folder / "LICENSES").mkdir()
    (folder / "LICENSES" / "of-a-part.txt").write_text("more terms")
    return folder


def make_adapter(base, folder, dtype=torch.float32, **extra):
    """An adapter with random values, saved in the dtype asked for."""
    config = LoraConfig(r=5, lora_alpha=9, target_modules="all-linear", task_type="CAUSAL_LM", **extra)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = (parameter.data + 0.1 * torch.randn(parameter.shape)).to(dtype)
    model.save_pretrained(folder)
    return folder


def read_all(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_bit_for_bit_what_peft_gives(base, tmp_path, kind, dtype):
    adapter = make_adapter(base, tmp_path / "adapter", dtype, **KINDS[kind])
    done = merge(base, adapter, tmp_path / "out", progress=False)
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    wanted = PeftModel.from_pretrained(loaded, adapter).merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    assert wanted.keys() == ours.keys()
    assert [
        n for n in wanted if not torch.equal(wanted[n].view(torch.int16), ours[n].view(torch.int16))
    ] == []
    assert (done["merged"], done["replaced"]) == (14, 6 if kind == "modules_to_save" else 0)
    changed = [name for name in wanted if not torch.equal(before[name], ours[name])]
    assert len(changed) == done["merged"] + done["replaced"]
    assert sorted(p.name for p in base.iterdir()) == sorted(
        p.name for p in (tmp_path / "out").iterdir() if p.name != merging.RECORD
    )


def test_a_merge_that_was_stopped_goes_on(base, tmp_path, monkeypatch):
    adapter = make_adapter(base, tmp_path / "adapter")
    whole, out = tmp_path / "whole", tmp_path / "out"
    merge(base, adapter, whole, progress=False)
    plain, calls = merging.merge_weight, []

    def stop_at_the_ninth(*args):
        calls.append(args)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(merging, "merge_weight", stop_at_the_ninth)
    with pytest.raises(KeyboardInterrupt):
        merge(base, adapter, out, progress=False)
    monkeypatch.undo()
    assert not (out / "config.json").exists()
    finished = {file.name: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    assert 0 < len(finished) < len(list(base.glob("*.safetensors")))

    done = merge(base, adapter, out, progress=False)
    assert done["skipped_files"] == sorted(finished)
    assert all((out / name).stat().st_mtime_ns == time for name, time in finished.items())
    files = [file.relative_to(whole) for file in whole.rglob("*") if file.is_file()]
    assert files and all((out / file).read_bytes() == (whole / file).read_bytes() for file in files)
    assert not list(out.glob(".*"))


def test_what_cannot_be_merged_is_refused(base, tmp_path, monkeypatch):
    adapter = make_adapter(base, tmp_path / "adapter")
    other = make_adapter(base, tmp_path / "other", torch.bfloat16)
    merge(base, adapter, tmp_path / "out", progress=False)
    with pytest.raises(MergeError, match="something else"):
        merge(base, other, tmp_path / "out", progress=False)

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    with pytest.raises(MergeError, match="are free"):
        merge(base, adapter, tmp_path / "full", progress=False)
    monkeypatch.undo()

    tensors = load_file(adapter / merging.WEIGHTS)
    name = next(iter(sorted(tensors)))
    for change, word in (
        ({"base_model.model.model.layers.7.x.lora_A.weight": tensors[name].clone()}, "no such tensor"),
        ({name: torch.ones(5, 3)}, "was made for"),
        ({name: None}, "were wanted"),
    ):
        changed = {key: tensor for key, tensor in (tensors | change).items() if tensor is not None}
        save_file(changed, other / merging.WEIGHTS)
        with pytest.raises(MergeError, match=word):
            merge(base, other, tmp_path / "new", progress=False)

    quantised = tmp_path / "quantised"
    quantised.mkdir()
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"load_in_4bit": True}}
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(MergeError, match="is quantised"):
        merge(quantised, adapter, tmp_path / "new", progress=False)


MEASURE = """
import json, sys
from pathlib import Path
from nbutils.adapters.merge import merge
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
extra = []
for folder in map(Path, sys.argv[1:]):
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = status("VmRSS")
    merge(folder / "base", folder / "adapter", folder / "out", progress=False)
    extra.append(status("VmHWM") - before)
print(json.dumps(extra))
"""


def synthetic(folder, layers, size):
    """A base of `layers` square weights in one file, and a LoRA for each; only the merge can read it."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    (base / "config.json").write_text("{}")
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(layers)]
    save_file(
        {n: torch.full((size, size), 0.5, dtype=torch.bfloat16) for n in names}, base / "model.safetensors"
    )
    low = {}
    for name in names:
        stem = "base_model.model." + name.removesuffix(".weight")
        low |= {f"{stem}.lora_A.weight": torch.ones(8, size), f"{stem}.lora_B.weight": torch.ones(size, 8)}
    save_file(low, adapter / merging.WEIGHTS)
    LoraConfig(r=8, target_modules=["q_proj"]).save_pretrained(adapter)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_follows_the_largest_tensor_and_not_the_model(tmp_path):
    largest = 4096 * 4096 * 2  # bytes in bf16
    folders = [
        synthetic(tmp_path / "warm up", 1, 64),  # pays for what is imported and allocated once
        synthetic(tmp_path / "small", 3, 4096),
        synthetic(tmp_path / "large", 9, 4096),
    ]
    command = [sys.executable, "-c", MEASURE, *map(str, folders)]
    # memory in use, and not the blocks that malloc keeps: see tests/models/test_loading.py
    keep_nothing = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }
    environment = os.environ | keep_nothing
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    _, small, large = (used / largest for used in json.loads(done.stdout.splitlines()[-1]))
    print(f"3 layers: {small:.1f} times the largest tensor; 9 layers: {large:.1f} times")
    assert large < 9
    assert large < small + 1


def test_a_merge_that_was_not_asked_for_says_why(base, tmp_path):
    assert merging.why_not_merged(base, 20) is None
    assert "merge_up_to_gb is 1e-06" in merging.why_not_merged(base, 1e-6)
    settings = json.loads((base / "config.json").read_text()) | {
        "quantization_config": {"load_in_4bit": True}
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert "name that in bf16_base" in merging.why_not_merged(tmp_path, 20)
