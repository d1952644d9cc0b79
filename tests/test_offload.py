"""FSDP 1's offloaded shards: what is kept in host memory, asked of the class itself."""

import pytest
import torch
from torch import nn
from torch.distributed import HashStore
from torch.distributed.fsdp._flat_param import FlatParamHandle, HandleShardingStrategy

from nbutils.offload import spare_host_memory


@pytest.fixture
def one_process(monkeypatch):
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", torch.Tensor.clone
    )  # there is nothing to pin for without a GPU
    plain = FlatParamHandle.init_flat_param_attributes
    while hasattr(plain, "spares_host_memory"):  # an earlier test has loaded a model
        plain = plain.__wrapped__
    monkeypatch.setattr(FlatParamHandle, "init_flat_param_attributes", plain)
    yield
    torch.distributed.destroy_process_group()


def handle_of(module: nn.Module) -> FlatParamHandle:
    handle = FlatParamHandle(
        list(module.parameters()), module, torch.device("cpu"), HandleShardingStrategy.FULL_SHARD,
        offload_params=True, mp_param_dtype=None, mp_reduce_dtype=None, keep_low_precision_grads=False,
        process_group=torch.distributed.group.WORLD, use_orig_params=False,
    )  # fmt: skip
    handle.shard()
    handle.init_flat_param_attributes()
    return handle


def kept(handle: FlatParamHandle) -> int:
    """Bytes of all storages that a handle holds for its shard and its gradient, each counted once."""
    flat = handle.flat_param
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in (flat.data, flat._local_shard, flat._cpu_grad)}  # fmt: skip
    return sum(storages.values())


def test_a_frozen_shard_is_kept_once(one_process):
    frozen = nn.Linear(64, 64, bias=False).requires_grad_(False)
    shard = 64 * 64 * 4
    assert kept(handle_of(frozen)) == 3 * shard  # FSDP as it is
    spare_host_memory()
    frozen = nn.Linear(64, 64, bias=False).requires_grad_(False)
    handle = handle_of(frozen)
    assert kept(handle) == shard + 4
    assert (
        handle.flat_param._cpu_grad is not None
        and handle.flat_param._cpu_grad.shape == handle.flat_param.shape
    )


def test_a_trainable_shard_keeps_its_gradient(one_process):
    spare_host_memory()
    assert kept(handle_of(nn.Linear(64, 64, bias=False))) == 2 * 64 * 64 * 4


def test_a_second_call_changes_nothing(one_process):
    spare_host_memory()
    once = FlatParamHandle.init_flat_param_attributes
    spare_host_memory()
    assert FlatParamHandle.init_flat_param_attributes is once
