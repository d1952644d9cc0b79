"""Does the adapter's dtype matter to the loss? A bf16 and an fp32 adapter over the same bf16-stored NF4 base.

Run as: python benchmarks/adapter_dtype.py    (writes benchmarks/results/adapter_dtype.json; minutes on two CPU cores)

One process, real FSDP 1, PEFT's wrap policy, gathers in bf16. The fp32 adapter computes in bf16 under autocast, and its
optimizer steps in fp32: what `bf16=True` does under FSDP 1. The bf16 adapter steps in bf16: what `bf16=False` does.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from transformers import set_seed

from nbutils.common.provenance import provenance
from nbutils.data.rows import load_conversations
from nbutils.launching.rehearsal import keep_four_bit_weights_in_order
from nbutils.models.loading import load_nf4, load_tokenizer
from nbutils.models.tiny import tiny_base
from nbutils.training.prep import prepare_for_fsdp_qlora

ROWS, LENGTH = 2, 128  # a batch is (ROWS, LENGTH) tokens
WINDOW = 10  # steps averaged for one point of the curve


def batches(source: str, tokenizer) -> torch.Tensor:
    """All conversations of a file as windows of tokens, shape (windows, LENGTH)."""
    ids = []
    for conversation in load_conversations(source):
        ids += tokenizer.apply_chat_template(conversation.turns, return_dict=True)["input_ids"]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def sharded(base: Path, adapter: torch.dtype, seed: int):
    """The tiny base in NF4 with an adapter of this dtype, wrapped by FSDP 1."""
    set_seed(seed)
    model = prepare_for_fsdp_qlora(load_nf4(str(base)), activation_checkpointing=False)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter)
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model),
        mixed_precision=MixedPrecision(torch.bfloat16, torch.bfloat16, torch.bfloat16),
        device_id=torch.device("cpu"),
    )


def run(
    base: Path,
    train: torch.Tensor,
    heldout: torch.Tensor,
    adapter: torch.dtype,
    rate: float,
    seed: int,
    steps: int,
):
    """Train, and return the curve, the held-out loss, and the bytes of adapter and optimizer state."""
    model = sharded(base, adapter, seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=adapter == torch.float32)
    order = torch.Generator().manual_seed(seed)
    losses = []
    model.train()
    for _ in range(steps):
        batch = train[torch.randint(len(train), (ROWS,), generator=order)]
        with autocast:
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad(), autocast:
        held = [
            model(input_ids=part, labels=part).loss.item()
            for part in heldout.split(ROWS)
            if len(part) == ROWS
        ]
    states = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    return {
        "adapter": str(adapter).removeprefix("torch."),
        "learning_rate": rate,
        "seed": seed,
        "training_loss": [round(sum(losses[i : i + WINDOW]) / WINDOW, 4) for i in range(0, steps, WINDOW)],
        "heldout_loss": round(sum(held) / len(held), 4),
        "adapter_bytes": sum(p.numel() * p.element_size() for p in trained),
        "optimizer_bytes": sum(value.numel() * value.element_size() for value in states),
        "dtype_after_wrapping": sorted({str(p.dtype).removeprefix("torch.") for p in trained}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4, 1e-3])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/adapter_dtype.json"))
    settings = parser.parse_args()
    origin = provenance("python benchmarks/adapter_dtype.py")

    keep_four_bit_weights_in_order()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    base = tiny_base()
    tokenizer = load_tokenizer(str(base))
    train = batches("data/instructions/train.jsonl", tokenizer)
    heldout = batches("data/instructions/heldout.jsonl", tokenizer)
    runs = []
    for rate in settings.rates:
        for seed in settings.seeds:
            for adapter in (torch.bfloat16, torch.float32):
                runs.append(run(base, train, heldout, adapter, rate, seed, settings.steps))
                print({key: value for key, value in runs[-1].items() if key != "training_loss"}, flush=True)
    record = {
        "what": "bf16 and fp32 LoRA adapter over the tiny base in NF4, FSDP 1 on one process",
        **origin,
        "machine": f"{origin['machine']['cpus']} cores of {origin['machine']['cpu']}, no GPU",  # as lesson 03 says it
        "steps": settings.steps,
        "batch": [ROWS, LENGTH],
        "steps_logged": list(range(WINDOW, settings.steps + 1, WINDOW)),
        "runs": runs,
    }
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
