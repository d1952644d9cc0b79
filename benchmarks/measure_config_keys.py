"""Measure what the keys of config_fsdp.yaml do: one group of rank processes wraps one model in every variant.

Run as: torchrun --nproc-per-node 2 benchmarks/measure_config_keys.py --out keys.json
On CPUs it uses gloo and leaves out what a CPU cannot do (offload, sync_module_states). On two or four GPUs it
measures these too, with NCCL, and writes the slim form of the record (`slim_config_keys.py`). The model is a random
Llama in NF4 with a LoRA adapter: bytes and orders do not depend on what the weights say. Every variant is the config
file with some keys changed, resolved by accelerate.
"""

import argparse
import contextlib
import copy
import datetime
import gc
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from slim_config_keys import as_text, slim
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed.fsdp import update_fsdp_plugin_peft

from nbutils.common.provenance import provenance
from nbutils.launching import config_files as configs
from nbutils.launching import rehearsal
from nbutils.models.loading import load_nf4
from nbutils.patches.fsdp2_gather import gather_as_bytes

SHAPES = {  # small enough for the machine, large enough that padding does not blur the numbers
    "cpu": {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4},
    "cuda": {"vocab_size": 16_000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8},
}
COLLECTIVES = [  # two generations of names
    *("all_gather", "all_gather_single", "all_gather_into_tensor"),
    *("reduce_scatter_single", "reduce_scatter_tensor", "all_reduce"),
]


# ---------------------------------------------------------------- the model


def write_base(folder: Path, device: str) -> None:
    """Write a random Llama in bf16 to a folder."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        **SHAPES[device],
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)


def nf4_base(folder: Path) -> torch.nn.Module:
    """The base in NF4 with bf16 storage, frozen, on the CPU."""
    model = load_nf4(str(folder)).requires_grad_(False)
    model.config.use_cache = False
    return model


def with_adapter(base: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """A copy of the base with a LoRA adapter in bf16 on its linear layers (TRL casts adapters to bf16 too)."""
    torch.manual_seed(seed)
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = copy.deepcopy(base)
    for layer in (module for module in model.modules() if isinstance(module, Linear4bit)):
        layer.quant_state = (
            layer.weight.quant_state
        )  # one object, as after loading: it moves to the GPU with the weight
    model = get_peft_model(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.train()


# ---------------------------------------------------------------- what FSDP does, watched


class Watch:
    """Log each collective with its unit and bytes, and the moments at which a layer's computation begins."""

    def __init__(self):
        self.events: list[
            tuple
        ] = []  # ("gather", unit, bytes) | ("reduce", unit, bytes) | ("forward", layer) ...
        self.unit = None

    @contextlib.contextmanager
    def on(self, names: dict[int, str]):
        """Watch inside this block; `names` gives the name of each FlatParamHandle or FSDPParamGroup by its id."""
        from torch.distributed.fsdp._flat_param import FlatParamHandle
        from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

        with contextlib.ExitStack() as stack:
            for function in [name for name in COLLECTIVES if hasattr(dist, name)]:
                stack.enter_context(
                    _replaced(dist, function, self._logged(getattr(dist, function), function))
                )
            for owner, method in ((FlatParamHandle, "_all_gather_flat_param"), (FSDPParamGroup, "unshard")):
                stack.enter_context(_replaced(owner, method, self._named(getattr(owner, method), names)))
            yield self

    def _logged(self, function, name):
        def call(*args, **kwargs):
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor | list)]
            if name.startswith("all_gather"):
                pieces = tensors[0] if isinstance(tensors[0], list) else tensors[:1]
                self.events.append(("gather", self.unit, sum(piece.nbytes for piece in pieces)))
            elif name.startswith("reduce_scatter"):
                source = max(tensors, key=lambda tensor: tensor.nbytes)
                self.events.append(("reduce_scatter", str(source.dtype), source.nbytes))
            else:
                self.events.append(("all_reduce", str(tensors[0].dtype), tensors[0].nbytes))
            return function(*args, **kwargs)

        return call

    def _named(self, method, names):
        def call(this, *args, **kwargs):
            self.unit = names.get(id(this), "?")
            try:
                return method(this, *args, **kwargs)
            finally:
                self.unit = None

        return call

    def layers(self, model: torch.nn.Module) -> None:
        """Log when a decoder layer begins to compute: its first norm forward, its MLP's gradient backward."""
        for number, layer in enumerate(model.get_base_model().model.layers):
            layer.input_layernorm.register_forward_pre_hook(
                lambda _m, _i, number=number: self.events.append(("forward", f"layers.{number}"))
            )
            layer.mlp.register_forward_hook(lambda _m, _i, out, number=number: self._at_gradient(out, number))

    def _at_gradient(self, output: torch.Tensor, number: int) -> None:
        if output.requires_grad:
            output.register_hook(lambda _g: self.events.append(("backward", f"layers.{number}")))


