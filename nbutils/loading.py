"""Load a model in NF4 so that FSDP can shard it."""

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nbutils.chat import ready_for_chat


def nf4_config(storage: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """The 4-bit settings of QLoRA (NF4, double quantisation), stored so that FSDP can flatten them.

    Args:
        storage: dtype in which the packed 4-bit values are kept. FSDP 1 flattens a unit only if this equals the
            dtype of the unit's other weights; the default of bitsandbytes, uint8, cannot be flattened at all.

    Returns:
        The configuration for `from_pretrained`.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=storage,
    )


def load_nf4(model_id: str) -> PreTrainedModel:
    """Load a causal language model in NF4 with bf16 storage into host memory.

    `device_map={"": "cpu"}` matters: without a device map today's transformers puts the whole 4-bit model onto each
    rank's own GPU, before FSDP has a chance to shard it. FSDP moves one unit at a time instead.

    Args:
        model_id: a local folder or a hub id.

    Returns:
        The model on the CPU: linear layers in NF4, everything else in bf16.
    """
    return AutoModelForCausalLM.from_pretrained(
        model_id, quantization_config=nf4_config(), dtype=torch.bfloat16, device_map={"": "cpu"}
    )


def load_tokenizer(model_id: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer and give it the chat template and padding token it may lack.

    Args:
        model_id: a local folder or a hub id.

    Returns:
        A tokenizer that can render conversations and pad batches.
    """
    return ready_for_chat(AutoTokenizer.from_pretrained(model_id))
