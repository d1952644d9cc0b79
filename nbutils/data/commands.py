"""`python -m nbutils data FILE`: what it takes, and what it prints."""

import argparse
import json
from pathlib import Path

from nbutils.common.refused import Refused

BATCH = ("per_device_train_batch_size", "num_processes", "gradient_accumulation_steps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m nbutils data`; settings of the script have the script's names."""
    option = parser.add_argument
    option("file", help="a .json, .jsonl or .parquet file, or a hub id: owner/name:split")
    option("--model", default="tiny", help="folder or hub id; its tokenizer is all that is read")
    option("--max-length", type=int, default=2048, metavar="N", help="tokens after which a row is cut")
    option("--truncation-mode", choices=("keep_start", "keep_end"), default="keep_start")
    option("--ignore-columns", metavar="A,B", help="names that may be left out, separated by commas")
    option(
        "--per-device-train-batch-size",
        type=int,
        default=4,
        metavar="N",
        help="rows or packs a rank and pass",
    )
    option("--num-processes", type=int, default=2, metavar="N", help="ranks, one a GPU")
    option("--gradient-accumulation-steps", type=int, default=1, metavar="N", help="passes a step")
    option("--tokens-per-second", type=float, metavar="X", help="of full rows, over all GPUs")
    option("--record", type=Path, help="a dry run's JSON, or one of benchmarks/results: its speed")
    option("--json", action="store_true", help="print numbers for a program")


def report(options: argparse.Namespace, tokenizer) -> int:
    """Print the report; the status is 1 if nothing in the file can be trained on."""
    from nbutils.data.report import Batch, Speed, look_at_data  # seconds to import
    from nbutils.data.report_words import in_words

    for name in ("max_length", *BATCH):
        if getattr(options, name) < 1:
            raise Refused(f"--{name.replace('_', '-')} is {getattr(options, name)}; wanted at least 1.")
    speed = Speed(*recorded_speed(options.record)) if options.record else None
    if options.tokens_per_second:
        speed = Speed(options.tokens_per_second)
    batch = Batch(*(getattr(options, name) for name in BATCH))
    found = look_at_data(
        options.file, tokenizer, options.max_length, batch, options.ignore_columns, options.truncation_mode
    )
    if options.json:
        print(json.dumps(found.as_json(speed), indent=2))
    else:
        print(in_words(found, tokenizer, batch, speed))
    return 0 if found.kept else 1


def recorded_speed(record: Path) -> tuple[float, str | None]:
    """The speed in a record of a dry run.

    Returns:
        Tokens a second over all GPUs; and how rows of a file were taken, or None where rows were full.

    Raises:
        Refused: the file is no such record, or the run in it did not train.
    """
    try:
        held = json.loads(record.read_text(encoding="utf-8"))
        speed, taken = held["measured"]["tokens_per_second"], held["config"].get("rows", {}).get("taken")
    except (ValueError, KeyError, TypeError, AttributeError):
        speed = taken = None
    if not speed:
        raise Refused(
            f"{record} holds no tokens_per_second under measured. Name the record of a dry run that trained: "
            "python -m nbutils dryrun --data FILE --out RECORD"
        )
    return speed, taken