@contextlib.contextmanager
def _replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def units_of(model: torch.nn.Module) -> dict[str, object]:
    """Name to FlatParamHandle (FSDP 1) or FSDPParamGroup (FSDP 2) of each unit that holds parameters."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    units = {}
    for name, module in model.named_modules():
        if isinstance(module, FSDP) and module._handle is not None:
            units[short(name)] = module._handle
        elif isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
            for group in filter(None, groups):
                units[short(name)] = group
    return units


def short(name: str) -> str:
    """A module's name without the prefixes that wrapping adds."""
    for part in ("_fsdp_wrapped_module.", "_fsdp_wrapped_module", "base_model.model.", "model.layers."):
        name = name.replace(part, "layers." if part == "model.layers." else "")
    return name.strip(".") or "root"


def unit_bytes(unit) -> dict:
    """What one unit holds on this rank now: its shard, its gathered copy (if any), dtype and place."""
    if hasattr(unit, "flat_param"):
        flat = unit.flat_param
        shard = flat._local_shard if hasattr(flat, "_local_shard") else flat
        gathered = (
            flat._full_param_padded.untyped_storage().nbytes() if hasattr(flat, "_full_param_padded") else 0
        )
        full = flat._unpadded_unsharded_size.numel() * shard.element_size()
        trained = flat.requires_grad
    else:
        shards = [p._sharded_param_data for p in unit.fsdp_params]
        shard = shards[0]
        sizes = [p.all_gather_outputs for p in unit.fsdp_params]
        gathered = sum(o.untyped_storage().nbytes() for outputs in sizes for o in outputs)
        full = sum(p._orig_size.numel() * s.element_size() for p, s in zip(unit.fsdp_params, shards))
        trained = any(p.sharded_param.requires_grad for p in unit.fsdp_params)
        return {
            "shard": sum(s.nbytes for s in shards),
            "gathered": gathered,
            "full": full,
            "dtype": "/".join(sorted({str(s.dtype).removeprefix("torch.") for s in shards})),
            "device": shard.device.type,
            "trained": trained,
        }
    return {
        "shard": shard.nbytes,
        "gathered": gathered,
        "full": full,
        "dtype": str(shard.dtype).removeprefix("torch."),
        "device": shard.device.type,
        "trained": bool(trained),
    }


def resident(units: dict) -> dict[str, int]:
    """Bytes of parameters on this rank: shards and gathered copies."""
    each = [unit_bytes(unit) for unit in units.values()]
    return {key: sum(unit[key] for unit in each) for key in ("shard", "gathered")}


# ---------------------------------------------------------------- one variant


