"""What the trainer's batches are made of: padded rows, or packs of rows."""

import random
from dataclasses import dataclass

from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars


@dataclass(frozen=True)
class Batches:
    """One epoch of batches.

    Args:
        rows: rows or packs that the trainer takes one by one.
        steps: optimizer steps.
        tokens: what is computed in all of them, padding included.
        fill: which share of `tokens` is text, 0 to 1.
    """

    rows: int
    steps: int
    tokens: int
    fill: float


def padded(lengths: list[int], rows_a_rank: int, ranks: int, accumulation: int = 1, seed: int = 0) -> Batches:
    """One epoch of rows as they come: each rank pads its rows to the longest of them.

    Args:
        lengths: tokens of each row.
        rows_a_rank: rows a rank and forward pass.
        ranks: how many ranks.
        accumulation: forward passes a step.
        seed: of the order.
    """
    order = list(lengths)
    random.Random(seed).shuffle(order)
    batches = [order[start : start + rows_a_rank] for start in range(0, len(order), rows_a_rank)]
    # All ranks wait for the longest rows of the same step.
    together = [batches[start : start + ranks] for start in range(0, len(batches), ranks)]
    tokens = sum(max(map(max, step)) * sum(map(len, step)) for step in together)
    return Batches(len(lengths), -(-len(together) // accumulation), tokens, sum(lengths) / max(tokens, 1))


def packed(
    lengths: list[int], max_length: int, packs_a_rank: int, ranks: int, accumulation: int = 1
) -> Batches:
    """One epoch of packs, as TRL makes them (`packing_strategy: bfd`): whole rows, best fit, longest first.

    Args:
        lengths: tokens of each row, none longer than `max_length`.
        max_length: tokens of a pack.
        packs_a_rank: packs a rank and forward pass.
        ranks: how many ranks.
        accumulation: forward passes a step.
    """
    packs = packs_of(lengths, max_length)
    steps = -(-len(packs) // (packs_a_rank * ranks * accumulation))
    # A batch of packs is one long row without padding; what a pack leaves empty is not computed.
    return Batches(len(packs), steps, sum(packs), sum(packs) / max(len(packs) * max_length, 1))


def packs_of(lengths: list[int], max_length: int) -> list[int]:
    """Tokens of each pack that TRL makes of rows, in their order (`packing_strategy: bfd`).

    Args:
        lengths: tokens of each row, none longer than `max_length`.
        max_length: tokens of a pack.
    """
    if not lengths:
        return []
    from trl.data_utils import pack_dataset  # seconds to import

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        rows = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
        return [len(pack["input_ids"]) for pack in pack_dataset(rows, max_length, "bfd")]
    finally:
        if shown:
            enable_progress_bars()
