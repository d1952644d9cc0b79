"""How much of an adapter is left in the forward pass, whose sums are rounded to bf16.

Run as: python benchmarks/adapter_rounding.py    (a quarter of an hour on two cores)

The frozen product of a layer is rounded to bf16, then the adapter's small product is added, and the sum is rounded
again. What is less than half a unit in the last place is lost. Here the same weights are also computed in fp32, where
nothing is lost: after each of the first steps with random weights, as a dry run takes them, and on the real small
model. Writes benchmarks/results/adapter_rounding.json.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, PeftModel, get_peft_model
from smollm2_losses import LENGTH, begin, loss, padded, write

from nbutils.common.paths import ROOT
from nbutils.data.labels import IGNORED
from nbutils.data.rows import load_conversations
from nbutils.data.training_rows import rows_to_learn
from nbutils.launching.random_weights import prepare
from nbutils.models.loading import load_nf4
from nbutils.planning.shapes import shape_of
from nbutils.training.compiled_layers import compile_layers
from nbutils.training.prep import prepare_for_fsdp_qlora
from nbutils.training.tiled_mlp import tile_mlps

LAYERS, TOKENS, STEPS = 8, 128, 4  # of the random weights, in the width of Llama 3.1 8B
RATES, LOOK, ROWS, HELD_OUT = (2e-4, 3e-3), (1, 5, 20, 39), 8, 20  # of the real small model


def with_adapter(folder: Path) -> PeftModel:
    """NF4 and a fresh adapter in bf16, as the script makes it."""
    model = prepare_for_fsdp_qlora(load_nf4(str(folder)), activation_checkpointing=False)
    torch.manual_seed(0)
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


def in_fp32(model: PeftModel) -> PeftModel:
    """The same values, computed in fp32; the 4-bit weights stay as they are."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.quant_state.dtype = torch.float32, torch.float32
    for parameter in model.parameters():
        if not isinstance(parameter, Params4bit):
            parameter.data = parameter.data.float()
    return model


def follow(model: PeftModel, leader: PeftModel) -> PeftModel:
    """The leader's adapter in another model of the same base."""
    trained = {name: p.data for name, p in leader.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.data.copy_(trained[name])
    return model


def compiled(folder: Path, tiles: int = 0) -> PeftModel:
    model = with_adapter(folder)
    compile_layers(model)
    if tiles:
        tile_mlps(model, tiles)
    return model


def young() -> list[dict]:
    """The loss before each step of an adapter of random weights, one row of eight words: in each way to compute it."""
    folder = prepare(replace(shape_of("llama31_8b"), layers=LAYERS))
    leader = with_adapter(folder)
    ways = {
        "PEFT's sums": leader,
        "compiled": compiled(folder),
        "compiled, MLP in tiles": compiled(folder, 4),
        "fp32": in_fp32(with_adapter(folder)),
    }
    ids = (torch.arange(TOKENS) % 8 + 5)[None]
    optimizer, found = adam(leader, 1e-4), []
    for step in range(STEPS):
        losses = {}
        for way, model in ways.items():
            made = follow(model, leader)(input_ids=ids, labels=ids, use_cache=False).loss
            losses[way] = round(made.item(), 4)
            if model is leader:
                made.backward()
        found.append({"steps": step, "loss": losses})
        print(found[-1], flush=True)
        optimizer.step()
        optimizer.zero_grad()
    return found


def adam(model: PeftModel, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)


def batches(tokenizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels of the training rows, one pass."""
    rows = rows_to_learn(load_conversations(str(ROOT / "data/instructions/train.jsonl")), tokenizer, LENGTH)
    sides = [(torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])) for row in rows]
    for start in range(0, len(sides) - ROWS + 1, ROWS):
        yield tuple(padded(side, fill) for side, fill in zip(zip(*sides[start : start + ROWS]), (0, IGNORED)))


def real(rate: float) -> dict:
    """Held-out losses of the real small model while it is trained in bf16: with sums in bf16, and in fp32."""
    base, tokenizer, held_out = begin()
    leader, exact = with_adapter(base), in_fp32(with_adapter(base))
    rows, optimizer, found = held_out[:HELD_OUT], adam(leader, rate), []

    def look(step: int) -> None:
        losses = {"bf16": loss(leader, rows, 10), "fp32": loss(follow(exact, leader), rows, 10)}
        found.append({"steps": step, "loss": {name: round(value, 4) for name, value in losses.items()}})
        print(rate, found[-1], flush=True)

    look(0)
    for step, (ids, labels) in enumerate(batches(tokenizer), 1):
        leader.train()
        leader(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in LOOK:
            look(step)
    return {"learning_rate": rate, "held_out": found}


def main() -> None:
    """Measure both and write the record."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    begin()
    write(
        "adapter_rounding",
        "python benchmarks/adapter_rounding.py",
        f"Losses at the same weights, computed in bf16 and in fp32: {LAYERS} layers of Llama 3.1 8B's width with "
        f"random weights, and SmolLM2-135M-Instruct with {HELD_OUT} held-out conversations; nats a token",
        random_weights=young(),
        smollm2=[real(rate) for rate in RATES],
    )


if __name__ == "__main__":
    main()