def accelerator_for(file: Path):
    """An Accelerator as a launched process would have it for this file."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    for name in [
        name for name in os.environ if name.startswith("FSDP_") or name == "ACCELERATE_MIXED_PRECISION"
    ]:
        del os.environ[name]
    os.environ.update(configs.launch_environment(file))
    AcceleratorState._reset_state()
    # The Accelerator before this one has set the type to FSDP. A plain one must be there before the next looks.
    plain = DistributedType.MULTI_GPU if torch.cuda.is_available() else DistributedType.MULTI_CPU
    PartialState._shared_state["distributed_type"] = plain
    return Accelerator()


def wrapped(file: Path, model: torch.nn.Module, peft_policy: bool, mixed: str | None):
    """Prepare a model as the Trainer does, and return it with its accelerator and an optimizer."""
    accelerator = accelerator_for(file)
    plugin = accelerator.state.fsdp_plugin
    if peft_policy and plugin.fsdp_version == 1:
        # The Trainer does this under FSDP 1 only: PEFT's wrap policy and the storage dtype as precision replace
        # what the file says.
        update_fsdp_plugin_peft(model, accelerator)
        if mixed == "none":
            plugin.mixed_precision_policy = None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    if plugin.fsdp_version == 2:
        model, optimizer = accelerator.prepare(model, optimizer)
    else:
        model = accelerator.prepare(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    return accelerator, model, optimizer


def measure(
    file: Path,
    model: torch.nn.Module,
    steps: int,
    peft_policy: bool = True,
    mixed: str | None = None,
    checkpointing: bool = False,
) -> dict:
    """Wrap the model by this file, train a few steps, and return what was seen on this rank."""
    if checkpointing:  # as the training script does by default
        base = model.get_base_model()
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    watch = Watch()
    watch.layers(model)
    before = {
        n: b.flatten()[:3].tolist() for n, b in model.named_buffers() if n.endswith("rotary_emb.inv_freq")
    }
    seen_dtypes = {}
    watch_dtypes(model, seen_dtypes)
    forget_memory()
    accelerator, model, optimizer = wrapped(file, model, peft_policy, mixed)
    device = accelerator.device
    units = units_of(model)
    names = {id(unit): name for name, unit in units.items()}
    result = {
        "distributed_type": str(accelerator.distributed_type.value),
        "fsdp_version": accelerator.state.fsdp_plugin.fsdp_version,
        "wrapper": type(model).__name__,
        "resident_after_wrapping": resident(units),
        "gpu_allocated_after_wrapping": torch.cuda.memory_allocated() if device.type == "cuda" else None,
        "units": {name: unit_bytes(unit) for name, unit in units.items()},
        "quant_state_bytes": quant_state_bytes(model),
        "optimizer_tensors": sum(p.numel() > 0 for g in optimizer.param_groups for p in g["params"]),
    }
    tokens = torch.arange(64, device=device).view(2, 32)
    with watch.on(names):
        loss = model(input_ids=tokens, labels=tokens).loss
        result["resident_after_forward"] = resident(units)
        loss.backward()
    result["loss"] = loss.item()
    gradients = [g for g in (p.grad for p in model.parameters()) if g is not None]
    gradients = [getattr(g, "_local_tensor", g) for g in gradients]
    result["resident_after_backward"] = resident(units)
    result["gradient_bytes"] = sum(g.nbytes for g in gradients)
    result["gradient_dtypes"] = sorted({str(g.dtype).removeprefix("torch.") for g in gradients})
    optimizer.step()
    states = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.dim() > 0]
    result["optimizer_bytes"] = sum(getattr(v, "_local_tensor", v).nbytes for v in states)
    result["events"] = list(watch.events)  # of this step; the timed steps below are watched too
    result["moved"] = moved(watch.events)
    result["gathers"] = {
        "count": sum(event[0] == "gather" for event in watch.events),
        "largest": max((event[2] for event in watch.events if event[0] == "gather"), default=0),
    }
    result["dtypes"] = seen_dtypes
    result["inv_freq"] = {
        "before": next(iter(before.values()), None),
        "after": next(
            (b.flatten()[:3].tolist() for n, b in model.named_buffers() if n.endswith("inv_freq")), None
        ),
        "dtype": next((str(b.dtype) for n, b in model.named_buffers() if n.endswith("inv_freq")), None),
    }
    if device.type == "cuda":
        optimizer.zero_grad()
        result |= timed(model, optimizer, tokens, steps)
    return result


def watch_dtypes(model: torch.nn.Module, seen: dict) -> None:
    """Note in which dtype the first layer's input arrives, its norm weight is used and its adapter multiplies."""
    layer = model.get_base_model().model.layers[0]

    def norm(module, inputs):
        seen.setdefault("layer_input", str(inputs[0].dtype).removeprefix("torch."))
        seen.setdefault("norm_weight_in_use", str(module.weight.dtype).removeprefix("torch."))

    def adapter(module, inputs):
        seen.setdefault("adapter_weight_in_use", str(module.weight.dtype).removeprefix("torch."))

    layer.input_layernorm.register_forward_pre_hook(norm)
    layer.self_attn.q_proj.lora_A["default"].register_forward_pre_hook(adapter)


