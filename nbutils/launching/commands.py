"""The commands of this room: launch, script, dryrun."""

import argparse
import math
import sys
from pathlib import Path

from nbutils.common.command import Command, also_as
from nbutils.common.paths import RUNS, from_here


def _launch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="for accelerate; left out: what fits this machine")
    parser.add_argument("--num-processes", type=int, help="ranks; left out: what the config says")
    parser.add_argument(
        "--log", type=Path, default=from_here(RUNS / "launch.log"), help="output of all ranks"
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="after them the ranks are asked to save and to end; SIGTERM to the launch does the same",
    )
    also_as(parser, "--config", "--config_file", Path)  # as accelerate spells it
    also_as(parser, "--num-processes", "--num_processes", int)
    also_as(parser, "--time-limit", "--timeout", float)
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")


def _launch(options: argparse.Namespace) -> int:
    from nbutils.launching.launch import choose_config, launch
    from nbutils.launching.out_of_memory import settings_of

    try:
        _look_first(options)
        launch(
            options.script,
            options.arguments,
            options.config or choose_config(),
            log=options.log,
            num_processes=options.num_processes,
            output_dir=settings_of(options.arguments).get("output_dir"),
            timeout=options.time_limit,
        )
    except KeyboardInterrupt:
        print(
            "\nInterrupted; every rank was ended. Go on from the newest checkpoint with --resume true.",
            file=sys.stderr,
        )
        return 130
    return 0


def _look_first(options: argparse.Namespace) -> None:
    """If the script is the course's, look at what it will be given before any rank starts."""
    from nbutils.launching.first_look import look
    from nbutils.launching.out_of_memory import settings_of
    from nbutils.launching.script_file import is_recipe

    if is_recipe(options.script):
        look(settings_of(options.arguments), options.config, options.num_processes)


def _script_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path)


def _script(options: argparse.Namespace) -> int:
    from nbutils.launching.script_file import write_script

    print(write_script(options.folder))
    return 0


def _dryrun(arguments: list[str]) -> int:
    from nbutils.launching.dry_run import main as dryrun

    return dryrun(arguments)


COMMANDS = {
    "launch": Command(
        "accelerate launch, with bad configs refused and the first failing rank's error at the end",
        _launch,
        _launch_arguments,
    ),
    "script": Command("write the training script of notebook 04 into a folder", _script, _script_arguments),
    "dryrun": Command(
        "train the real script on random weights, on your own rows if you like, and measure", _dryrun
    ),
}
