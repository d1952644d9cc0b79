"""A dry run at full size, without a download: random weights of the real shapes, the real script, a few real steps.

Run as: python -m nbutils dryrun --model llama31_70b --config configs/accelerate/config_fsdp.yaml --cap-gib 22.5
"""

import argparse
import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

import yaml

from nbutils.common.devices import no_accelerator
from nbutils.common.paths import RUNS, at_root, go_to_root
from nbutils.common.provenance import provenance
from nbutils.launching.config_faults import refuse_bad_config
from nbutils.launching.launch import LaunchFailed, launch, launch_command
from nbutils.launching.measurements import HostMemory, measured
from nbutils.launching.random_weights import prepare
from nbutils.launching.script_file import SCRIPT, write_script
from nbutils.planning.memory_items import GIB, LIBRARIES_CPU
from nbutils.planning.memory_plan import Plan, plan
from nbutils.planning.run_setup import Choices, Setup
from nbutils.planning.shapes import SHAPES, Shape, shape_of

PREDICTION = "prediction.json"  # by it a dry run knows the folder of another one
REPLACED = ("train", "ranks", "train.yaml", "train.jsonl", "heldout.jsonl", "train.log", SCRIPT)


def main(arguments: list[str] | None = None) -> int:
    """Run one dry run and return 0 if it trained, 3 if it ran out of memory."""
    options = _parser().parse_args(arguments)
    for name in ("config", "folder", "run_dir", "out"):
        if typed := getattr(options, name):
            setattr(options, name, at_root(typed))
    model = str(at_root(options.model)) if Path(options.model).exists() else options.model
    go_to_root()
    shape = shape_of(model)
    if options.layers:
        shape = Shape(**{**vars(shape), "layers": options.layers})
    if options.prepare_only:
        print(prepare(shape, options.folder))
        return 0
    result = dry_run(
        shape,
        options.config,
        batch=options.batch,
        length=options.length,
        steps=options.steps,
        lora_r=options.lora_r,
        cap_gib=options.cap_gib,
        world_size=options.num_processes,
        folder=options.folder,
        run_dir=options.run_dir,
        commit=options.commit,
        extra=options.set,
        changes=options.change,
        trace=options.trace,
        timeout=options.timeout,
    )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(describe(result))
    return {"ok": 0, "oom": 3}.get(result["outcome"], 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nbutils dryrun", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="llama31_70b", help=f"one of {', '.join(SHAPES)}, or a local config.json"
    )
    parser.add_argument("--layers", type=int, help="build only so many of its layers")
    parser.add_argument("--config", type=Path, help="for accelerate launch; left out: what fits this machine")
    parser.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of its fsdp_config in a copy",
    )
    parser.add_argument("--num-processes", type=int, help="ranks; left out: what the config says")
    parser.add_argument("--cap-gib", type=float, help="let the GPU allocator have no more than this")
    parser.add_argument("--batch", type=int, default=1, help="rows a rank and step")
    parser.add_argument("--length", type=int, default=1024, help="tokens a row")
    parser.add_argument("--lora-r", type=int, default=16, help="rank of the adapter")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the script"
    )
    parser.add_argument("--folder", type=Path, help="where the random weights are kept (70B: 40 GB of disk)")
    parser.add_argument("--run-dir", type=Path, help="where this run writes; left out: runs/dryrun/<time>")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument(
        "--commit", default="", help="of this repository, for the record; left out: as git says"
    )
    parser.add_argument("--timeout", type=float, default=560, help="seconds after which the launch is ended")
    parser.add_argument("--trace", action="store_true", help="also record what was in GPU memory at the peak")
    parser.add_argument("--prepare-only", action="store_true", help="only write the random weights")
    return parser


