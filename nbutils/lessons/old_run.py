"""What an old run leaves, and what can be checked in it: a short training, its log and its adapter."""

from collections.abc import Callable

import torch
from peft import PeftModel, get_peft_model_state_dict

from nbutils.data.rows import load_conversations
from nbutils.lessons.one_process import loss_of
from nbutils.models.loading import load_tokenizer
from nbutils.models.tiny import tiny_base

LENGTH = 128  # tokens of a row
BATCH = 2
RATE = 3e-3


def rows_of(source: str, first: int, count: int) -> torch.Tensor:
    """Conversations of a file behind each other, cut into rows.

    Args:
        source: a JSONL file of conversations.
        first: row to begin with.
        count: rows.

    Returns:
        Token ids, shape (count, LENGTH).
    """
    tokenizer, ids = load_tokenizer(str(tiny_base())), []
    for conversation in load_conversations(source):
        ids += tokenizer.apply_chat_template(conversation.turns, return_dict=True)["input_ids"]
        if len(ids) >= (first + count) * LENGTH:
            break
    return torch.tensor(ids[first * LENGTH : (first + count) * LENGTH]).view(count, LENGTH)


def short_run(model: PeftModel, train: torch.Tensor, held_out: torch.Tensor, steps: int) -> tuple[dict, dict]:
    """Train the adapter, and leave what a run leaves: a log and an adapter.

    Args:
        model: base and fresh adapter.
        train: rows, (rows, LENGTH).
        held_out: rows, (rows, LENGTH).
        steps: of the optimizer, each on BATCH rows.

    Returns:
        The log, with the held-out losses `before` and `after`, and the adapter's tensors.
    """
    log = {"before": loss_of(model, held_out)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for step in range(steps):
        batch = train[torch.arange(step * BATCH, (step + 1) * BATCH) % len(train)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    log["after"] = loss_of(model, held_out)
    return log, {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}


def size_of(adapter: dict[str, torch.Tensor]) -> float:
    """The length of all of an adapter's tensors as one vector."""
    return torch.cat([value.flatten().float() for value in adapter.values()]).norm().item()


def three_old_runs(
    load: Callable[[], torch.nn.Module], spoil: Callable
) -> dict[str, tuple[torch.Tensor, float]]:
    """Name of a run -> its held-out rows, and the loss that it logged before its first step; one base was spoiled.

    Args:
        load: the exact model.
        spoil: changes the packed values of a model.
    """
    runs = {}
    for place, name in enumerate(("monday", "tuesday", "wednesday")):
        model, rows = load(), rows_of("data/instructions/heldout.jsonl", 4 * place, 4)
        if place == 1:
            spoil(model)
        runs[name] = (rows, loss_of(model, rows))
    return runs
