"""A dry run at full size, without a download: random weights of the real shapes, the real script, a few real steps.

Run as: python -m nbutils dryrun --model llama31_70b --config configs/accelerate/config_fsdp.yaml --cap-gib 21.3
Or on rows of your own, with the settings of your parameter file:
python -m nbutils dryrun --params configs/params/llama31_70b_2x24gb_fastest.yaml --data my_rows.jsonl
"""

import argparse
import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from nbutils.common.command import also_as
from nbutils.common.devices import no_accelerator
from nbutils.common.paths import RUNS, at_root, go_to_root
from nbutils.common.provenance import provenance
from nbutils.launching.config_faults import refuse_bad_config
from nbutils.launching.dry_run_params import of_goal, of_params
from nbutils.launching.dry_run_record import configuration, describe, outcome_of, predicted
from nbutils.launching.dry_run_rows import OwnRows, model_with_a_shape, tokenizer_folder
from nbutils.launching.dry_run_settings import PREDICTION, DryRun, claim, read_pairs, write_settings
from nbutils.launching.launch import LaunchFailed, choose_config, launch
from nbutils.launching.launch_command import launch_command
from nbutils.launching.measurements import HostMemory, measured
from nbutils.launching.random_weights import prepare, with_tokenizer
from nbutils.launching.script_file import write_script
from nbutils.planning.memory_items import LIBRARIES_CPU
from nbutils.planning.memory_plan import Plan, plan
from nbutils.planning.run_setup import LORA_RANK, Choices, Setup
from nbutils.planning.shapes import SHAPES, Shape, shape_of

MEASURED_RUN = "nbutils.launching.measured_run"
NO_SPEED = {"tokens_per_second": None, "step_seconds": None}  # what was counted as full rows were none


def main(arguments: list[str] | None = None) -> int:
    """Run one dry run and return 0 if it trained, 3 if it ran out of memory."""
    options = _read(arguments)
    go_to_root()
    shape = shape_of(model_with_a_shape(options.model))
    if options.layers:
        shape = replace(shape, layers=options.layers)
    if options.prepare_only:
        print(prepare(shape, options.folder))
        return 0
    result = dry_run(_asked_for(shape, options))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(describe(result))
    return {"ok": 0, "oom": 3}.get(result["outcome"], 1)


def _read(arguments: list[str] | None) -> argparse.Namespace:
    """What was typed, over what the file of parameters says; paths as they are called from the root."""
    parser = make_parser()
    typed, pairs = parser.parse_known_args(arguments)[0], []
    if typed.params:
        defaults, pairs = of_params(typed.params)
        parser.set_defaults(**defaults)
    options = parser.parse_args(arguments)
    options.set = pairs + (of_goal(options.goal) if options.goal else []) + options.set
    for name in ("model", "config", "folder", "run_dir", "out", "data", "tokenizer"):
        value = getattr(options, name)
        if value and (isinstance(value, Path) or Path(value).exists()):
            setattr(options, name, type(value)(at_root(value)))
    return options


def _asked_for(shape: Shape, options: argparse.Namespace) -> DryRun:
    return DryRun(
        shape,
        options.config,
        batch=options.per_device_train_batch_size,
        length=options.max_length,
        steps=options.max_steps,
        lora_r=options.lora_r,
        accumulation=options.gradient_accumulation_steps,
        cap_gib=options.cap_gib,
        world_size=options.num_processes,
        folder=options.folder,
        run_dir=options.run_dir,
        commit=options.commit,
        extra=options.set,
        changes=options.change,
        trace=options.trace,
        timeout=options.time_limit,
        data=options.data,
        tokenizer=tokenizer_folder(options.tokenizer, options.model) if options.data else None,
    )


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="python -m nbutils dryrun", description=__doc__.splitlines()[0])
    option = parser.add_argument
    pairs = {"action": "append", "default": []}
    option("--model", default="llama31_70b", help=f"one of {', '.join(SHAPES)}, a folder, or a hub id")
    option("--data", metavar="FILE", help="train on the rows of this file, or hub id, as they are")
    option("--tokenizer", metavar="MODEL", help="whose tokenizer reads them; left out: the model's")
    option("--params", type=Path, help="the parameter file of your run, as in configs/params")
    option("--goal", type=Path, help="further settings, as in configs/goals")
    option("--layers", type=int, help="build only so many of its layers")
    option("--config", type=Path, help="for accelerate launch; left out: what fits this machine")
    option("--change", metavar="KEY=VALUE", help="change a key of the config in a copy", **pairs)
    option("--num-processes", type=int, help="ranks; left out: what the config says")
    option("--cap-gib", type=float, help="let the GPU allocator have no more than this")
    # Settings of the script have the script's names.
    option("--per-device-train-batch-size", type=int, default=1, metavar="N", help="rows a rank and pass")
    option("--gradient-accumulation-steps", type=int, default=1, metavar="N", help="passes a step")
    option("--max-length", type=int, default=1024, metavar="N", help="tokens a row")
    option("--max-steps", type=int, default=6, metavar="N", help="optimizer steps, at least 3")
    option("--lora-r", type=int, default=LORA_RANK, metavar="N", help="rank of the adapter")
    option("--set", metavar="NAME=VALUE", help="any other setting of the script", **pairs)
    option("--folder", type=Path, help="where the random weights are kept (70B: 40 GB of disk)")
    option("--run-dir", type=Path, help="where this run writes; left out: runs/dryrun/<time>")
    option("--out", type=Path, help="write the result as JSON")
    option("--commit", default="", help="of this repository, for the record; left out: as git says")
    option("--time-limit", type=float, default=math.inf, metavar="SECONDS", help="end the launch after them")
    option("--trace", action="store_true", help="also record what was in GPU memory at the peak")
    option("--prepare-only", action="store_true", help="only write the random weights")
    for name, spelling in {
        "--per-device-train-batch-size": "--batch",
        "--max-length": "--length",
        "--max-steps": "--steps",
    }.items():
        also_as(parser, name, spelling, int)
    also_as(parser, "--time-limit", "--timeout", float)
    return parser


