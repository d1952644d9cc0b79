"""`python -m nbutils data FILE`: what it takes, and what it prints."""

import argparse
import json
from pathlib import Path

from nbutils.common.refused import Refused

# An option that is not given: its value, and the name under which a dry run's record holds it.
BATCH = {
    "per_device_train_batch_size": (4, "batch_size"),
    "num_processes": (2, "world_size"),
    "gradient_accumulation_steps": (1, "gradient_accumulation_steps"),
}
LENGTH = {"max_length": (2048, "seq_len")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m nbutils data`; settings of the script have the script's names."""
    option = parser.add_argument
    option("file", help="a .json, .jsonl or .parquet file, or a hub id: owner/name:split")
    option("--model", default="tiny", help="folder or hub id; its tokenizer is all that is read")
    option("--max-length", type=int, metavar="N", help="tokens after which a row is cut; 2,048")
    option("--truncation-mode", choices=("keep_start", "keep_end"), default="keep_start")
    option("--ignore-columns", metavar="A,B", help="names that may be left out, separated by commas")
    option("--per-device-train-batch-size", type=int, metavar="N", help="rows or packs a rank and pass; 4")
    option("--num-processes", type=int, metavar="N", help="ranks, one a GPU; 2")
    option("--gradient-accumulation-steps", type=int, metavar="N", help="passes a step; 1")
    option("--tokens-per-second", type=float, metavar="X", help="of full rows, over all GPUs")
    option("--record", type=Path, help="a dry run's JSON: its speed, and its length and batch if not given")
    option("--json", action="store_true", help="print numbers for a program")


def report(options: argparse.Namespace, tokenizer) -> int:
    """Print the report; the status is 1 if nothing in the file can be trained on."""
    from nbutils.data.report import Batch, Speed, look_at_data  # seconds to import
    from nbutils.data.report_words import in_words

    speed, recorded = None, {}
    if options.record:
        *spoken, recorded = recorded_run(options.record)
        speed = Speed(*spoken)
    if options.tokens_per_second:
        speed = Speed(options.tokens_per_second)
    length, *counts = chosen(options, recorded)
    batch = Batch(*counts)
    found = look_at_data(
        options.file, tokenizer, length, batch, options.ignore_columns, options.truncation_mode
    )
    if options.json:
        print(json.dumps(found.as_json(speed), indent=2))
    else:
        print(in_words(found, tokenizer, batch, speed))
    return 0 if found.kept else 1


def chosen(options: argparse.Namespace, recorded: dict) -> list[int]:
    """The length of a row, rows a rank and pass, ranks, and passes: as given, else as recorded, else by default.

    Args:
        options: of the command line; None where nothing was given.
        recorded: the configuration in a dry run's record, or nothing.

    Raises:
        Refused: one of them is under 1.
    """
    numbers = []
    for name, (default, key) in (LENGTH | BATCH).items():
        given = getattr(options, name)
        numbers.append(recorded.get(key, default) if given is None else given)
        if numbers[-1] < 1:
            raise Refused(f"--{name.replace('_', '-')} is {numbers[-1]}; wanted at least 1.")
    return numbers


def recorded_run(record: Path) -> tuple[float, str | None, dict]:
    """The speed in a record of a dry run.

    Returns:
        Tokens a second over all GPUs; how rows of a file were taken, or None where rows were full; and the record's
        configuration, with the length of a row and the batch.

    Raises:
        Refused: the file is no such record, or the run in it did not train.
    """
    try:
        held = json.loads(record.read_text(encoding="utf-8"))
        config = held["config"]
        speed, taken = held["measured"]["tokens_per_second"], config.get("rows", {}).get("taken")
    except (ValueError, KeyError, TypeError, AttributeError):
        speed = taken = config = None
    if not speed:
        raise Refused(
            f"{record} holds no tokens_per_second under measured. Name the record of a dry run that trained: "
            "python -m nbutils dryrun --data FILE --out RECORD"
        )
    return speed, taken, config
