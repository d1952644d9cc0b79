"""Save and verify the adapter in many ways in one group of gloo processes; each rank writes what it saw as JSON.

Run as: RANK=0 WORLD_SIZE=2 python save_cases.py FOLDER      (one process a rank; the test does it)
"""

import json
import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecision, StateDictType, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from nbutils.adapters import pieces as shards
from nbutils.adapters import save as saving
from nbutils.adapters.logits import compare_logits, fixed_batch_logits

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = 2
TOKENS = torch.arange(24).reshape(2, 12)


def base_model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=LAYERS,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16)


def adapted(kind: str, dtype: torch.dtype):
    torch.manual_seed(1)
    extra = {"dora": {"use_dora": True}, "modules_to_save": {"modules_to_save": ["lm_head", "norm"]}}.get(
        kind, {}
    )
    # r=3 does not divide by 2 or 4: pieces of different sizes, and empty ones
    config = LoraConfig(r=3, lora_alpha=6, target_modules=PROJECTIONS, task_type="CAUSAL_LM", **extra)
    model = get_peft_model(base_model(), config, autocast_adapter_dtype=False)
    model.config.use_cache = False
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def wrap(model, way: str):
    cpu = torch.device("cpu")
    policy = fsdp_auto_wrap_policy(model) if "fsdp1" in way else None
    mixed = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    if way == "fsdp1":
        return FSDP(
            model, auto_wrap_policy=policy, device_id=cpu, mixed_precision=mixed, use_orig_params=False
        )
    if way == "fsdp1_orig":
        return FSDP(
            model, auto_wrap_policy=policy, device_id=cpu, mixed_precision=mixed, use_orig_params=True
        )
    if way == "fsdp1_mixed_units":  # base and adapter in one flat parameter
        policy = ModuleWrapPolicy({LlamaDecoderLayer})
        return FSDP(
            model, auto_wrap_policy=policy, device_id=cpu, mixed_precision=mixed, use_orig_params=True
        )
    if way == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in model.modules():
            if isinstance(module, LlamaDecoderLayer):
                fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if way == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    return model


@torch.no_grad()
def plant(model, way: str) -> None:
    """Fill what this rank holds with values that no other rank has, so that a slice of the wrong rank shows."""
    number = 0 if way in ("ddp", "plain") else dist.get_rank()
    chance = torch.Generator().manual_seed(1000 + number)
    # Under FSDP 1 these are the flat parameters' shards, or (use_orig_params) views of them; under FSDP 2 DTensors.
    held = [p.to_local() if isinstance(p, DTensor) else p.data for p in model.parameters() if p.requires_grad]
    for tensor in held:
        if tensor.numel():
            tensor.copy_(0.05 * torch.randn(tensor.shape, generator=chance))
            tensor.view(-1)[0] = -0.0  # equal to 0.0 as a number, not as bits


