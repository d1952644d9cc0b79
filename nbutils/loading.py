"""Load a model in NF4 so that FSDP can shard it."""

from pathlib import Path

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
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

from nbutils.chat import ready_for_chat
from nbutils.checkpoint import Checkpoint
from nbutils.offload import spare_host_memory
from nbutils.quantise import nf4_config

__all__ = ["empty_model", "linear_weights", "load_nf4", "load_tokenizer", "nf4_config"]


def load_nf4(model_id: str) -> PreTrainedModel:
    """Load a causal language model in NF4 with bf16 storage into host memory.

    A checkpoint that is NF4 already (see `nbutils.quantise`) is mapped and not copied: its bytes lie in the page cache,
    once for all ranks of a machine, and FSDP moves one unit at a time to the GPU.

    Args:
        model_id: a local folder or a hub id.

    Returns:
        The model on the CPU: linear layers in NF4, everything else in bf16.
    """
    spare_host_memory()
    folder = Path(model_id)
    config = AutoConfig.from_pretrained(model_id)
    if folder.is_dir() and getattr(config, "quantization_config", None):
        return _load_quantised(folder, config)
    return AutoModelForCausalLM.from_pretrained(
        model_id, quantization_config=nf4_config(), dtype=torch.bfloat16, device_map={"": "cpu"}
    )


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


def _load_quantised(folder: Path, config: PretrainedConfig) -> PreTrainedModel:
    model = empty_model(config, pre_quantised=True)
    checkpoint = Checkpoint(folder)
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            _fill_linear(module, f"{name}.weight", checkpoint)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and not isinstance(parameter, bnb.nn.Params4bit):
            value = checkpoint.read(name).to(torch.bfloat16)
            _set(model, name, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    return model


def _fill_linear(module: bnb.nn.Linear4bit, name: str, checkpoint: Checkpoint) -> None:
    parts = {
        part.removeprefix(f"{name}."): checkpoint.read(part)
        for part in checkpoint.parts_of(name)
        if part != name
    }
    module.weight = bnb.nn.Params4bit.from_prequantized(
        checkpoint.read(name), parts, device="cpu", module=module
    )


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)


def load_tokenizer(model_id: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer and give it the chat template and padding token it may lack.

    Args:
        model_id: a local folder or a hub id.

    Returns:
        A tokenizer that can render conversations and pad batches.
    """
    return ready_for_chat(AutoTokenizer.from_pretrained(model_id))
