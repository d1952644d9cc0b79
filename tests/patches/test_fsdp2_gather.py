"""FSDP 2's gather beside a copy that changes NaN, as CUDA's does: the script is not touched by it, and notices it."""

import json
import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from nbutils.common.paths import ROOT
from nbutils.launching.launch import LaunchFailed, launch
from nbutils.launching.script_file import write_script
from nbutils.lessons.one_process import begin_alone
from nbutils.models.loading import load_nf4
from nbutils.models.tiny import tiny_base
from nbutils.training.first_gather import AlteredWeights, check_first_gather
from nbutils.training.prep import prepare_for_fsdp_qlora

SETTINGS = {
    "dataset": "data/instructions/train.jsonl", "heldout_dataset": "data/instructions/heldout.jsonl", "max_steps": 2,
    "max_length": 64, "max_cut_share": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1,
    "save_strategy": "no", "disable_tqdm": "true",
}  # fmt: skip
LINE = "    gather_as_bytes()"


def train(folder, module=None, leave_out=""):
    """The script under FSDP 2 on two processes; what it left in run.json."""
    script = write_script(folder)
    assert script.read_text().count(LINE) == 1
    script.write_text(script.read_text().replace(leave_out, "    pass") if leave_out else script.read_text())
    told = {"model": tiny_base(), "output_dir": folder / "out", **SETTINGS}
    words = [word for name, value in told.items() for word in (f"--{name}", str(value))]
    config = ROOT / "configs/accelerate/rehearsal_fsdp2.yaml"
    launch(script, words, config, module=module, log=folder / "launch.log", timeout=240, show=False)
    return json.loads((folder / "out/run.json").read_text())


@pytest.fixture
def like_cuda(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'tests/ranks'}:{ROOT}")
    return "like_cuda"


def test_the_copy_of_these_tests_changes_what_was_recorded_on_a_gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests/ranks")
    import like_cuda

    recorded = json.loads((ROOT / "benchmarks/results/gather_copy.json").read_text())
    seen = recorded["devices"]["cuda"]["torch._foreach_copy_ of bf16"]["every_pattern"]
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    copy = torch.empty_like(every)
    like_cuda.as_numbers([copy], [every])
    changed = {
        f"{name}_changed": (copy.view(dtype) != every.view(dtype)).sum().item()
        for name, dtype in (("patterns", torch.int16), ("bytes", torch.uint8))
    }
    assert changed == {name: seen[name] for name in changed}


def test_a_cast_is_told_from_a_copy():
    base = begin_alone()  # its 4-bit values lie in bf16
    try:
        model = prepare_for_fsdp_qlora(load_nf4(str(base)))
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        policy = MixedPrecisionPolicy(param_dtype=torch.float16)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        check_first_gather(fully_shard(model, mesh=mesh, mp_policy=policy))
        with pytest.raises(AlteredWeights, match=r"A cast does that: .* Set bf16, fp16 or mixed_precision"):
            model(input_ids=torch.ones(1, 4, dtype=torch.long))
    finally:
        dist.destroy_process_group()


@pytest.mark.launch
def test_a_copy_that_changes_nan_changes_nothing_in_the_script(tmp_path, like_cuda):
    for name in ("exact", "like_cuda"):
        (tmp_path / name).mkdir()
    exact = train(tmp_path / "exact")
    there = train(tmp_path / "like_cuda", module=like_cuda)
    assert there["training"] == exact["training"]
    assert there["adapter"]["sha256"] == exact["adapter"]["sha256"]


@pytest.mark.launch
def test_without_the_line_the_first_gather_ends_the_run(tmp_path, like_cuda):
    with pytest.raises(LaunchFailed) as failed:
        train(tmp_path, module=like_cuda, leave_out=LINE)
    found = re.search(
        r"gathered a layer with ([\d,]+) of this rank's ([\d,]+) packed bytes changed", str(failed.value)
    )
    changed, held = (int(number.replace(",", "")) for number in found.groups())
    assert 0 < changed < 0.01 * held
    assert "gather_as_bytes()" in str(failed.value) and "A cast does that" not in str(failed.value)
    assert not (tmp_path / "out/adapter").exists()
