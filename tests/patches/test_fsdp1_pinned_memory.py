"""Offloaded shards, asked of torch's own classes: what is kept in host memory, and where a resumed optimizer lies."""

import pytest
import torch
from torch import nn
from torch.distributed import HashStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp._common_utils import HandleTrainingState
from torch.distributed.fsdp._flat_param import FlatParamHandle, HandleShardingStrategy
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from nbutils.patches.fsdp1_pinned_memory import spare_host_memory
from nbutils.planning.run_setup import Setup
from nbutils.training.optimizer_state import optimizer_pieces, put_optimizer_back


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


def handle_of(
    module: nn.Module, strategy: HandleShardingStrategy = HandleShardingStrategy.FULL_SHARD
) -> FlatParamHandle:
    handle = FlatParamHandle(
        list(module.parameters()), module, torch.device("cpu"), strategy,
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


@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_one_rank_of_fsdp1_is_not_sharded_whatever_is_asked(one_process):
    asked = ShardingStrategy.FULL_SHARD
    wrapped = FullyShardedDataParallel(
        nn.Linear(8, 8), sharding_strategy=asked, device_id=torch.device("cpu")
    )
    assert wrapped.sharding_strategy == ShardingStrategy.NO_SHARD
    assert Setup(world_size=1).no_shard and not Setup(world_size=2).no_shard
    assert not Setup(world_size=1, fsdp_version=2).no_shard


@pytest.mark.parametrize(
    ("strategy", "held"), [(HandleShardingStrategy.NO_SHARD, 1), (HandleShardingStrategy.FULL_SHARD, 0)]
)
def test_without_shards_the_copy_on_the_gpu_is_never_freed(one_process, monkeypatch, strategy, held):
    """A second copy on the CPU stands for the GPU's. A forward pass is over, and the module's view holds it still."""
    monkeypatch.setattr("torch.distributed.fsdp._flat_param._no_dispatch_record_stream", lambda *_: None)
    spare_host_memory()
    module = nn.Linear(64, 64, bias=False).requires_grad_(False)
    handle = handle_of(module, strategy)
    handle._device_handle = torch.cpu
    flat = handle.flat_param
    handle._training_state = HandleTrainingState.FORWARD
    flat.data = flat.data.clone()  # what `pre_unshard` does on a GPU
    handle.unshard()
    handle.post_unshard()
    assert module.weight.untyped_storage().data_ptr() != flat._local_shard.untyped_storage().data_ptr()
    handle.reshard(handle.uses_sharded_strategy)  # frees what was gathered, if something was
    handle.post_reshard()
    assert flat.untyped_storage().data_ptr() == flat._local_shard.untyped_storage().data_ptr()  # the host's
    assert module.weight.untyped_storage().nbytes() == held * 64 * 64 * 4


def offloaded(values: torch.Tensor) -> nn.Parameter:
    """FSDP 2's piece with offload: it lies on the CPU, and its mesh is of other devices; `meta` stands for GPUs."""
    mesh = DeviceMesh("meta", [0], _init_backend=False)
    whole = TensorMeta(values.shape, values.stride(), values.dtype)
    return nn.Parameter(
        DTensor(values, DTensorSpec(mesh, (Shard(0),), tensor_meta=whole), requires_grad=False)
    )


def test_a_resumed_optimizer_lies_with_its_offloaded_pieces(one_process, monkeypatch):
    # From 2.14 on torch asks a mesh's devices how many a machine has, and `meta` has no module that could say so.
    monkeypatch.setattr(torch, "meta", torch.cpu, raising=False)
    trained, average = offloaded(torch.ones(4, 3)), offloaded(torch.arange(12.0).reshape(4, 3)).detach()
    moved = DTensor.from_local(torch.ones(4, 3), trained.device_mesh, [Shard(0)], run_check=False)
    assert moved.to_local().device.type == "meta"  # what torch does to a piece that is on another device
    first, second = torch.optim.AdamW([trained]), torch.optim.AdamW([trained])
    first.state[trained] = {"step": torch.tensor(1.0), "exp_avg": average}
    put_optimizer_back(second, *optimizer_pieces(first))
    put_back = second.state[trained]
    assert torch.equal(put_back["step"], torch.tensor(1.0))
    assert isinstance(put_back["exp_avg"], DTensor) and put_back["exp_avg"].placements == trained.placements
    assert put_back["exp_avg"].to_local().device == trained.to_local().device
    assert torch.equal(put_back["exp_avg"].to_local(), average.to_local())
