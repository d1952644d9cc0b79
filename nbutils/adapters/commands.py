"""The commands of this room: merge, export, gguf."""

import argparse
from pathlib import Path

from nbutils.common.command import Command


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help="folder or hub id of the unquantised base")
    parser.add_argument("adapter", type=Path, help="folder of the adapter")
    parser.add_argument("out", type=Path, help="new folder; after a stop, the same one again")


def _merge(options: argparse.Namespace) -> int:
    from nbutils.adapters.merge import merge

    return _told(options.out, merge(options.base, options.adapter, options.out))


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a folder checkpoint-<step>")
    parser.add_argument("out", type=Path, help="new folder for the adapter")


def _export(options: argparse.Namespace) -> int:
    from nbutils.adapters.export import export_adapter

    return _told(options.out, export_adapter(options.checkpoint, options.out))


def _gguf_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, help="folder of the adapter")
    parser.add_argument("out", type=Path, help="new file, such as adapter.gguf")
    parser.add_argument("--base", help="folder or hub id of its base; left out: as the adapter names it")
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32", help="of A and B")


def _gguf(options: argparse.Namespace) -> int:
    from nbutils.adapters.gguf_adapter import write_gguf

    return _told(options.out, write_gguf(options.adapter, options.out, options.base, options.dtype))


def _told(out: Path, done: dict) -> int:
    print(f"{out}: " + ", ".join(f"{name} {value}" for name, value in done.items()))
    return 0


COMMANDS = {
    "merge": Command("merge an adapter into its bf16 base, one tensor at a time", _merge, _merge_arguments),
    "export": Command("make the adapter out of a checkpoint alone", _export, _export_arguments),
    "gguf": Command("write an adapter for llama.cpp, checked tensor by tensor", _gguf, _gguf_arguments),
}
