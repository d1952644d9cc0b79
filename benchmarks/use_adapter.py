"""Use a trained adapter where it was trained: the 4-bit base and the adapter spread over several capped GPUs.

Run as: python benchmarks/use_adapter.py --model NF4_FOLDER --adapter FOLDER --cap-gib 22.5 --commit SHA --out FILE

Plain transformers and PEFT do the work, as a user would: a `device_map` puts half of the layers on each card.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nbutils.common.paths import go_to_root
from nbutils.common.provenance import provenance
from nbutils.launching.measured_run import set_cap

GIB = 2**30
PROMPT = "How do I water a plant that looks dry?"


def halves(layers: int, gpus: int) -> dict[str, int | str]:
    """Where each module goes: the same number of layers on each card, the head on the last."""
    if not gpus:
        return {"": "cpu"}
    first, last = (
        {"model.embed_tokens": 0, "model.rotary_emb": 0},
        {"model.norm": gpus - 1, "lm_head": gpus - 1},
    )
    return first | {f"model.layers.{n}": n * gpus // layers for n in range(layers)} | last


def spread(model: str, adapter: str) -> PeftModel:
    """The base over all GPUs, and the adapter on top of it."""
    layers = AutoConfig.from_pretrained(model).num_hidden_layers
    where = halves(layers, torch.cuda.device_count())
    base = AutoModelForCausalLM.from_pretrained(model, device_map=where, dtype=torch.bfloat16)
    return PeftModel.from_pretrained(base, adapter).eval()


def timed_answer(model: PeftModel, tokenizer, tokens: int) -> tuple[str, float]:
    """An answer of exactly so many tokens, and tokens a second."""
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    began = time.monotonic()
    out = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    seconds = time.monotonic() - began
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]), tokens / seconds


def main() -> None:
    """Load, answer with and without the adapter, and write what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder in NF4")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--cap-gib", type=float)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    go_to_root()
    gpus = range(torch.cuda.device_count())
    for gpu in gpus if options.cap_gib else ():
        set_cap(options.cap_gib, gpu)
    began = time.monotonic()
    model = spread(options.model, options.adapter)
    load_seconds = time.monotonic() - began
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    timed_answer(model, tokenizer, 4)  # the first call pays for compiling and loading kernels
    adapted, speed = timed_answer(model, tokenizer, options.tokens)
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    with torch.no_grad():
        with_adapter = model(**inputs).logits
        with model.disable_adapter():
            without = model(**inputs).logits
    placed: dict[str, int] = {}
    for device in getattr(model.base_model.model, "hf_device_map", {"": "cpu"}).values():
        placed[str(device)] = placed.get(str(device), 0) + 1
    result = {
        "what": "an adapter used at full size: 4-bit base and adapter spread over the GPUs; random weights",
        **provenance(
            f"python benchmarks/use_adapter.py --model FOLDER --adapter FOLDER --cap-gib {options.cap_gib}",
            options.commit,
        ),
        "config": {
            "layers": model.config.num_hidden_layers,
            "cap_gib": options.cap_gib,
            "modules_on": placed,
        },
        "load_seconds": round(load_seconds, 1),
        "tokens_per_second": round(speed, 2),
        "gpu_peak_bytes": [torch.cuda.max_memory_allocated(gpu) for gpu in gpus],
        "gpu_reserved_bytes": [torch.cuda.max_memory_reserved(gpu) for gpu in gpus],
        "largest_logit_difference_to_the_base": (with_adapter - without).abs().max().item(),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in list(result)[6:]}, indent=1))
    print("answers, of random weights:", repr(adapted[:60]))


if __name__ == "__main__":
    main()
