"""Load a model in NF4 so that FSDP can shard it."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from filelock import FileLock
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AutoHfQuantizer

from nbutils.common.paths import ROOT, RUNS
from nbutils.data.templates import ready_for_chat
from nbutils.models.hub import local_folder, read_config
from nbutils.models.nf4 import nf4_config, progress, quantise_tensor, write_nf4
from nbutils.models.quantised_checkpoint import refuse_mixed, refuse_other_quantisations
from nbutils.models.safetensors_reader import BadCheckpoint, Checkpoint

# Up to this size (8B in bf16 has 16 GB) each rank quantises for itself; above, one rank writes the NF4 checkpoint and
# all of them map it, so that a machine holds one copy however many ranks it has.
IN_MEMORY_BYTES = 20e9


def load_nf4(model_id: str) -> PreTrainedModel:
    """Load a causal language model in NF4 with bf16 storage into host memory.

    A checkpoint that is NF4 already (see `python -m nbutils quantise`) is mapped and not copied: its bytes lie in the
    page cache, once for all ranks of a machine, and FSDP moves one unit at a time to the GPU. A bf16 checkpoint is
    quantised tensor by tensor through the GPU; a large one is first written in NF4 to `runs/cache` and then mapped.

    Args:
        model_id: a local folder or a hub id.

    Returns:
        The model on the CPU: linear layers in NF4, everything else in bf16.

    Raises:
        BadCheckpoint: a file or a tensor is missing or damaged, or the checkpoint is quantised in another way.
        CannotDownload: the hub does not give the model.
    """
    folder = local_folder(model_id)
    config = AutoConfig.from_pretrained(folder)
    checkpoint = Checkpoint(folder)
    if not getattr(config, "quantization_config", None):
        if checkpoint.bytes_on_disk <= IN_MEMORY_BYTES:
            return _load_bf16(checkpoint, config)
        folder = _quantised_copy(checkpoint)
        config, checkpoint = AutoConfig.from_pretrained(folder), Checkpoint(folder)
    refuse_other_quantisations(config.quantization_config, folder)
    refuse_mixed(checkpoint)
    return _load_quantised(checkpoint, config)


def quantise_checkpoint(
    model_id: str | Path, out: str | Path, device: torch.device | str | None = None
) -> int:
    """Write the NF4 checkpoint of a bf16 one, tokenizer included, so that later runs load in minutes.

    Args:
        model_id: a local folder or a hub id.
        out: a new folder; it appears under this name when it is complete.
        device: where to quantise; None takes the GPU if there is one.

    Returns:
        Bytes of the tensors that were written.

    Raises:
        BadCheckpoint: as `load_nf4`; or the checkpoint is quantised already.
        CannotDownload: the hub does not give the model.
        FileExistsError: `out` is there already.
        OSError: it cannot be written; what was begun is removed.
    """
    folder, out = local_folder(model_id), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists already. Name a new folder, or delete this one.")
    if read_config(folder).get("quantization_config"):
        raise BadCheckpoint(f"{folder} is quantised already; wanted a checkpoint in bf16.")
    checkpoint = Checkpoint(folder)
    config = AutoConfig.from_pretrained(folder)
    model = empty_model(config, pre_quantised=False)
    partial = out.with_name(out.name + ".partial")
    # Left by a try that was killed: it may hold shards that this one does not write.
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with progress(checkpoint.bytes_on_disk, "quantising") as bar:
            total = write_nf4(
                partial, config, _needed(checkpoint, model, bar), linear_weights(model), device or _device()
            )
        if (folder / "tokenizer_config.json").exists():
            AutoTokenizer.from_pretrained(folder).save_pretrained(partial)
        partial.rename(out)
    except BaseException:  # an interrupt too
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return total


def empty_model(config: PretrainedConfig, pre_quantised: bool) -> PreTrainedModel:
    """Build the model without its weights, its linear layers (the output head apart) as `Linear4bit`.

    Args:
        config: of the model.
        pre_quantised: whether the weights to come are packed already.

    Returns:
        A model whose parameters are on the meta device: shapes without memory. Its buffers are real.
    """
    quantizer = AutoHfQuantizer.from_config(nf4_config(), pre_quantized=pre_quantised)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    quantizer.preprocess_model(model, dtype=torch.bfloat16, device_map={"": "cpu"})
    model.config.quantization_config = quantizer.quantization_config
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return model.eval()


def linear_weights(model: PreTrainedModel) -> set[str]:
    """Names of the weights that are, or will be, NF4.

    Args:
        model: from `empty_model`.
    """
    return {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)
    }


def _load_bf16(checkpoint: Checkpoint, config: PretrainedConfig) -> PreTrainedModel:
    model = empty_model(config, pre_quantised=False)
    to_quantise, device = linear_weights(model), _device()
    with progress(checkpoint.bytes_on_disk, "loading") as bar:
        for name, tensor in _needed(checkpoint, model, bar):
            if name in to_quantise:
                packed, state = quantise_tensor(tensor.to(torch.bfloat16), device)
                parts = {part: value.cpu() for part, value in state.as_dict(packed=True).items()}
                _fill_linear(model, name, packed.cpu(), parts)
            else:  # cloned: as a view of the mapped file it would follow the file's fate
                _set(model, name, tensor.to(torch.bfloat16, copy=True))
    model.tie_weights()
    return model


def _load_quantised(checkpoint: Checkpoint, config: PretrainedConfig) -> PreTrainedModel:
    model = empty_model(config, pre_quantised=True)
    packed = linear_weights(model)
    for name, tensor in _needed(checkpoint, model):
        if name in packed:
            parts = {
                part.removeprefix(f"{name}."): checkpoint.read(part) for part in checkpoint.parts_of(name)
            }
            parts.pop(name, None)
            if not parts:
                raise BadCheckpoint(
                    f"{name} has no quantisation state ({name}.absmax and so on) in {checkpoint.folder}."
                )
            _fill_linear(model, name, _stored_as_bf16(tensor), parts)
        else:
            _set(model, name, tensor.to(torch.bfloat16))
    model.tie_weights()
    return model


def _needed(checkpoint: Checkpoint, model: PreTrainedModel, bar=None) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors the model needs, in the order of the files, so that each is opened once."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    packed = linear_weights(model) if model.hf_quantizer.pre_quantized else set()
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    if missing := sorted(set(shapes) - set(checkpoint.files)):
        checkpoint.read(missing[0])  # raises, and names it
    for name in checkpoint.names():
        if name not in shapes:
            continue
        tensor = checkpoint.read(name)
        if name not in packed and tensor.shape != shapes[name]:
            raise BadCheckpoint(
                f"{name} has shape {tuple(tensor.shape)} in {checkpoint.folder}; its config.json wants "
                f"{tuple(shapes[name])}."
            )
        yield name, tensor
        if bar is not None:
            bar.update(tensor.numel() * tensor.element_size())


def _stored_as_bf16(packed: torch.Tensor) -> torch.Tensor:
    """The same packed bytes as bf16, whatever dtype they are stored in: uint8 is what most of the hub has."""
    return packed.contiguous().view(-1).view(torch.bfloat16).view(-1, 1)


def _quantised_copy(checkpoint: Checkpoint) -> Path:
    """The NF4 copy of a large bf16 checkpoint in the root's `runs/cache`, written by whichever rank comes first."""
    files = sorted(set(checkpoint.files.values()))
    stats = [(file, (checkpoint.folder / file).stat()) for file in files]
    facts = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
    out = ROOT / RUNS / "cache" / f"nf4-{digest}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out}.lock"):  # the other ranks wait here; a barrier of the process group would time out
        if not out.exists():
            quantise_checkpoint(checkpoint.folder, out)
    return out


def _device() -> torch.device:
    """Where to quantise: this rank's GPU, or the CPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def _fill_linear(model: nn.Module, name: str, packed: torch.Tensor, parts: dict[str, torch.Tensor]) -> None:
    module = model.get_submodule(name.removesuffix(".weight"))
    module.weight = bnb.nn.Params4bit.from_prequantized(packed, parts, device="cpu", module=module)


def _set(model: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    # As `from_pretrained` leaves it: a float asks for gradients until the prep freezes it.
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=value.is_floating_point()))


def load_tokenizer(model_id: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer and give it the chat template and padding token it may lack.

    Args:
        model_id: a local folder or a hub id.

    Returns:
        A tokenizer that can render conversations and pad batches.
    """
    return ready_for_chat(AutoTokenizer.from_pretrained(model_id))
