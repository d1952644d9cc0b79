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

    run = commands.add_parser("run", help="execute the notebooks in order into runs/<time>/")
    run.add_argument("--params", type=Path, help="YAML of parameters, like configs/params/tiny.yaml")
    run.add_argument(
        "-p",
        dest="overrides",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="one parameter",
    )
    run.add_argument("--from", dest="begin", metavar="NN", help="go on from this notebook in the latest run")
    run.add_argument("--only", metavar="NN,NN", help="run only these notebooks")
    run.add_argument("--run-dir", default="", help="folder for the run, in place of runs/<time>")
    run.add_argument("--notebooks", type=Path, default=Path("notebooks"), help="folder of the notebooks")
    run.add_argument("--cell-timeout", type=int, default=3600, metavar="SECONDS", help="for each cell (3600)")

    script = commands.add_parser("script", help="write the training script of notebook 04 into a folder")
    script.add_argument("folder", type=Path)

    look = commands.add_parser("doctor", help="look at this machine: can it run the course?")
    look.add_argument("--model", default="tiny", help="tiny, llama32_1b, llama31_8b or llama31_70b (tiny)")
    look.add_argument("--processes", help="ranks that will run (the number of GPUs)")

    options = parser.parse_args(arguments)
    # Each command imports what it needs when it is called: `--help` answers at once.
    if options.command == "run":
        return _run(options)
    if options.command == "doctor":
        from nbutils.doctor import main as doctor

        words = ["--processes", options.processes] if options.processes else []
        return doctor(["--model", options.model, *words])
    if options.command == "script":
        from nbutils.recipe import write_script

        print(write_script(options.folder))
    return 0


def _run(options: argparse.Namespace) -> int:
    from nbutils.parameters import BadParameters
    from nbutils.runner import SeriesFailed, run_series

    try:
        run_series(
            options.params,
            dict(options.overrides),
            options.begin,
            options.only.split(",") if options.only else None,
            options.run_dir,
            options.notebooks,
            cell_timeout=options.cell_timeout,
        )
    except (BadParameters, SeriesFailed) as error:
        print(f"\n{error}", file=sys.stderr)
        return 2 if isinstance(error, BadParameters) else 1
    except KeyboardInterrupt:
        print(
            "\nInterrupted. Go on later from a notebook with: python -m nbutils run --from NN",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
