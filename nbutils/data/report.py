"""Look before you train: what a file of rows holds, what of it is learned, and how long an epoch will take.

Run as: `python -m nbutils data FILE --model M --max-length N`
"""

from collections import Counter
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from nbutils.data.columns import RowRefused
from nbutils.data.labels import IGNORED, Marker, Row
from nbutils.data.packs import Batches, packed, padded
from nbutils.data.rows import look_through
from nbutils.data.training_rows import Cut, cut, mark


@dataclass(frozen=True)
class Batch:
    """How a run takes its rows: rows a rank and forward pass, ranks, forward passes a step."""

    rows: int = 4
    ranks: int = 2
    accumulation: int = 1


@dataclass(frozen=True)
class Speed:
    """Tokens a second over all ranks, and of which rows.

    Args:
        tokens_per_second: without padding.
        taken: None of full rows; or how a dry run took rows like these (`dryrun --data`): "packed", "grouped by
            length", "as they come". Its speed is that of their text alone, whatever padding it computed.
    """

    tokens_per_second: float
    taken: str | None = None


@dataclass
class DataReport:
    """What `python -m nbutils data` prints, as numbers.

    Args:
        source: the file or hub id.
        max_length: tokens after which a row is cut.
        rows: rows in the file.
        conversations: rows that can be trained on.
        kept: rows that the trainer gets.
        tokens: in them, cut as the trainer cuts.
        tokens_learned: of these.
        answers: learned ones, before anything is cut.
        answers_cut: how many of them lose their end.
        emptied: rows that keep nothing to learn.
        duplicates: conversations that stand in the file already.
        refused: how many rows for each reason.
        left_out: what stands in the rows and is not used.
        lengths: tokens of each kept row before it is cut.
        padded: an epoch of rows as they come.
        packed: an epoch of packs.
        first: the first row that is kept.
        examples: one sentence for each reason in `refused`.
    """

    source: str
    max_length: int
    rows: int
    conversations: int
    kept: int
    tokens: int
    tokens_learned: int
    answers: int
    answers_cut: int
    emptied: int
    duplicates: int
    refused: dict[str, int]
    left_out: list[str]
    lengths: list[int]
    padded: Batches
    packed: Batches
    first: Row | None
    examples: dict[str, str] = field(default_factory=dict)

    def hours(self, speed: Speed) -> dict[str, float]:
        """Hours of an epoch, by how the rows are taken; of a dry run's speed, as that run took them alone."""
        if speed.taken:
            ways = {speed.taken: self.tokens}
        else:
            ways = {"packed": self.packed.tokens, "as they come, at least": self.padded.tokens}
        return {way: tokens / speed.tokens_per_second / 3600 for way, tokens in ways.items()}

    def as_json(self, speed: Speed | None = None) -> dict:
        """The same as JSON holds it, without the row and the lengths one by one.

        Args:
            speed: if hours are wanted.
        """
        told = {
            name: getattr(self, name)
            for name in (
                "source", "max_length", "rows", "conversations", "tokens", "tokens_learned", "answers", "answers_cut",
                "duplicates", "refused", "left_out",
            )
        }  # fmt: skip
        told |= {
            "rows_kept": self.kept,
            "rows_without_an_answer_left": self.emptied,
            "answers_cut_share": round(self.answers_cut / max(self.answers, 1), 4),
            "longest": max(self.lengths, default=0),
            "packs": self.packed.rows,
            "packed_fill": round(self.packed.fill, 4),
            "steps_packed": self.packed.steps,
            "steps_padded": self.padded.steps,
            "padded_fill": round(self.padded.fill, 4),
        }
        if speed:
            told["hours"] = {way: round(taken, 3) for way, taken in self.hours(speed).items()}
        return told


def look_at_data(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    batch: Batch = Batch(),
    ignore_columns: str | None = None,
    truncation_mode: str = "keep_start",
) -> DataReport:
    """Read a file as the training script would, and count.

    Args:
        source: a .json, .jsonl or .parquet file, or a hub id.
        tokenizer: of the model, from `load_tokenizer`.
        max_length: tokens after which a row is cut.
        batch: how a run takes its rows.
        ignore_columns: names of columns that may be left out, separated by commas.
        truncation_mode: "keep_start" or "keep_end".

    Raises:
        FileNotFoundError, ValueError: the file as a whole cannot be read.
    """
    found = look_through(source, ignore_columns)
    rows, refused = mark(found.conversations, Marker(tokenizer))
    refused += found.refused
    shortened = cut(rows, max_length, truncation_mode)
    lengths = [len(ids) for ids in shortened.ids]
    keys = Counter(conversation.key for conversation in found.conversations)
    emptied = {id(row) for row in shortened.emptied}
    return DataReport(
        source=source,
        max_length=max_length,
        rows=len(found.conversations) + len(found.refused),
        conversations=len(found.conversations) + len(found.refused) - len(refused),
        kept=len(lengths),
        tokens=sum(lengths),
        tokens_learned=_learned(shortened),
        answers=shortened.answers,
        answers_cut=shortened.answers_cut,
        emptied=len(shortened.emptied),
        duplicates=sum(keys.values()) - len(keys),
        refused=dict(Counter(problem.kind for problem in refused).most_common()),
        left_out=sorted(set().union(*(talk.left_out for talk in found.conversations))),
        lengths=[len(row.ids) for row in rows if id(row) not in emptied],
        padded=padded(lengths, batch.rows, batch.ranks, batch.accumulation),
        packed=packed(lengths, max_length, batch.rows, batch.ranks, batch.accumulation),
        first=next((row for row in rows if id(row) not in emptied), None),
        examples=_first_of_each(refused),
    )


def _learned(shortened: Cut) -> int:
    return sum(label != IGNORED for labels in shortened.labels for label in labels)


def _first_of_each(refused: list[RowRefused]) -> dict[str, str]:
    return {problem.kind: str(problem) for problem in reversed(refused)}
