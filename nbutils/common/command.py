"""A command of `python -m nbutils`. Each room has its own in `commands.py`; `nbutils.__main__` lists them.

One thing has one spelling: a setting of the script has the script's name, as `--max-length`.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple


class Command(NamedTuple):
    """What it does in a line, what does it, and what adds its arguments to a parser.

    A command imports what it needs when it runs, so that `--help` answers at once. Without `arguments` it is given the
    words that follow its name, and reads them itself.
    """

    help: str
    run: Callable[..., int]
    arguments: Callable[[argparse.ArgumentParser], None] | None = None


def also_as(parser: argparse.ArgumentParser, option: str, spelling: str, type_: Callable) -> None:
    """Take another spelling of an option as well, and do not show it."""
    name = option.removeprefix("--").replace("-", "_")
    shy = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    parser.add_argument(spelling, dest=name, type=type_, **shy)
