"""The tiny base as a base model comes from the hub: no chat template, no padding token, a begin token put by itself.

Run as: `python -m nbutils.models.tiny_plain` (prints the folder, to be given as a model).

Llama 3.1 70B comes so, and its rows are rendered with `PLAIN_TEMPLATE`. The tiny base has a template of its own, like
an Instruct model: a rehearsal with it alone would never show what happens to a base model's rows.
"""

import os
import shutil
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from nbutils.common.paths import from_here
from nbutils.models.tiny import CACHE, tiny_base, tiny_config

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


def tiny_plain(cache: Path = CACHE) -> Path:
    """Return the folder of the tiny base without a chat template, and make it first if it is not there.

    The weights are those of `tiny_base`, linked; the end token is the end of a text, not of a turn.

    Args:
        cache: folder that holds made models.

    Returns:
        A folder that `from_pretrained` reads.
    """
    base = tiny_base(cache)
    folder = cache / f"{base.name}-plain"
    if not folder.exists():
        partial = cache / f"{folder.name}.{os.getpid()}.part"
        shutil.copytree(base, partial, copy_function=os.link)
        for file in [*partial.glob("tokenizer*"), *partial.glob("*.jinja"), *partial.glob("*config.json")]:
            file.unlink(missing_ok=True)  # a link to the other model's file
        tokenizer = as_base_model(AutoTokenizer.from_pretrained(base))
        tokenizer.save_pretrained(partial)
        config = tiny_config()
        config.dtype, config.eos_token_id = torch.bfloat16, tokenizer.eos_token_id
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(partial)
        GenerationConfig.from_model_config(config).save_pretrained(partial)
        if folder.exists():  # another process was faster
            shutil.rmtree(partial)
        else:
            partial.rename(folder)
    return folder


def as_base_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Make a tokenizer what Llama 3.1's is without Instruct; changed in place, and returned."""
    tokenizer.chat_template = tokenizer.pad_token = None
    tokenizer.eos_token = END
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN} $B",
        special_tokens=[(BEGIN, tokenizer.convert_tokens_to_ids(BEGIN))],
    )
    return tokenizer


if __name__ == "__main__":
    print(from_here(tiny_plain()))