def raw_gather(model, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """The oracle: all_gather the shards as they lie in memory and cut them up by torch's own layout records."""
    world, whole = dist.get_world_size(), {}
    for prefix, unit in model.named_modules():
        if isinstance(unit, FSDP) and unit._handle is not None:
            flat = unit._handle.flat_param
            shard = getattr(flat, "_local_shard", flat.data).detach().clone()
            parts = [torch.empty_like(shard) for _ in range(world)]
            dist.all_gather(parts, shard)
            everything, start, originals = torch.cat(parts), 0, iter(zip(flat._fqns, flat._shapes))
            for numel, padding in zip(flat._numels_with_padding, flat._is_padding_mask):
                if not padding:
                    fqn, shape = next(originals)
                    name = f"{prefix}.{fqn}".replace("_fsdp_wrapped_module.", "").replace(
                        "_fsdp_wrapped_module", ""
                    )
                    whole[name.strip(".").replace("..", ".")] = everything[start : start + numel].reshape(
                        shape
                    )
                start += numel
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            local, rows = parameter.to_local().detach(), -(-parameter.shape[0] // world)
            padded = torch.zeros(rows, *parameter.shape[1:], dtype=local.dtype)
            padded[: local.shape[0]] = local
            parts = [torch.empty_like(padded) for _ in range(world)]
            dist.all_gather(parts, padded)
            whole[name] = torch.cat(parts)[: parameter.shape[0]]
        elif not FSDP.fsdp_modules(model):
            whole[name.removeprefix("module.")] = parameter.detach().clone()
    return {names[name]: tensor for name, tensor in whole.items() if name in names}


def peft_names(model) -> dict[str, str]:
    """{parameter name: name in PEFT's file}, found by letting PEFT save the plain model and following the storage."""
    by_storage = {p.data_ptr(): name for name, p in model.named_parameters()}
    return {by_storage[t.data_ptr()]: key for key, t in get_peft_model_state_dict(model).items()}


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and torch.equal(
        left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
    )  # fmt: skip


def loads_as(written: torch.Tensor, loaded: torch.Tensor) -> bool:
    return same_bits(written.to(loaded.dtype), loaded)


def caught(call, *args, **kwargs) -> str:
    try:
        call(*args, **kwargs)
    except saving.SaveError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def save_case(way: str, kind: str, dtype: str, setting: str, when: str, out: Path) -> dict:
    model = adapted(kind, getattr(torch, dtype))
    names = peft_names(model)
    model = wrap(model, way)
    if setting != "-":
        FSDP.set_state_dict_type(model, getattr(StateDictType, setting))
    plant(model, way)
    trained = None
    if when == "after a forward":  # under no_grad FSDP leaves the root whole
        trained = fixed_batch_logits(model, TOKENS)
    expected = raw_gather_resharded(model, names)
    report = saving.save_adapter(model, out)
    logits = fixed_batch_logits(model, TOKENS) if trained is not None else None
    result = {"report": report, "keys": len(names), "adapter_bytes": sum(t.nbytes for t in expected.values())}
    result["unchanged by saving"] = trained is None or same_bits(trained, logits)
    if dist.get_rank() == 0:
        written = load_file(out / saving.WEIGHTS)
        result["names"] = sorted(written) == sorted(names.values())
        result["differing"] = [
            k for k in expected if k not in written or not same_bits(expected[k], written[k])
        ]
        result["leftovers"] = sorted(p.name for p in out.parent.glob(f".{out.name}*"))
        result |= reload(out, written, trained)
    dist.barrier()
    return result


def raw_gather_resharded(model, names):
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return raw_gather(model, names)


def reload(folder: Path, written: dict, trained) -> dict:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        base = base_model()
        plain = fixed_batch_logits(base, TOKENS)
        model = PeftModel.from_pretrained(base, str(folder))
    loaded = get_peft_model_state_dict(model)
    result = {
        "warnings": [str(w.message) for w in seen if w.category is not FutureWarning],
        # PEFT loads LoRA in fp32 and modules_to_save in the base's dtype
        "not loaded": [k for k, t in written.items() if k not in loaded or not loads_as(t, loaded[k])],
    }
    if trained is not None:
        result["logits"] = caught(
            compare_logits, trained, fixed_batch_logits(model, TOKENS), plain, torch.bfloat16
        )
    return result


def tamper_cases(way: str, folder: Path) -> dict:
    """Spoil a good file in several ways; every rank must say so, and the folder must stay."""
    model = wrap(adapted("lora", torch.float32), way)
    plant(model, way)
    good, seen = folder / "good", {}
    seen["good sha"] = saving.save_adapter(model, good)["sha256"]
    last = sorted(shards.own_pieces(model))[-1]

    def spoil(name, change, **kwargs):
        bad = folder / name
        if dist.get_rank() == 0:
            bad.mkdir()
            (bad / saving.CONFIG).write_bytes((good / saving.CONFIG).read_bytes())
            tensors = load_file(good / saving.WEIGHTS)
            save_file(change(tensors), bad / saving.WEIGHTS)
        dist.barrier()
        seen[name] = caught(saving.verify_adapter, model, bad, **kwargs)

    def flip_the_last_bit(tensors):
        tensors[last].view(torch.uint8).view(-1)[-4] ^= 1  # lies on the last rank; 1e-9 as a number
        return tensors

    spoil("one bit", flip_the_last_bit)
    spoil("sign of zero", lambda tensors: {k: t + 0.0 for k, t in tensors.items()})  # -0.0 + 0.0 is 0.0
    spoil("missing", lambda tensors: without(tensors, last))
    spoil("foreign", lambda tensors: tensors | {"foreign": torch.ones(1)})
    lora_b = next(key for key in shards.own_pieces(model) if "lora_B" in key)
    spoil("zero", lambda tensors: tensors | {lora_b: torch.zeros_like(tensors[lora_b])})
    spoil("dtype", lambda tensors: {k: t.to(torch.bfloat16) for k, t in tensors.items()})
    spoil("empty", lambda tensors: {})
    if dist.get_rank() == 0:
        (folder / "cut").mkdir()
        (folder / "cut" / saving.WEIGHTS).write_bytes((good / saving.WEIGHTS).read_bytes()[:-100])
    dist.barrier()
    seen["cut"] = caught(saving.verify_adapter, model, folder / "cut")
    seen["last name"] = last
    return seen


def without(tensors: dict, name: str) -> dict:
    return {key: tensor for key, tensor in tensors.items() if key != name}


def refusal_cases(way: str, folder: Path) -> dict:
    """A bad adapter never replaces a good one."""
    seen, target = {}, folder / "adapter"
    model = wrap(adapted("lora", torch.float32), way)
    seen["untrained"] = caught(saving.save_adapter, model, folder / "untrained")
    seen["untrained, allowed"] = caught(
        saving.save_adapter, model, folder / "untrained", allow_untrained=True
    )
    plant(model, way)
    first = saving.save_adapter(model, target)["sha256"]
    piece = next(p for p in shards.own_pieces(model).values() if p.held.numel())
    keep = piece.held.clone()
    if dist.get_rank() == dist.get_world_size() - 1:  # one rank's training diverged
        piece.held.view(-1)[-1] = float("nan")
    seen["nan"] = caught(saving.save_adapter, model, target)
    piece.held.copy_(keep)
    whole_gather = saving.gather_adapter

    def wrong_gather(model, name):  # a gather that gives the first rank's slice twice
        gathered = whole_gather(model, name)
        for tensor in gathered.tensors.values():
            tensor.view(-1)[-1] = tensor.view(-1)[0]
        return gathered

    saving.gather_adapter = wrong_gather
    seen["wrong slice"] = caught(saving.save_adapter, model, target)
    saving.gather_adapter = whole_gather
    real_save = saving.save_file

    def full_disk(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    saving.save_file = full_disk
    seen["full disk"] = caught(saving.save_adapter, model, target)
    saving.save_file = real_save
    seen["still the first"] = saving.verify_adapter(model, target)["sha256"] == first
    piece.held.mul_(2)
    second = saving.save_adapter(model, target)["sha256"]
    seen["replaced"] = second != first
    seen["previous"] = saving.sha256(folder / "adapter.previous" / saving.WEIGHTS) == first
    if dist.get_rank() == 0:
        (folder / "home").mkdir()
        (folder / "home" / "thesis.txt").write_text("years of work")
    dist.barrier()
    seen["foreign folder"] = caught(saving.save_adapter, model, folder / "home")
    seen["thesis"] = (folder / "home" / "thesis.txt").exists()
    inner = shards.peft_model(model)
    seen["inner model"] = caught(saving.save_adapter, inner, folder / "inner") if inner is not model else "-"
    stray = wrap_with_stray(way)
    seen["stray"] = caught(saving.save_adapter, stray, folder / "stray")
    return seen


def wrap_with_stray(way: str):
    model = adapted("lora", torch.bfloat16)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return wrap(model, way)


def cases():
    for way in ("fsdp1", "fsdp1_orig", "fsdp2", "ddp"):
        for kind in ("lora", "dora", "modules_to_save"):
            for dtype in ("bfloat16", "float32"):
                for setting in ("FULL_STATE_DICT", "SHARDED_STATE_DICT") if "fsdp1" in way else ("-",):
                    runs = dtype == "bfloat16" and (way, kind) != (
                        "fsdp1_orig",
                        "dora",
                    )  # without a trainer's autocast the dtypes clash in the forward
                    when = "after a forward" if runs and setting != "FULL_STATE_DICT" else "before"
                    yield way, kind, dtype, setting, when
    yield "fsdp1_mixed_units", "lora", "bfloat16", "SHARDED_STATE_DICT", "after a forward"
    yield "fsdp1_mixed_units", "modules_to_save", "bfloat16", "SHARDED_STATE_DICT", "after a forward"


def main() -> None:
    folder = Path(sys.argv[1])
    number, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=world,
                            timeout=timedelta(seconds=20))  # fmt: skip
    import peft

    results = {"peft": peft.__version__}
    jobs = [("/".join(case), save_case, case) for case in cases()]
    jobs += [(f"tamper/{way}", tamper_cases, (way,)) for way in ("fsdp1", "fsdp2", "ddp")]
    jobs += [(f"refuse/{way}", refusal_cases, (way,)) for way in ("fsdp1", "fsdp1_orig", "fsdp2")]
    for index, (label, job, args) in enumerate(jobs):
        out = folder / f"case{index}"
        if job is not save_case and number == 0:
            out.mkdir()
        dist.barrier()
        try:
            results[label] = job(*args, out)
        except Exception:
            traceback.print_exc()
            results[label] = {"error": traceback.format_exc()}
    (folder / f"rank{number}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
