"""FSDP inside a notebook's own process: a group of one, the tiny Llama with an adapter, a sentence and its loss."""

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from nbutils.common.paths import ROOT
from nbutils.launching.rehearsal import keep_four_bit_weights_in_order
from nbutils.models.loading import load_tokenizer
from nbutils.models.nf4 import nf4_config
from nbutils.models.tiny import tiny_base

SENTENCE = (
    "A shard is the part of a weight that one rank keeps. Before a layer runs, the ranks gather its parts. "
)


def begin_alone() -> Path:
    """Open a process group of one, so that FSDP wraps models right here, and keep 4-bit values as they are packed.

    Returns:
        The folder of the tiny base, relative to the root.
    """
    warnings.filterwarnings(
        "ignore", ".*since the world size is 1"
    )  # nothing to shard here; the units are real
    keep_four_bit_weights_in_order()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return tiny_base().relative_to(ROOT)


def tiny_in_nf4(storage: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The tiny Llama in NF4, its packed values kept in tensors of dtype `storage`, everything else in bf16."""
    how = {"quantization_config": nf4_config(storage), "dtype": torch.bfloat16, "device_map": {"": "cpu"}}
    return AutoModelForCausalLM.from_pretrained(tiny_base(), **how)


def with_adapter(
    model: PreTrainedModel, seed: int, dtype: torch.dtype = torch.bfloat16, past_first_step: bool = False
) -> PeftModel:
    """Add a LoRA adapter of rank 8 on all linear layers, the same one for the same seed.

    Args:
        model: changed in place.
        seed: of the adapter's first values.
        dtype: of the adapter.
        past_first_step: give B values too, as after a step; a fresh B is zero, and then A has no gradient.
    """
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
        if past_first_step and "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.02)
    return model


def sentence() -> torch.Tensor:
    """Three times the same sentence as tokens, shape (1, tokens)."""
    return load_tokenizer(str(tiny_base()))(SENTENCE * 3, return_tensors="pt")["input_ids"]


def loss_of(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Mean loss of the tokens (rows, length) in nats, without gradients."""
    with torch.no_grad():
        return model(input_ids=tokens, labels=tokens).loss.item()
