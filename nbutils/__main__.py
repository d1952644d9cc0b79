"""The command line: `python -m nbutils --help`.

The commands themselves stand in `commands.py` of their rooms.
"""

import argparse
import sys

from nbutils.adapters import commands as adapters
from nbutils.common.exit_status import RESUME_ME
from nbutils.common.noise import drop_noise
from nbutils.launching import commands as launching
from nbutils.models import commands as models
from nbutils.planning import commands as planning
from nbutils.publishing import commands as publishing

COMMANDS = {
    **publishing.COMMANDS,
    **launching.COMMANDS,
    **adapters.COMMANDS,
    **models.COMMANDS,
    **planning.COMMANDS,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    What is wrong with the input or with this machine's disk is said in a sentence, with status 1; a traceback is a bug.
    75 says that a training was asked to stop, has saved, and can be resumed.

    Args:
        arguments: as typed after `python -m nbutils`.
    """
    drop_noise()
    try:
        return _command(arguments)
    except (OSError, ValueError) as error:  # most of our own refusals are ValueErrors
        said, status = _sentence(error), 1
    except RuntimeError as error:
        if not type(error).__module__.startswith("nbutils."):
            raise
        said, status = str(error), RESUME_ME if getattr(error, "saved", False) else 1
    print(f"\n{said}", file=sys.stderr)
    return status


def _sentence(error: OSError | ValueError) -> str:
    """What an error says; if it is the operating system's own, with the path and what to look at."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return (
        f"{error.filename or 'A file'} cannot be read or written: {error.strerror}. "
        "Look at the path, at your rights to it, and at the room on its disk."
    )


def _command(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nbutils", description="Run the course from a terminal.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        one = commands.add_parser(name, help=command.help, add_help=command.arguments is not None)
        if command.arguments:
            command.arguments(one)
    options, others = parser.parse_known_args(arguments)
    command = COMMANDS[options.command]
    if not command.arguments:  # it reads its own
        return command.run(others)
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return command.run(options)


if __name__ == "__main__":
    sys.exit(main())
