"""`python -m nbutils data FILE`: what it takes, and what it prints."""

import argparse
import json
from pathlib import Path

from nbutils.common.command import also_as
from nbutils.common.refused import Refused


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m nbutils data`."""
    parser.add_argument("file", help="a .json, .jsonl or .parquet file, or a hub id: owner/name:split")
    parser.add_argument("--model", default="tiny", help="folder or hub id; its tokenizer is all that is read")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens after which a row is cut")
    parser.add_argument("--truncation-mode", choices=("keep_start", "keep_end"), default="keep_start")
    parser.add_argument("--ignore-columns", help="names that may be left out, separated by commas")
    parser.add_argument(
        "--per-device-train-batch-size", type=int, default=4, help="rows or packs a rank and forward pass"
    )
    parser.add_argument("--num-processes", type=int, default=2, help="ranks, one a GPU")
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1, help="forward passes a step")
    also_as(parser, "--per-device-train-batch-size", "--batch-size", int)
    also_as(parser, "--gradient-accumulation-steps", "--accumulation", int)
    parser.add_argument("--tokens-per-second", type=float, help="of full rows, over all GPUs")
    parser.add_argument(
        "--record", type=Path, help="a dry run's JSON, or one of benchmarks/results: its speed"
    )
    parser.add_argument("--json", action="store_true", help="print numbers for a program")


def report(options: argparse.Namespace, tokenizer) -> int:
    """Print the report; the status is 1 if nothing in the file can be trained on."""
    from nbutils.data.report import Batch, look_at_data  # seconds to import
    from nbutils.data.report_words import in_words

    sizes = ("max_length", "per_device_train_batch_size", "num_processes", "gradient_accumulation_steps")
    for name in sizes:
        if getattr(options, name) < 1:
            raise Refused(f"--{name.replace('_', '-')} is {getattr(options, name)}; wanted at least 1.")
    speed = options.tokens_per_second or (recorded_speed(options.record) if options.record else None)
    batch = Batch(
        options.per_device_train_batch_size, options.num_processes, options.gradient_accumulation_steps
    )
    found = look_at_data(
        options.file, tokenizer, options.max_length, batch, options.ignore_columns, options.truncation_mode
    )
    if options.json:
        print(json.dumps(found.as_json(speed), indent=2))
    else:
        print(in_words(found, tokenizer, batch, speed))
    return 0 if found.kept else 1


def recorded_speed(record: Path) -> float:
    """Tokens a second over all GPUs, out of a record of a dry run.

    Raises:
        Refused: the file is no such record, or the run in it did not train.
    """
    try:
        speed = json.loads(record.read_text(encoding="utf-8"))["measured"]["tokens_per_second"]
    except (ValueError, KeyError, TypeError):
        speed = None
    if not speed:
        raise Refused(
            f"{record} holds no tokens_per_second under measured. Name the record of a dry run that trained: "
            "python -m nbutils dryrun"
        )
    return speed
