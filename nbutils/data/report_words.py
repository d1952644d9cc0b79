"""The report on a file of rows, as a person reads it."""

from collections import Counter

from transformers import PreTrainedTokenizerBase

from nbutils.data.labels import Row
from nbutils.data.packs import Batches
from nbutils.data.report import Batch, DataReport, Speed


def in_words(
    report: DataReport,
    tokenizer: PreTrainedTokenizerBase,
    batch: Batch,
    speed: Speed | None = None,
) -> str:
    """The report as a person reads it."""
    parts = [_counts(report), _histogram(report.lengths, report.max_length), _epoch(report, batch)]
    if speed:
        parts.append(_hours(report, speed))
    if report.refused:
        parts.append(_refusals(report))
    if report.first:
        parts.append(f"The first row, with what is learned in [[ ]]:\n\n{marked(report.first, tokenizer)}")
    return "\n\n".join(parts)


def marked(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a row as the model sees it, each part that is learned between [[ and ]]."""
    spans = row.answers or [(0, len(row.ids))]
    text, position = "", 0
    for begin, end in spans:
        text += tokenizer.decode(row.ids[position:begin]) + f"[[{tokenizer.decode(row.ids[begin:end])}]]"
        position = end
    return text


def _counts(report: DataReport) -> str:
    lines = [
        ("rows", f"{report.rows:,}"),
        ("conversations that can be trained on", f"{report.conversations:,}"),
        ("of them equal to an earlier one", f"{report.duplicates:,}"),
        ("rows for the trainer", f"{report.kept:,}"),
        ("tokens in them after the cut", f"{report.tokens:,}"),
        (
            "tokens learned",
            f"{report.tokens_learned:,} ({report.tokens_learned / max(report.tokens, 1):.0%})",
        ),
        ("answers", f"{report.answers:,}"),
        (
            f"answers cut by max_length {report.max_length}",
            f"{report.answers_cut:,} ({report.answers_cut / max(report.answers, 1):.1%})",
        ),
        ("rows that keep nothing to learn, left out", f"{report.emptied:,}"),
        ("rows refused", f"{sum(report.refused.values()):,}"),
        ("not used of the rows", ", ".join(report.left_out) or "none"),
    ]
    return "\n".join([report.source, *(f"  {name:42} {value:>12}" for name, value in lines)])


def _histogram(lengths: list[int], max_length: int, bars: int = 10, width: int = 40) -> str:
    """Rows by length, in tenths of max_length; the last line holds what is cut."""
    step = max(1, -(-max_length // bars))
    counts = Counter(min((length - 1) // step, bars) if length <= max_length else bars for length in lengths)
    most = max(counts.values(), default=1)
    lines = ["tokens of a row"]
    for bar in range(bars + 1):
        name = (
            f"{bar * step + 1:,}-{min((bar + 1) * step, max_length):,}"
            if bar < bars
            else f"over {max_length:,}"
        )
        if bar < bars and bar * step >= max_length:
            continue
        lines.append(f"  {name:>15} {counts[bar]:>8,} {'#' * -(-counts[bar] * width // most)}".rstrip())
    return "\n".join(lines)


def _epoch(report: DataReport, batch: Batch) -> str:
    def line(name: str, made: Batches) -> str:
        a_step = report.tokens / max(made.steps, 1)  # padding left out, as `whole_run` counts
        return f"  {name:12} {made.rows:>8,} {made.fill:>8.0%} {made.steps:>8,} {a_step:>20,.0f}"

    return "\n".join(
        [
            f"one epoch with {batch.rows} rows or packs a rank, {batch.ranks} ranks, "
            f"{batch.accumulation} {'pass' if batch.accumulation == 1 else 'passes'} a step",
            f"  {'':12} {'rows':>8} {'text':>8} {'steps':>8} {'text tokens a step':>20}",
            line("as they come", report.padded),
            line("packed", report.packed),
        ]
    )


def _hours(report: DataReport, speed: Speed) -> str:
    taken = ", ".join(f"{time:.2f} {way}" for way, time in report.hours(speed).items())
    note = "The speed is that of full rows. A step of short rows waits for the weights and reaches less."
    if speed.taken:
        note = "The speed is that of text in rows like these, measured by a dry run on them."
    return f"hours an epoch at {speed.tokens_per_second:,.0f} tokens/s: {taken}\n  {note}"


def _refusals(report: DataReport) -> str:
    lines = [
        f"  {count:>6,}  {kind}\n          {report.examples[kind]}" for kind, count in report.refused.items()
    ]
    return "\n".join(
        ["rows refused, by reason; the training script refuses the file until none is left", *lines]
    )
