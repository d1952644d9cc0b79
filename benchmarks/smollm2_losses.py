"""What the records of the real small model measure: losses on answers and on prose; and how a record is written."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from nbutils.common.paths import ROOT
from nbutils.common.provenance import provenance
from nbutils.data.labels import IGNORED
from nbutils.data.rows import load_conversations
from nbutils.data.training_rows import rows_to_learn
from nbutils.launching.rehearsal import keep_four_bit_weights_in_order
from nbutils.models.loading import load_tokenizer
from nbutils.models.smollm2 import smollm2_base

RESULTS = ROOT / "benchmarks" / "results"
HELD_OUT = "data/instructions/heldout.jsonl"
LENGTH = 256  # tokens of a conversation; what is longer is cut, as in configs/params/smollm2_135m.yaml


def begin():
    """Folder, tokenizer and held-out rows of the real base; 4-bit weights keep their order on this CPU."""
    keep_four_bit_weights_in_order()
    base = smollm2_base()
    tokenizer = load_tokenizer(str(base))
    return base, tokenizer, answers(tokenizer)


def questions_and_answers() -> list[tuple[list[dict], dict]]:
    """The held-out conversations, once for each answer: the turns before it, and its own turn."""
    lines = (ROOT / HELD_OUT).read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    return [(chat[:n], turn) for chat in chats for n, turn in enumerate(chat) if turn["role"] == "assistant"]


def answers(tokenizer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each conversation as ids and labels, both (1, tokens): labelled as the script labels what it learns."""
    rows = rows_to_learn(load_conversations(str(ROOT / HELD_OUT)), tokenizer, LENGTH)
    return [(torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])) for row in rows]


def prose(tokenizer, count: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The first essays of data/prose, one row each; every token is labelled."""
    rows = []
    for essay in sorted((ROOT / "data" / "prose").glob("*.md"))[:count]:
        ids = tokenizer(essay.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
        rows.append((ids, ids.clone()))
    return rows


@torch.no_grad()
def loss(model, rows: list[tuple[torch.Tensor, torch.Tensor]], at_once: int = 1) -> float:
    """Mean loss in nats a token over all labelled tokens of all rows; a long row counts for its tokens."""
    model.eval()
    total, tokens = 0.0, 0
    by_length = sorted(rows, key=lambda row: row[0].shape[1])
    for start in range(0, len(rows), at_once):
        ids, labels = (
            padded(side, fill) for side, fill in zip(zip(*by_length[start : start + at_once]), (0, IGNORED))
        )
        # Padding stands on the right, where a causal model does not see it.
        predicted, wanted = model(input_ids=ids).logits[:, :-1], labels[:, 1:]
        kept = wanted != IGNORED
        lost = torch.nn.functional.cross_entropy(predicted[kept].float(), wanted[kept], reduction="sum")
        total, tokens = total + lost.item(), tokens + int(kept.sum())
    return total / tokens


def padded(rows: tuple[torch.Tensor, ...], fill: int) -> torch.Tensor:
    """Rows of shape (1, tokens) below each other, filled up on the right: (rows, most tokens)."""
    most = max(row.shape[1] for row in rows)
    return torch.cat([torch.nn.functional.pad(row, (0, most - row.shape[1]), value=fill) for row in rows])


def in_bf16(folder: Path):
    """A checkpoint in bf16, unquantised."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def write(name: str, command: str, what: str, commit: str = "", **found) -> None:
    """One record in benchmarks/results, with where it comes from; written whole or not at all."""
    record = {"what": what, **provenance(command, commit), **found}
    partial = RESULTS / f".{name}.part"
    partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.rename(RESULTS / f"{name}.json")
    print(json.dumps(found, indent=1, ensure_ascii=False))
