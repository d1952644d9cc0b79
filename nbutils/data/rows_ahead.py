"""The rows that a run will train on, counted before it is launched: read, split, cut and packed as in training."""

from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from nbutils.data.labels import Marker
from nbutils.data.packs import packs_of
from nbutils.data.rows import refuse_if_any, train_and_heldout
from nbutils.data.training_rows import cut, mark


@dataclass(frozen=True)
class RowsAhead:
    """What is left for training when some rows are held out.

    Args:
        rows: what the trainer takes one by one: rows, or packs with `packing`.
        tokens: of text in all of them.
        longest: tokens of the longest of them.
        heldout: rows of one evaluation.
    """

    rows: int
    tokens: int
    longest: int
    heldout: int


def rows_ahead(settings: dict, tokenizer: PreTrainedTokenizerBase) -> RowsAhead:
    """Count what the training script will make of its files, with the functions that it calls itself.

    Args:
        settings: of the script, as in its YAML.
        tokenizer: of the model, from `load_tokenizer`.

    Raises:
        FileNotFoundError, ValueError: the files cannot be read, or a row cannot be trained on.
    """
    train, heldout = train_and_heldout(
        settings["dataset"], settings.get("heldout_dataset"), settings.get("ignore_columns")
    )
    length = settings["max_length"]
    lengths, held_out = ([len(ids) for ids in _cut(part, tokenizer, settings)] for part in (train, heldout))
    if settings.get("shuffle_dataset"):  # TRL shuffles before it packs
        lengths = Dataset.from_dict({"n": lengths}).shuffle(seed=settings.get("seed", 42))["n"]
    made = packs_of(list(lengths), length) if settings.get("packing") else lengths
    evaluated = min(settings.get("eval_rows") or len(held_out), len(held_out))
    return RowsAhead(len(made), sum(lengths), max(made, default=0), evaluated)


def _cut(conversations: list, tokenizer: PreTrainedTokenizerBase, settings: dict) -> list[list[int]]:
    rows, refused = mark(conversations, Marker(tokenizer))
    refuse_if_any(refused)
    mode = settings.get("truncation_mode", "keep_start")
    return cut(rows, settings["max_length"], mode, settings.get("completion_only_loss") is False).ids