def dry_run(
    shape: Shape,
    config: str | Path | None = None,
    *,
    batch: int = 1,
    length: int = 1024,
    steps: int = 6,
    lora_r: int = 16,
    cap_gib: float | None = None,
    world_size: int | None = None,
    folder: str | Path | None = None,
    run_dir: str | Path | None = None,
    commit: str = "",
    extra: list[str] = (),
    changes: list[str] = (),
    trace: bool = False,
    timeout: float = 560,
    show: bool = True,
) -> dict:
    """Train the real script for a few steps on random weights, and compare its memory with the plan.

    The prediction is written to `prediction.json` before the launch.

    Args:
        shape: of the model.
        config: for `accelerate launch`; None takes what fits this machine.
        batch: rows a rank and step.
        length: tokens a row; every row has exactly so many, without padding.
        steps: optimizer steps, at least 3: the first two are left out of the speed.
        lora_r: rank of the adapter.
        cap_gib: cap of the GPU allocator in GiB; None means the whole card.
        world_size: ranks; None takes the config's.
        folder: where the random weights are kept between dry runs.
        run_dir: where this run writes: a new folder, or one of an earlier dry run, which is replaced.
        commit: of this repository, for the record; left out: as git says.
        extra: settings of the script, `name=value`.
        changes: keys of the config's `fsdp_config`, `key=value`; the changed copy lies in `run_dir`.
        trace: also record what was in GPU memory at the peak, in `ranks/peak_rank0.json`; for few layers only.
        timeout: seconds.
        show: print the command and a progress line.

    Returns:
        The record; benchmarks/README.md names its keys. `outcome` is `ok`, `oom`, or `failed` with `error`.

    Raises:
        BadConfig: there is no such config, or it would not start what was meant.
        FileExistsError: `run_dir` holds what a dry run would replace and did not write.
    """
    from nbutils.launching.launch import choose_config

    config = Path(config) if config else choose_config()
    run_dir = Path(run_dir or RUNS / "dryrun" / datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ"))
    refuse_bad_config(config, world_size)
    _claim(run_dir)
    if changes:
        config = _changed(config, changes, run_dir)
    setup = Setup.read(config, world_size)
    weights = prepare(shape, folder)
    script = write_script(run_dir)
    settings = settings_for(run_dir, weights, batch, length, steps, lora_r, setup.world_size, extra)
    choices = Choices.read(yaml.safe_load(settings.read_text(encoding="utf-8")))
    expected = plan(shape, setup, batch, length, lora_r, choices=choices)
    if no_accelerator():
        expected.host["Python and libraries"] = LIBRARIES_CPU
    predicted = _predicted(expected, setup, cap_gib)
    (run_dir / PREDICTION).write_text(json.dumps(predicted, indent=1) + "\n")

    variables = {"NBUTILS_MEASURE_DIR": str(run_dir / "ranks")}
    if cap_gib:
        variables["NBUTILS_CAP_GIB"] = str(cap_gib)
    if trace:
        variables["NBUTILS_PEAK_TRACE"] = "1"
    shutil.rmtree(run_dir / "ranks", ignore_errors=True)
    what = (script, ["--config", str(settings)], config, "nbutils.launching.measured_run", world_size)
    record = {
        **provenance(
            " ".join([*(f"{name}={value}" for name, value in variables.items()), *launch_command(*what)]),
            commit,
        ),
        "config": {
            "model": shape.name,
            "num_layers": shape.layers,
            "fsdp_version": setup.fsdp_version,
            "offload": setup.offload,
            "cap_gib": cap_gib,
            "world_size": setup.world_size,
            "seq_len": length,
            "batch_size": batch,
            "lora_r": lora_r,
            "accelerate_config": str(config),
            "changes": list(changes),
            "settings": list(extra),
            "spare_host_memory": True,  # see nbutils.patches.fsdp1_pinned_memory
        },
        "outcome": "ok",
        "predicted": predicted,
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    host = HostMemory(run_dir / "ranks")
    try:
        with host:
            launch(
                *what[:3],
                module=what[3],
                num_processes=what[4],
                log=run_dir / "train.log",
                output_dir=run_dir / "train",
                timeout=timeout,
                show=show,
            )
    except LaunchFailed as problem:
        record["outcome"] = "oom" if _out_of_memory(problem) else "failed"
        record["error"] = problem.error or str(problem)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    record["measured"] = measured(run_dir, host, batch * length * setup.world_size)
    return record


# ---- the random weights ---------------------------------------------------------------------------------------------


def settings_for(
    run_dir: Path,
    weights: Path,
    batch: int,
    length: int,
    steps: int,
    lora_r: int,
    world_size: int,
    extra: list[str] = (),
) -> Path:
    """Write rows of exactly `length` tokens and the script's YAML.

    Args:
        run_dir: where both go, and where the script will write; `train` in it is deleted.
        weights: folder of the model.
        batch: rows a rank and step.
        length: tokens a row.
        steps: optimizer steps.
        lora_r: rank of the adapter.
        world_size: ranks, over all machines.
        extra: settings of the script, `name=value`.

    Returns:
        The path of the YAML.
    """
    rows = max(8, steps * batch * world_size)
    text = "a b c d e f g h " * (length // 8 + 2)  # at least one token a letter: the script cuts at `length`
    for name, letter, count in (("train.jsonl", "a", rows), ("heldout.jsonl", "A", world_size)):
        lines = [json.dumps({"text": f"{chr(ord(letter) + n % 26)} {text}"}) for n in range(count)]
        (run_dir / name).write_text("\n".join(lines) + "\n")
    settings = {
        "model": str(weights),
        "dataset": str(run_dir / "train.jsonl"),
        "heldout_dataset": str(run_dir / "heldout.jsonl"),
        "output_dir": str(run_dir / "train"),
        "max_steps": steps,
        "max_length": length,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": 1,
        "completion_only_loss": False,  # every token of a row counts
        "lora_r": lora_r,
        "lora_alpha": 2 * lora_r,
        "learning_rate": 1.0e-4,
        "logging_steps": 1,
        "eval_steps": 100000,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    for pair in extra:
        name, _, value = pair.partition("=")
        settings[name] = yaml.safe_load(value)
    path = run_dir / "train.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    shutil.rmtree(run_dir / "train", ignore_errors=True)
    return path


def _claim(run_dir: Path) -> None:
    """Make the folder, or find that a dry run has written what is in it: anything else is somebody's work."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if not (run_dir / PREDICTION).is_file():
        for name in REPLACED:
            if (run_dir / name).exists():
                raise FileExistsError(
                    f"{run_dir} holds {name}, and no dry run has written it: a dry run would replace it. Name a new "
                    "folder with --run-dir, or leave it out."
                )
        (run_dir / PREDICTION).touch()  # from here on it is a dry run's, even if this one stops at once


def _changed(config: Path, changes: list[str], run_dir: Path) -> Path:
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    for pair in changes:
        key, _, value = pair.partition("=")
        content["fsdp_config"][key] = yaml.safe_load(value)
    path = run_dir / config.name
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


# ---- what is measured -----------------------------------------------------------------------------------------------


# ---- the record -----------------------------------------------------------------------------------------------------


def _predicted(expected: Plan, setup: Setup, cap_gib: float | None) -> dict:
    outcome = "ok"
    if cap_gib and expected.gpu_peak_bytes > cap_gib * GIB:
        outcome = "oom"
    return {
        "gpu_peak_bytes": expected.gpu_peak_bytes,
        "host_bytes": expected.host_bytes * setup.world_size,
        "outcome": outcome,
        "peak_moment": expected.peak_moment,
        "moments": expected.moments,
        "host": expected.host,
    }


def _out_of_memory(problem: LaunchFailed) -> bool:
    text = f"{problem.error} {problem}"
    return "OutOfMemoryError" in text or "CUDA out of memory" in text


def describe(result: dict) -> str:
    """Predicted beside measured, for a reader.

    Args:
        result: from `dry_run`.
    """
    predicted, measured = result["predicted"], result["measured"]
    rows = [f"{'':34}{'predicted':>12}{'measured':>12}"]

    def row(label: str, left: float | None, right: float | None) -> None:
        cells = [f"{value / GIB:9.2f} GiB" if value else f"{'-':>12}" for value in (left, right)]
        rows.append(f"{label:34}{cells[0]:>12}{cells[1]:>12}")

    row("GPU peak allocated, a rank", predicted["gpu_peak_bytes"], measured["gpu_peak_bytes"])
    row("GPU peak reserved, a rank", None, measured["gpu_reserved_bytes"])
    row("GPU outside the allocator", None, measured["gpu_outside_allocator_bytes"])
    for name, values in measured["phases"].items():
        row(f"  peak until {name}", None, max((value or 0 for value in values), default=0))
    row("host memory held, all ranks", predicted["host_bytes"], measured["host_bytes"])
    row("  of it pinned, as PyTorch counts", None, measured["host_pinned_bytes"])
    row("  mapped files beside it", None, measured["host_file_bytes"])
    rows.append("seconds: " + ", ".join(f"{name} {value}" for name, value in measured["seconds"].items()))
    rows.append(
        f"steps {measured['all_step_seconds']}; {measured['step_seconds']} s a step, "
        f"{measured['tokens_per_second']} tokens/s over all ranks"
    )
    rows.append(f"losses {measured['losses']}")
    rows.append(
        f"outcome: {result['outcome']} (predicted: {predicted['outcome']}) {result.get('error', '')[:300]}"
    )
    return "\n".join(rows)
