"""Each patch finds its target gone or changed, says so in a sentence, and can be asked whether it is still needed."""

import importlib
from functools import partial

import bitsandbytes as bnb
import pytest
import torch
import transformers.modeling_utils
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import _init_utils
from torch.distributed.fsdp._flat_param import FlatParamHandle
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

from nbutils.common.foreign_code import UnknownCode
from nbutils.common.paths import ROOT
from nbutils.patches.activation_offload import copy_activations_beside_compute
from nbutils.patches.fsdp1_pinned_memory import spare_host_memory
from nbutils.patches.fsdp2_gather import gather_as_bytes
from nbutils.patches.hybrid_timeout import give_its_groups_the_timeout
from nbutils.patches.linear4bit_forward import make_linear4bit_traceable

PATCHES = sorted(path.stem for path in (ROOT / "nbutils/patches").glob("[a-z]*.py"))
TARGETS = {  # patch: what applies it, and what it changes or leans on
    "activation_offload": (copy_activations_beside_compute, transformers.modeling_utils, "save_on_cpu"),
    "fsdp1_pinned_memory": (spare_host_memory, FlatParamHandle, "init_flat_param_attributes"),
    "fsdp2_gather": (gather_as_bytes, _fsdp_collectives, "_get_all_gather_input_metadatas"),
    "hybrid_timeout": (
        partial(give_its_groups_the_timeout, torch.nn.Linear(1, 1), None),
        distributed_c10d,
        "_set_pg_timeout",
    ),
    "linear4bit_forward": (make_linear4bit_traceable, bnb, "matmul_4bit"),
}


def guard(name: str):
    return importlib.import_module(f"nbutils.patches.{name}")


def test_every_patch_has_a_guard():
    assert set(TARGETS) == set(PATCHES)


@pytest.mark.parametrize("name", PATCHES)
def test_today_the_target_is_as_we_know_it_and_the_patch_is_needed(name):
    guard(name).check()
    assert guard(name).still_needed() is True


@pytest.mark.parametrize("name", PATCHES)
def test_a_renamed_target_is_said_before_anything_is_changed(monkeypatch, name):
    apply, owner, target = TARGETS[name]
    monkeypatch.delattr(owner, target)
    for what in (guard(name).check, apply):
        with pytest.raises(
            UnknownCode, match=rf"found nothing of that name, wanted {target}\(.*patches/{name}\.py"
        ):
            what()
    assert not hasattr(owner, target)


@pytest.mark.parametrize("name", PATCHES)
def test_a_target_that_takes_something_else_is_said(monkeypatch, name):
    apply, owner, target = TARGETS[name]
    monkeypatch.setattr(owner, target, lambda tensors, group: None)
    with pytest.raises(UnknownCode, match=rf"found {target}\(tensors, group\), wanted {target}\("):
        apply()


def test_a_target_that_nothing_calls_any_more_is_said(monkeypatch):
    """`save_on_cpu` may stay where it is and no longer be what the checkpoints use."""
    model = transformers.modeling_utils.PreTrainedModel
    monkeypatch.setattr(model, "_activation_checkpointing_enable", model.activation_checkpointing_enable)
    with pytest.raises(UnknownCode, match=r"wanted `with save_on_cpu\(.*in its source, and it is gone"):
        copy_activations_beside_compute()


def fixed_pinning(self):
    if self.flat_param.requires_grad:
        self.flat_param._cpu_grad = torch.zeros_like(self.flat_param)


class FixedSaving(torch.autograd.graph.saved_tensors_hooks):
    def __init__(self, pin_memory, device_type):
        self.stream = torch.cuda.Stream()


def fixed_groups(global_process_group, num_devices_per_node, timeout):
    return None


def fixed_forward(self, x):
    return bnb.matmul_4bit(x, self.weight, quant_state=self.quant_state)


@pytest.mark.parametrize(
    ("name", "owner", "target", "fixed"),
    [
        ("activation_offload", torch.autograd.graph, "save_on_cpu", FixedSaving),
        ("fsdp1_pinned_memory", FlatParamHandle, "init_flat_param_attributes", fixed_pinning),
        ("hybrid_timeout", _init_utils, "_init_intra_and_inter_node_groups", fixed_groups),
        ("linear4bit_forward", guard("linear4bit_forward"), "PLAIN", fixed_forward),
    ],
)
def test_a_library_that_does_it_by_itself_makes_the_patch_needless(monkeypatch, name, owner, target, fixed):
    monkeypatch.setattr(owner, target, fixed)
    assert guard(name).still_needed() is False


def test_a_gather_with_another_copy_makes_the_patch_needless(monkeypatch):
    monkeypatch.setattr(guard("fsdp2_gather"), "source", lambda module: "torch.cat(pieces, out=buffer)")
    assert guard("fsdp2_gather").still_needed() is torch.cuda.is_available()
