"""The rows that the trainer gets: each one looked at before anything is loaded, cut to its length, counted."""

from collections.abc import Iterable
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from nbutils.common.ranks import rank
from nbutils.common.refused import Refused
from nbutils.data.columns import RowRefused
from nbutils.data.conversation import Conversation
from nbutils.data.labels import IGNORED, Marker, Row
from nbutils.data.rows import refuse_if_any


@dataclass
class Cut:
    """Rows as long as the trainer takes them, and what that costs.

    Args:
        ids: tokens of each row that keeps something to learn.
        labels: the same, with -100 where nothing is learned.
        answers: how many answers there are, before anything is cut.
        answers_cut: how many of them lose a token, or all.
        answers_lost: how many of those keep none: they teach nothing, and nothing wrong.
        texts_cut: how many rows of plain text are cut.
        emptied: the rows that keep nothing to learn, and are left out.
    """

    ids: list[list[int]]
    labels: list[list[int]]
    answers: int
    answers_cut: int
    answers_lost: int
    texts_cut: int
    emptied: list[Row]


def look_at_every_row(
    train: list[Conversation],
    heldout: list[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    training,
    max_cut_share: float,
) -> tuple[Dataset, Dataset]:
    """Render every conversation as it will be trained on, mark what is learned, and refuse what would be learned wrong.

    What is longer than `max_length` is cut, from the end or as `truncation_mode` says; that is counted and said. A row
    that keeps no token of an answer is left out, so that no pack is made of it.

    Args:
        train: from `train_and_heldout`.
        heldout: the other one.
        tokenizer: of the model, with the chat template.
        training: the script's `TrainingArguments`.
        max_cut_share: the largest share of training answers that may lose their end.

    Returns:
        `(train, heldout)` with the columns `input_ids` and `labels`; the trainer takes them as they are.

    Raises:
        Refused: naming file, row and reason; or no row keeps an answer; or too many answers are cut; or a setting of
            the trainer that these rows cannot follow.
    """
    refuse_settings(training, [*train, *heldout])
    marker = Marker(tokenizer)
    _say_what_is_left_out(train + heldout)
    sets = []
    for conversations, called, lost in (
        (train, "rows", "nothing would be learned. Raise max_length."),
        (heldout, "held-out rows", "there would be no held-out loss. Raise max_length, or name other rows."),
    ):
        rows, refused = mark(conversations, marker)
        refuse_if_any(refused)
        everything = training.completion_only_loss is False
        shortened = cut(rows, training.max_length, training.truncation_mode, everything)
        _refuse_emptied(shortened, rows, called, lost, training.max_length)
        _say(shortened, rows, called, training.max_length)
        if called == "rows":
            _refuse_cut(shortened, training.max_length, max_cut_share)
        sets.append(as_dataset(shortened))
    return sets[0], sets[1]


def rows_to_learn(
    conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> Dataset:
    """Mark what is learned in a few conversations: for a lesson, without the script's counts.

    Args:
        conversations: from `load_conversations`.
        tokenizer: of the model, with the chat template.
        max_length: tokens after which a row is cut; None leaves it whole.

    Returns:
        A data set with the columns `input_ids` and `labels`.

    Raises:
        Refused: naming file, row and reason.
    """
    rows, refused = mark(conversations, Marker(tokenizer))
    refuse_if_any(refused)
    return as_dataset(cut(rows, max_length))


def mark(conversations: Iterable[Conversation], marker: Marker) -> tuple[list[Row], list[RowRefused]]:
    """Mark what is learned in each conversation, and keep the refusals beside.

    Returns:
        `(rows, refused)`; a refusal names file and row.
    """
    rows, refused = [], []
    for conversation in conversations:
        try:
            rows += marker.rows(conversation)
        except RowRefused as problem:
            refused.append(RowRefused(problem.kind, f"{conversation.where}: {problem}"))
    return rows, refused


def cut(
    rows: list[Row], max_length: int | None, truncation_mode: str = "keep_start", everything: bool = False
) -> Cut:
    """Cut rows to a length, as TRL would, and count what is lost.

    Args:
        rows: from `mark`.
        max_length: tokens of a row; None cuts nothing.
        truncation_mode: "keep_start" or "keep_end".
        everything: learn the prompts too.
    """
    done = Cut([], [], 0, 0, 0, 0, [])
    for row in rows:
        length = len(row.ids)
        kept = slice(0, max_length)
        if truncation_mode == "keep_end" and max_length is not None:
            kept = slice(max(0, length - max_length), length)
        begin, end, _ = kept.indices(length)
        done.answers += len(row.answers)
        done.answers_cut += sum(first < begin or last > end for first, last in row.answers)
        done.answers_lost += sum(last <= begin or first >= end for first, last in row.answers)
        done.texts_cut += row.conversation.text is not None and end - begin < length
        labels = row.labels(everything)[kept]
        if all(
            label == IGNORED for label in labels[1:]
        ):  # the first token has nothing before it to be told from
            done.emptied.append(row)
            continue
        done.ids.append(row.ids[kept])
        done.labels.append(labels)
    return done


def as_dataset(shortened: Cut) -> Dataset:
    """As the trainer takes it: TRL leaves a set with these two columns as it is, packs it or pads it."""
    return Dataset.from_dict({"input_ids": shortened.ids, "labels": shortened.labels})


def refuse_settings(training, conversations: list[Conversation]) -> None:
    """Refuse settings of TRL that change how rows are rendered or masked, and that these rows do not follow.

    Raises:
        Refused: naming the setting and what to do.
    """
    for name in ("chat_template_path", "eos_token"):
        if getattr(training, name):
            raise Refused(
                f"{name} is {getattr(training, name)!r}: rows are rendered with the tokenizer beside the model. Put it "
                "there, in tokenizer_config.json or chat_template.jinja, so that serving has it too."
            )
    if training.dataset_text_field != "text":
        raise Refused(
            f"dataset_text_field is {training.dataset_text_field!r}; wanted text: name the column so."
        )
    if training.assistant_only_loss:
        raise Refused("assistant_only_loss is on; answers alone are learned anyway. Leave the setting out.")
    if training.truncation_mode not in ("keep_start", "keep_end"):
        raise Refused(f"truncation_mode is {training.truncation_mode!r}; wanted keep_start or keep_end.")
    if training.completion_only_loss and any(talk.text is not None for talk in conversations):
        raise Refused(
            "completion_only_loss is on and a row is plain text, which has no answer of its own. Leave the setting "
            "out: where there is a question, only the answer is learned."
        )


# ---- what is said ---------------------------------------------------------------------------------------------------


def _say_what_is_left_out(conversations: list[Conversation]) -> None:
    names = sorted(set().union(*(conversation.left_out for conversation in conversations)))
    if names and rank() == 0:
        print(f"Not used of the rows: {', '.join(names)}.", flush=True)


def _refuse_emptied(shortened: Cut, rows: list[Row], called: str, lost: str, max_length: int | None) -> None:
    if rows and len(shortened.emptied) == len(rows):
        raise Refused(
            f"Every one of the {len(rows)} {called} is longer than max_length, {max_length} tokens, before its answer "
            f"begins ({_first_emptied(shortened)}): {lost}"
        )


def _refuse_cut(shortened: Cut, max_length: int | None, max_cut_share: float) -> None:
    learned = shortened.answers - shortened.answers_lost
    parts = shortened.answers_cut - shortened.answers_lost
    if parts > max_cut_share * learned:
        raise Refused(
            f"max_length {max_length} cuts {parts} of the {learned} answers that are learned, {parts / learned:.0%}; "
            f"wanted at most {max_cut_share:.0%}. A model that rarely sees an answer end does not learn to end one. "
            "Raise max_length, or max_cut_share if you want it so."
        )


def _say(shortened: Cut, rows: list[Row], called: str, max_length: int | None) -> None:
    if rank() != 0:
        return
    learned = sum(label != IGNORED for labels in shortened.labels for label in labels)
    tokens = sum(len(ids) for ids in shortened.ids)
    print(
        f"{len(shortened.ids)} {called}, {tokens:,} tokens; learned are {learned:,} of them"
        + (f", in {shortened.answers - shortened.answers_lost} answers." if shortened.answers else "."),
        flush=True,
    )
    if shortened.answers_cut:
        print(
            f"{shortened.answers_cut} of {shortened.answers} answers of these {called} are cut by max_length "
            f"{max_length} ({shortened.answers_cut / shortened.answers:.1%}).",
            flush=True,
        )
    if shortened.texts_cut:
        print(f"{shortened.texts_cut} of {len(rows)} texts are cut by max_length {max_length}.", flush=True)
    if shortened.emptied:
        print(
            f"{len(shortened.emptied)} of {len(rows)} {called} keep no token of their answer within max_length "
            f"{max_length} ({_first_emptied(shortened)}). They are left out; raise max_length to keep them.",
            flush=True,
        )


def _first_emptied(shortened: Cut) -> str:
    row = shortened.emptied[0]
    return f"{row.conversation.where} has {row.answers[0][0] if row.answers else 0} tokens before its answer"