def dry_run(run: DryRun, show: bool = True) -> dict:
    """Train the real script for a few steps on random weights, and compare its memory with the plan.

    The prediction is written to `prediction.json` before the launch.

    Args:
        run: what is asked for.
        show: print the command and a progress line.

    Returns:
        The record; benchmarks/README.md names its keys. `outcome` is `ok`, `oom`, or `failed` with `error`.

    Raises:
        BadConfig: there is no such config, or it would not start what was meant.
        FileExistsError: `run_dir` holds what a dry run would replace and did not write.
    """
    run_dir = Path(run.run_dir or RUNS / "dryrun" / datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ"))
    config = _config(run, run_dir)
    setup = Setup.read(config, run.world_size)
    settings, own = _settings_and_rows(run, run_dir, setup.world_size)
    prediction = predicted(_plan(run, setup, settings, own), setup, run.cap_gib)
    (run_dir / PREDICTION).write_text(json.dumps(prediction, indent=1) + "\n")

    script = write_script(run_dir)
    arguments = ["--config", str(run_dir / "train.yaml")]
    variables = _variables(run, run_dir)
    typed = launch_command(script, arguments, config, MEASURED_RUN, run.world_size)
    told = " ".join([*(f"{name}={value}" for name, value in variables.items()), *typed])
    record = {
        **provenance(told, run.commit),
        "config": configuration(run, setup, str(config)) | ({"rows": own.record()} if own else {}),
        "outcome": "ok",
        "predicted": prediction,
    }
    host = HostMemory(run_dir / "ranks")
    try:
        with host, _environment(variables):
            launch(
                *(script, arguments, config), module=MEASURED_RUN, num_processes=run.world_size,
                log=run_dir / "train.log", output_dir=run_dir / "train", timeout=run.timeout, show=show,
            )  # fmt: skip
    except LaunchFailed as problem:
        record |= {"outcome": outcome_of(problem), "error": problem.error or str(problem)}
    seen = measured(run_dir, host, run.tokens_a_step(setup.world_size))
    if own:
        seen |= own.measured(run_dir, seen["all_step_seconds"]) if record["outcome"] == "ok" else NO_SPEED
    return record | {"measured": seen}


def _settings_and_rows(run: DryRun, run_dir: Path, ranks: int) -> tuple[dict, OwnRows | None]:
    """The script's settings, its model, and its rows; those of a user are looked at before 40 GB are written."""
    if not run.data:
        return write_settings(run, run_dir, prepare(run.shape, run.folder), ranks), None
    settings = write_settings(run, run_dir, run_dir / "model", ranks)
    own = OwnRows.read(run, settings, ranks)
    with_tokenizer(prepare(run.shape, run.folder), run.tokenizer, run_dir / "model")
    return settings, own


def _plan(run: DryRun, setup: Setup, settings: dict, own: OwnRows | None) -> Plan:
    longest = own.longest if own else run.length
    expected = plan(run.shape, setup, run.batch, longest, run.lora_r, choices=Choices.read(settings))
    if no_accelerator():
        expected.host["Python and libraries"] = LIBRARIES_CPU
    return expected


def _config(run: DryRun, run_dir: Path) -> Path:
    """Refuse a bad config before anything is written; claim the folder; write the changed copy, if one is wanted."""
    config = Path(run.config) if run.config else choose_config()
    refuse_bad_config(config, run.world_size)
    claim(run_dir)
    if not run.changes:
        return config
    from nbutils.launching.config_files import variant  # imports accelerate

    changed = variant(config, run_dir, **read_pairs(run.changes))
    refuse_bad_config(changed, run.world_size)
    return changed


def _variables(run: DryRun, run_dir: Path) -> dict[str, str]:
    """What `nbutils.launching.measured_run` reads."""
    variables = {"NBUTILS_MEASURE_DIR": str(run_dir / "ranks")}
    if run.cap_gib:
        variables["NBUTILS_CAP_GIB"] = str(run.cap_gib)
    if run.trace:
        variables["NBUTILS_PEAK_TRACE"] = "1"
    return variables


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
