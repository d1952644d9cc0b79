"""Does it matter that FSDP 1 rounds the rotary frequencies to bf16? Loss on ordinary text at growing lengths.

Run as: python benchmarks/smollm2_rotary.py    (writes benchmarks/results/smollm2_rotary.json; minutes)

Notebook 03 shows how far the angles are off. This shows what a trained model makes of it: SmolLM2-135M-Instruct in
bf16, the essays of data/prose one after the other, cut into windows, and the loss of the tokens in each window's last
quarter, which look farthest back.
"""

import torch
from smollm2_losses import begin, in_bf16, write

from nbutils.common.paths import ROOT

LENGTHS = (512, 2048, 8192)
TEXT = 2 * 8192  # tokens


@torch.no_grad()
def last_quarter_loss(model, ids: torch.Tensor, length: int) -> float:
    """Mean loss over the last quarters of all windows; ids (tokens,)."""
    total, tokens = 0.0, 0
    for window in ids[: len(ids) // length * length].view(-1, length):
        hidden = model.model(input_ids=window[None]).last_hidden_state[0]
        begin = length - length // 4 - 1
        logits = model.lm_head(hidden[begin:-1])  # the whole window's would be 1.6 GB at 8,192 tokens
        total += torch.nn.functional.cross_entropy(
            logits.float(), window[begin + 1 :], reduction="sum"
        ).item()
        tokens += length // 4
    return total / tokens


def main() -> None:
    base, tokenizer, _ = begin()
    text = "\n\n".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "data" / "prose").glob("*.md")))
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0, :TEXT]
    model = in_bf16(base).eval()
    rotary = model.model.rotary_emb
    exact = rotary.inv_freq.clone()
    rounded = exact.bfloat16().float()
    rows = []
    for length in LENGTHS:
        losses = {}
        for name, frequencies in (("exact", exact), ("rounded_to_bf16", rounded)):
            rotary.inv_freq.copy_(frequencies)
            losses[name] = round(last_quarter_loss(model, ids, length), 4)
        rows.append({"tokens": length, "windows": len(ids) // length, **losses})
        print(rows[-1], flush=True)
    write(
        "smollm2_rotary",
        "python benchmarks/smollm2_rotary.py",
        "SmolLM2-135M-Instruct on prose with exact rotary frequencies, and with frequencies rounded to bf16",
        tokens_of_text=len(ids),
        worst_angle_error_at_8192_tokens=round(8192 * (exact - rounded).abs().max().item(), 3),
        rows=rows,
    )


if __name__ == "__main__":
    main()