def moved(events: list[tuple]) -> dict[str, int]:
    """Bytes that one rank receives in a step, by kind, counted as the ring algorithms send them."""
    ranks = dist.get_world_size()
    total = {"gather": 0, "reduce_scatter": 0, "all_reduce": 0}
    factor = {
        "gather": (ranks - 1) / ranks,
        "reduce_scatter": (ranks - 1) / ranks,
        "all_reduce": 2 * (ranks - 1) / ranks,
    }
    for kind, _, *size in events:
        if kind in total:
            total[kind] += int(size[0] * factor[kind])
    return total


def quant_state_bytes(model: torch.nn.Module) -> int:
    """Bytes of the absmax tables and codebooks of all 4-bit weights: no parameters, so FSDP does not shard them."""
    total = 0
    for layer in (module for module in model.modules() if isinstance(module, Linear4bit)):
        for part in filter(None, (layer.quant_state, layer.quant_state.state2)):
            total += sum(t.nbytes for t in (part.absmax, part.code) if t is not None)
    return total


def timed(model, optimizer, tokens, steps: int) -> dict:
    """Milliseconds a step and peak GPU memory, after two steps to warm up."""
    for step in range(steps + 2):
        if step == 2:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    return {
        "step_ms": (time.perf_counter() - start) / steps * 1000,
        "gpu_allocated_between_steps": torch.cuda.memory_allocated(),
        "gpu_peak_in_step": torch.cuda.max_memory_allocated(),
    }


def forget_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ---------------------------------------------------------------- the keys that need a measurement of their own


def state_dict_files(file: Path, model: torch.nn.Module, folder: Path, adapter_only: bool) -> dict[str, int]:
    """The files, with their bytes, that accelerate leaves for the model of this config."""
    from accelerate.utils import save_fsdp_model

    accelerator, model, _ = wrapped(file, model, True, None)
    target = shared_folder(folder)
    try:
        save_fsdp_model(
            accelerator.state.fsdp_plugin, accelerator, model, str(target), adapter_only=adapter_only
        )
    finally:
        dist.barrier()  # only rank 0 writes a full state dict, so only rank 0 may have failed
    return {str(f.relative_to(target)): f.stat().st_size for f in sorted(target.rglob("*")) if f.is_file()}


