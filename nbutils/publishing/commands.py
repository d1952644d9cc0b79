"""The commands of this room: run, refresh, workshop, site, newest."""

import argparse
import sys
from pathlib import Path

from nbutils.common.command import Command
from nbutils.common.paths import at_root, from_here


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", type=Path, help="YAML of parameters, like configs/params/tiny.yaml")
    one = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}
    parser.add_argument("-p", dest="overrides", help="one parameter", **one)
    parser.add_argument("--from", dest="begin", metavar="NN", help="go on from here in the latest run")
    parser.add_argument("--only", metavar="NN,NN", help="run only these notebooks")
    parser.add_argument("--run-dir", default="", help="folder for the run, in place of runs/<time>")
    parser.add_argument("--notebooks", type=Path, help="folder of the notebooks, in place of the course's")
    parser.add_argument(
        "--cell-timeout",
        type=int,
        metavar="SECONDS",
        help="for each cell; otherwise an hour, or the parameter time_limit and ten minutes, whichever is more",
    )


def _run(options: argparse.Namespace) -> int:
    from nbutils.publishing.parameters import BadParameters
    from nbutils.publishing.runner import NOTEBOOKS, run_series

    try:
        run_series(
            at_root(options.params) if options.params else None,
            {name: _value_at_root(text) for name, text in options.overrides},
            options.begin,
            options.only.split(",") if options.only else None,
            at_root(options.run_dir) if options.run_dir else "",
            at_root(options.notebooks) if options.notebooks else NOTEBOOKS,
            cell_timeout=options.cell_timeout,
        )
    except BadParameters as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nInterrupted. Go on later from a notebook with: python -m nbutils run --from NN",
            file=sys.stderr,
        )
        return 130
    return 0


def _value_at_root(text: str) -> str:
    """A parameter that is plainly a path, as it must be called from the root; `owner/name` may be a hub id."""
    return str(at_root(text)) if text.startswith("../") else text


def _refresh_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if an output says something else"
    )


def _refresh(options: argparse.Namespace) -> int:
    from nbutils.publishing.refresh import refresh

    changed = refresh(check_only=options.check)
    print("\n".join(changed) or "Every notebook says what it said before.")
    return 1 if options.check and changed else 0


def _workshop_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=from_here("workshop"), help="folder for them")
    parser.add_argument("--prove", action="store_true", help="run the student edition out of the archive")
    parser.add_argument("--only", metavar="NN,NN", help="of it, prove only these notebooks")


def _workshop(options: argparse.Namespace) -> int:
    from nbutils.publishing.workshop_proof import main as workshop

    return workshop(options.out, options.prove, options.only.split(",") if options.only else None)


def _site_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=from_here("site"), help="folder for it")


def _site(options: argparse.Namespace) -> int:
    from nbutils.publishing.site import main as site

    return site(options.out)


def _newest(arguments: list[str]) -> int:
    from nbutils.publishing.newest import main as newest

    return newest(arguments)


COMMANDS = {
    "run": Command("execute the notebooks in order into runs/<time>/", _run, _run_arguments),
    "refresh": Command(
        "execute the notebooks again and write their outputs back", _refresh, _refresh_arguments
    ),
    "workshop": Command(
        "make the student edition, the solutions and the archive", _workshop, _workshop_arguments
    ),
    "site": Command("write the whole series as HTML that needs no network", _site, _site_arguments),
    "newest": Command("try the newest releases, and report what differs", _newest),
}
