"""What NF4 costs a real model, and what changed bytes do to it: the silent corruption of notebook 02b on real weights.

Run as: python benchmarks/smollm2_quantisation.py    (writes benchmarks/results/smollm2_quantisation.json; minutes)

The changes are made by hand on the packed bytes, one process, no FSDP. What CUDA's copy does is written out: each value
that is NaN in the storage dtype becomes one and the same NaN (recorded for bf16 in gather_copy.json).
"""

import torch
from bitsandbytes.nn import Linear4bit
from smollm2_losses import begin, in_bf16, loss, prose, write
from transformers import AutoModelForCausalLM

from nbutils.models.nf4 import nf4_config

BF16, FP16 = torch.bfloat16, torch.float16


def in_nf4(base, storage: torch.dtype):
    """The real base in NF4, packed bytes kept in tensors of this dtype."""
    config = nf4_config(storage)
    return AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=BF16, device_map={"": "cpu"}
    )


def as_they_are(values: torch.Tensor) -> torch.Tensor:
    """Nothing changes."""
    return values


def copied_as_on_cuda(values: torch.Tensor) -> torch.Tensor:
    """Every value that is NaN comes out as the same NaN."""
    copied = values.clone()
    copied.view(torch.int16)[torch.isnan(values)] = 0x7FFF
    return copied


def cast(to: torch.dtype):
    """A gather in another dtype: the numbers are rounded, and then read as packed bytes."""

    def change(values: torch.Tensor) -> torch.Tensor:
        return values.to(to).view(values.dtype)

    return change


CASES = [
    ("bf16 storage, as it is", BF16, as_they_are),
    ("bf16 storage, copied as on CUDA", BF16, copied_as_on_cuda),
    ("fp16 storage, as it is", FP16, as_they_are),
    ("fp16 storage, copied as on CUDA", FP16, copied_as_on_cuda),
    ("bf16 storage, cast to fp16", BF16, cast(FP16)),
    ("fp16 storage, cast to bf16", FP16, cast(BF16)),
]


def change_all(model, change) -> float:
    """Let every packed weight go through the change; the share of all packed bytes that came out as others."""
    changed = held = 0
    for module in model.modules():
        if isinstance(module, Linear4bit):
            before = module.weight.data
            after = change(before)
            changed += (before.view(torch.uint8) != after.view(torch.uint8)).sum().item()
            held += before.numel() * before.element_size()
            module.weight.data = after
    return changed / held


def main() -> None:
    base, tokenizer, held_out = begin()
    texts = prose(tokenizer)

    def losses(model) -> dict:
        return {
            "held_out_answers": round(loss(model, held_out, at_once=12), 4),
            "prose": round(loss(model, texts), 4),
        }

    in_full = losses(in_bf16(base))
    rows = []
    for name, storage, change in CASES:
        model = in_nf4(base, storage)
        share = change_all(model, change)
        rows.append({"case": name, "bytes_changed_share": share, **losses(model)})
        print(rows[-1], flush=True)
    guessing = round(torch.log(torch.tensor(float(model.config.vocab_size))).item(), 4)
    write(
        "smollm2_quantisation",
        "python benchmarks/smollm2_quantisation.py",
        "NF4's price on SmolLM2-135M-Instruct, and its loss after silent changes of the packed bytes; nats a token",
        held_out_tokens=sum(int((labels[0, 1:] >= 0).sum()) for _, labels in held_out),
        prose_tokens=sum(ids.shape[1] - 1 for ids, _ in texts),
        guessing_all_tokens_alike=guessing,
        bf16=in_full,
        nf4=rows,
    )


if __name__ == "__main__":
    main()