def shared_folder(folder: Path) -> Path:
    """A new folder that all ranks know."""
    name = [tempfile.mkdtemp(dir=folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(name, src=0)
    return Path(name[0])


def agreement_after_wrapping(file: Path, base: torch.nn.Module) -> dict:
    """Start every rank with an adapter of its own, wrap, gather: whose values does the model train with?

    Returns:
        The fraction of the gathered adapter that equals this rank's own start, and that equals rank 0's.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    model = with_adapter(base, seed=100 + dist.get_rank())
    name, start = next((n, p.detach().clone()) for n, p in model.named_parameters() if p.requires_grad)
    first = [start.float().tolist() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(first, src=0)
    _, model, _ = wrapped(file, model, True, None)
    with FSDP.summon_full_params(model, writeback=False):
        found = {short(n): p.detach().float().cpu().clone() for n, p in model.named_parameters()}[short(name)]
    found = found.reshape(start.shape)
    return {
        "parameter": short(name),
        "equal_to_own_start": (found == start.float()).float().mean().item(),
        "equal_to_rank0_start": (found == torch.tensor(first[0])).float().mean().item(),
    }


def loaded_weights(folder: Path, quantised: bool, key: bool) -> dict:
    """What from_pretrained leaves on this rank with the key on or off: bytes, and how much of it rank 0 has too.

    A rank that was spared the file holds memory that nothing was written to, so its values are not those of rank 0.
    """
    os.environ["ACCELERATE_USE_FSDP"], os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true", str(key).lower()
    if quantised:
        model = load_nf4(str(folder))
    else:
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16)
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    sums = [(p.nbytes, p.device.type, None if p.is_meta else checksum(p)) for p in model.parameters()]
    first = [sums if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(first, src=0)
    return {
        "bytes": sum(size for size, place, _ in sums if place != "meta"),
        "bytes_equal_to_rank0": sum(mine[0] for mine, zero in zip(sums, first[0]) if mine[2] == zero[2]),
        "devices": sorted({place for _, place, _ in sums}),
    }


def checksum(tensor: torch.Tensor) -> int:
    return int(tensor.detach().contiguous().view(torch.uint8).to(torch.int64).sum())


def trained_together(file: Path, base: torch.nn.Module, devices: int) -> dict:
    """One backward pass on rows of each rank's own, where a process sees this many devices: are gradients summed?

    With one device each rank is what the only rank of a machine with one GPU is.

    Returns:
        What this rank keeps, and whether all ranks have the same gradients, as those that hold copies must.
    """
    tokens = (torch.arange(64) + dist.get_rank()).view(2, 32)
    kind = torch.cuda if torch.cuda.is_available() else torch.cpu
    with _replaced(kind, "device_count", lambda: devices):
        accelerator, model, _ = wrapped(file, with_adapter(base), True, None)
    units, tokens = units_of(model), tokens.to(accelerator.device)
    model(input_ids=tokens, labels=tokens).loss.backward()
    mine = [p.grad.float().sum().item() for p in model.parameters() if p.grad is not None]
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return {
        "resident_after_wrapping": resident(units),
        "units": {name: unit_bytes(unit) for name, unit in units.items()},
        "gradients": len(mine),
        "gradients_agree": all(other == mine for other in everybody),
    }


def hybrid_mesh(base: torch.nn.Module, device: str) -> dict:
    """HYBRID_SHARD over a mesh of two groups: stands for two machines with half of the ranks each."""
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import ShardingStrategy

    model = with_adapter(base)
    watch = Watch()
    mesh = init_device_mesh(device, (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    model = FSDP(
        model,
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        auto_wrap_policy=fsdp_auto_wrap_policy(model),
        device_mesh=mesh,
        device_id=torch.device(device, torch.cuda.current_device())
        if device == "cuda"
        else torch.device("cpu"),
    )
    units = units_of(model)
    tokens = torch.arange(64, device=device).view(2, 32)
    with watch.on({id(unit): name for name, unit in units.items()}):
        model(input_ids=tokens, labels=tokens).loss.backward()
    kinds = {}
    for kind, _, *size in watch.events:
        kinds[kind] = kinds.get(kind, 0) + (size[0] if size else 0)
    return {"resident_after_wrapping": resident(units), "bytes_in_collectives": kinds, "groups": 2}


# ---------------------------------------------------------------- all variants


def variants(device: str) -> dict[str, dict]:
    """Name to changed keys; `version`, `peft_policy`, `mixed` and `checkpointing` say how the model is wrapped."""
    table = {
        "FULL_SHARD": {},
        "SHARD_GRAD_OP": {"fsdp_sharding_strategy": "SHARD_GRAD_OP"},
        "NO_SHARD": {"fsdp_sharding_strategy": "NO_SHARD"},
        "fsdp2 reshard": {"version": 2},
        "fsdp2 no reshard": {"version": 2, "fsdp_reshard_after_forward": False},
        "BACKWARD_POST": {"fsdp_backward_prefetch": "BACKWARD_POST"},
        "NO_PREFETCH": {"fsdp_backward_prefetch": "NO_PREFETCH"},
        "forward_prefetch": {"fsdp_forward_prefetch": True},
        "file policy, flat": {"peft_policy": False},
        "file policy, orig": {"peft_policy": False, "fsdp_use_orig_params": True},
        "peft policy, orig": {"fsdp_use_orig_params": True},
        "size policy, orig": {
            "peft_policy": False,
            "fsdp_use_orig_params": True,
            "fsdp_auto_wrap_policy": "SIZE_BASED_WRAP",
            "fsdp_min_num_params": 5_000 if device == "cpu" else 500_000,
        },
        "no wrap, orig": {
            "peft_policy": False,
            "fsdp_use_orig_params": True,
            "fsdp_auto_wrap_policy": "NO_WRAP",
        },
        "no policy of precision": {"mixed": "none"},
        "mixed bf16": {"mixed_precision": "bf16"},
        "fsdp2 mixed bf16": {"version": 2, "mixed_precision": "bf16"},
    }
    for name in ("FULL_SHARD", "SHARD_GRAD_OP", "fsdp2 reshard", "fsdp2 no reshard"):
        table[f"{name}, checkpoints"] = table[name] | {"checkpointing": True}
    table["HYBRID_SHARD"] = {"fsdp_sharding_strategy": "HYBRID_SHARD"}
    table["offload"] = {"fsdp_offload_params": True}  # a CPU refuses this and the next, in words of its own
    table["sync"] = {"fsdp_sync_module_states": True}
    if device == "cuda":
        table["fsdp2 offload"] = {"version": 2, "fsdp_offload_params": True}
    return table


def run_all(folder: Path, device: str, steps: int, save) -> dict:
    """All measurements; every rank must go through them in the same order. `save(results)` runs after each part."""
    gather_as_bytes()  # as the training script: else FSDP 2 on GPUs computes with altered weights (notebook 02b)
    files = {1: configs.RECIPE, 2: configs.RECIPE_FSDP2}
    usual = {"fsdp_offload_params": False}  # so that the other keys are seen alone
    if device == "cpu":
        files = {v: Path(f"configs/accelerate/rehearsal_fsdp{v}.yaml") for v in (1, 2)}
    base = nf4_base(folder)
    results = {"variants": {}}
    for name, changes in variants(device).items():
        keys = dict(changes)
        how = {"peft_policy": keys.pop("peft_policy", True), "mixed": keys.pop("mixed", None)}
        how["checkpointing"] = keys.pop("checkpointing", False)
        file = configs.variant(files[keys.pop("version", 1)], folder, **(usual | keys))
        seen = attempt(measure, file, with_adapter(base), steps, **how)
        results["variants"][name] = {"keys": changes, **seen}
        forget_memory()
        save(results)
    results["cpu_ram_efficient_loading"] = {
        f"{kind}, key {'on' if key else 'off'}": attempt(loaded_weights, folder, kind == "NF4", key)
        for kind in ("bf16", "NF4")
        for key in (False, True)
    }
    results["sync_module_states"] = {}
    alone = usual | {"fsdp_cpu_ram_efficient_loading": False}  # that key would switch sync on
    for value in [False, True] if device == "cuda" else [False]:
        file = configs.variant(files[1], folder, **alone, fsdp_sync_module_states=value)
        results["sync_module_states"][str(value)] = attempt(agreement_after_wrapping, file, base)
    save(results)
    results["one device a machine"] = {
        strategy: attempt(
            trained_together,
            configs.variant(files[1], folder, **usual, fsdp_sharding_strategy=strategy),
            base,
            1,
        )
        for strategy in ("NO_SHARD", "HYBRID_SHARD")
    }
    save(results)
    if dist.get_world_size() >= 4:
        results["hybrid over two groups"] = attempt(hybrid_mesh, base, device)
        save(results)
    plain = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16).requires_grad_(False)
    plain.config.use_cache = False
    results["state_dict_type"] = {}
    # FSDP 1 gathers a full state dict and moves it to the host; from a CPU to a CPU, rank 0 frees what it has
    # just gathered, fails, and the other rank waits for ever. So FULL under FSDP 1 is measured on GPUs only.
    full = ("FULL",) if device == "cuda" else ()
    for number, kinds in {2: ("FULL", "SHARDED"), 1: ("SHARDED", "LOCAL", *full)}.items():
        for kind in kinds:
            file = configs.variant(files[number], folder, **usual, fsdp_state_dict_type=f"{kind}_STATE_DICT")
            results["state_dict_type"][f"fsdp{number} {kind}_STATE_DICT"] = {
                "whole model": attempt(state_dict_files, file, with_adapter(plain), folder, False),
                "adapter only": attempt(state_dict_files, file, with_adapter(base), folder, True),
            }
            save(results)
    return results


def attempt(function, *args, **kwargs) -> dict:
    """The result of a measurement, or the error it ended with: an error is a finding too."""
    if dist.get_rank() == 0:
        print(f"{time.perf_counter():.1f} {function.__name__}", *map(str, args[:1]), flush=True)
    try:
        return function(*args, **kwargs)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        message = (str(error).splitlines() or [""])[0]
        return {
            "error": f"{type(error).__name__}: {message}",
            "where": f"{last.filename.rsplit('site-packages/')[-1]}, line {last.lineno}, {last.name}",
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="the JSON file to write")
    parser.add_argument("--commit", default="", help="the commit that is measured; left out: as git says")
    parser.add_argument("--steps", type=int, default=10, help="timed steps a variant, on GPUs")
    options = parser.parse_args()

    from accelerate import PartialState

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        rehearsal.enable()
    state = PartialState(timeout=datetime.timedelta(seconds=120))  # a collective that hangs becomes an error
    device = state.device.type
    folder = [tempfile.mkdtemp() if state.process_index == 0 else None]
    dist.broadcast_object_list(folder, src=0)
    folder = Path(folder[0])
    if state.process_index == 0:
        write_base(folder, device)
    dist.barrier()
    ranks = dist.get_world_size()
    command = f"torchrun --nproc-per-node {ranks} benchmarks/measure_config_keys.py --out FILE"
    report = {
        "what": "What the keys of configs/accelerate/config_fsdp.yaml do",
        **provenance(command, options.commit),
        "world_size": ranks,
        "device": device,
        "model": SHAPES[device],
    }

    def save(*results: dict) -> None:
        if state.process_index == 0:  # what is there so far, should a later part hang
            whole = report | {"ranks": list(results)}
            # A record of GPUs is for the repository; what a CPU saw is for the lesson that asked for it.
            text = as_text(slim(whole) if device == "cuda" else whole).replace(str(folder), "FOLDER")
            Path(options.out).write_text(text, encoding="utf-8")

    mine = run_all(folder, device, options.steps, save)
    everybody = [None] * ranks
    dist.all_gather_object(everybody, mine)
    for other in everybody[1:]:  # the order of events is the same on all ranks: keep one
        for result in other["variants"].values():
            result.pop("events", None)
            result.pop("units", None)
    save(*everybody)
    if state.process_index == 0:
        shutil.rmtree(folder)
        print(f"wrote {options.out}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
