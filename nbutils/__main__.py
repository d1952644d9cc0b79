"""The command line: `python -m nbutils --help`."""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        arguments: as typed after `python -m nbutils`.
    """
    parser = argparse.ArgumentParser(prog="python -m nbutils", description="Run the course from a terminal.")
    commands = parser.add_subparsers(dest="command", required=True)

    script = commands.add_parser("script", help="write the training script of notebook 04 into a folder")
    script.add_argument("folder", type=Path)

    options = parser.parse_args(arguments)
    # Each command imports what it needs when it is called: `--help` answers at once.
    if options.command == "script":
        from nbutils.recipe import write_script

        print(write_script(options.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
