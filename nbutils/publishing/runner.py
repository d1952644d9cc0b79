"""Run the notebooks in order with papermill, and say at the end what came out."""

import json
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
import yaml

from nbutils.common.paths import RUNS, go_to_root, new_run_dir, point_latest_to
from nbutils.common.progress_file import read_progress
from nbutils.common.provenance import commit, versions
from nbutils.common.versions import STACK, TOOLS
from nbutils.launching.progress_display import progress_line
from nbutils.models.made_here import NAMES
from nbutils.publishing import parameters

NOTEBOOKS = Path("notebooks")
TRAINING_NOTEBOOK = "04_write_and_launch"
CELL_TIMEOUT = 3600  # seconds, if a launch may not take longer; papermill has no limit of its own
AROUND_A_LAUNCH = 600  # seconds that a cell may take in addition to the launch in it
TRAINING = [
    *("distributed_type", "fsdp_version", "world_size", "quant_type", "quant_storage", "nf4_bytes_per_rank"),
    *("nf4_bytes_total", "loss_first", "loss_last", "held_out_loss_before", "held_out_loss_after"),
]
ADAPTER = ["path", "tensors", "sha256", "verified"]


class SeriesFailed(RuntimeError):
    """A notebook failed, or the run lacks a part that it promised."""


@dataclass
class Entry:
    """One notebook of the run."""

    name: str
    source: Path
    contract: dict[str, parameters.Parameter]
    status: str = "not run"
    seconds: float = 0.0


def select(folder: Path = NOTEBOOKS, begin: str | None = None, only: list[str] | None = None) -> list[Entry]:
    """The notebooks to run, in their order, each with its parameters.

    Args:
        folder: of the notebooks `NN_name.ipynb`.
        begin: the number to begin at, like `04`.
        only: the numbers to run.

    Returns:
        One entry for each notebook.

    Raises:
        BadParameters: a number that no notebook has, or a notebook that breaks the parameter contract.
    """
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    numbers = [path.name[:2] for path in paths]
    for number in [*([begin] if begin else []), *(only or [])]:
        if number not in numbers:
            raise parameters.BadParameters(
                f"There is no notebook {number} in {folder}/; found {', '.join(numbers)}."
            )
    chosen = [
        path
        for path, number in zip(paths, numbers)
        if (not begin or number >= begin) and (not only or number in only)
    ]
    if not chosen:
        raise parameters.BadParameters(f"No notebook is left to run in {folder}/.")
    return [Entry(path.stem, path, parameters.read_contract(path)) for path in chosen]


def run_series(
    params: Path | None = None,
    overrides: dict[str, str] | None = None,
    begin: str | None = None,
    only: list[str] | None = None,
    run_dir: str | Path = "",
    folder: Path = NOTEBOOKS,
    cell_timeout: int | None = None,
) -> Path:
    """Check every parameter, execute the notebooks into a run folder, and write `summary.json` there.

    Args:
        params: YAML of parameters for the whole series; None with `begin` means those of the run that goes on.
        overrides: name -> text, as typed on the command line.
        begin: go on from this notebook, in the folder of the latest run.
        only: run only these notebooks.
        run_dir: another folder for the run.
        folder: of the notebooks.
        cell_timeout: seconds a cell may take; None means an hour, or more if the parameter `time_limit` of a
            launch asks for it.

    Returns:
        The run folder.

    Raises:
        BadParameters: before anything is executed.
        SeriesFailed: a notebook failed or a promised part is missing.
    """
    root = go_to_root()
    entries = select(folder, begin, only)
    contracts = [parameters.read_contract(path) for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))]
    if begin and not run_dir and (RUNS / "latest").is_dir():
        run_dir = RUNS / (RUNS / "latest").resolve().name
    if params is None and begin and run_dir and (Path(run_dir) / "params.yaml").exists():
        params = Path(run_dir) / "params.yaml"
    values = parameters.read_params_file(params) if params else {}
    for name, text in (overrides or {}).items():
        values[name] = parameters.from_command_line(name, text, contracts)
    parameters.check(values, contracts)
    if "run_dir" in values:
        raise parameters.BadParameters(
            "run_dir: found it given, and the runner fills it in itself. Use --run-dir."
        )
    if any(entry.name == TRAINING_NOTEBOOK for entry in entries):
        look_first(values)

    cell_timeout = cell_timeout or max(CELL_TIMEOUT, values.get("time_limit", 0) + AROUND_A_LAUNCH)

    run_dir = new_run_dir(run_dir)
    if run_dir.resolve().parent == (root / RUNS).resolve():
        point_latest_to(run_dir)
    record_provenance(run_dir, values)
    numbers = ", ".join(entry.name[:2] for entry in entries)
    source = params or "the defaults of the notebooks"
    print(f"Notebooks {numbers} into {run_dir}/ (parameters: {source})", flush=True)
    try:
        for number, entry in enumerate(entries, 1):
            execute(entry, values, run_dir, f"{number}/{len(entries)}", cell_timeout)
    finally:
        summary = summarise(entries, run_dir)
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(readable(summary, run_dir), flush=True)
    missing = what_is_missing(summary)
    if missing:
        raise SeriesFailed("The run lacks what it promised:\n  " + "\n  ".join(missing))
    return run_dir


def look_first(values: dict) -> None:
    """Look at model and data in the first seconds, and not after the notebooks that come before training.

    Args:
        values: parameters that were given; defaults of the notebooks are known to be good.

    Raises:
        BadParameters: with what the training script would say.
    """
    given = {name: values.get(name) for name in ("model", "dataset", "heldout_dataset")}
    if given["model"] in NAMES:  # made here, and known to be good
        given["model"] = None
    if not any(given.values()):
        return
    from nbutils.launching.first_look import look  # two seconds of imports
    from nbutils.models.hub import CannotDownload

    try:
        look(given)
    except (CannotDownload, FileNotFoundError, ValueError) as problem:
        raise parameters.BadParameters(str(problem)) from None


def execute(entry: Entry, values: dict, run_dir: Path, place: str, cell_timeout: int) -> None:
    """Execute one notebook into the run folder; the executed notebook is kept, whatever happens.

    Raises:
        SeriesFailed: a cell failed, took too long, or its kernel died.
    """
    import papermill

    given = {name: value for name, value in values.items() if name in entry.contract}
    if "run_dir" in entry.contract:
        given["run_dir"] = str(run_dir)
    output = run_dir / f"{entry.name}.ipynb"
    report = _CellLines(f"[{place}] {entry.name}", entry.source, run_dir, injected=bool(given))
    started = time.monotonic()
    entry.status = "failed"
    try:
        papermill.execute_notebook(
            entry.source,
            output,
            given,
            kernel_name="python3",
            progress_bar=False,
            autosave_cell_every=0,  # saved after each cell; no second timer beside it
            execution_timeout=cell_timeout,
            coalesce_streams=True,
            # Its warnings concern servers; an error it logs is the interrupt with which jupyter_client ends it.
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
            on_cell_start=report.begin,
            on_cell_executed=report.end,
        )
        entry.status = "ok"
    except papermill.PapermillExecutionError as error:
        raise SeriesFailed(
            f"{output}: cell In [{error.exec_count}] failed with {error.ename}: {error.evalue}\n"
            f"{_indented(error.source)}\nThe executed notebook, up to this cell, is {output}."
        ) from None
    except (RuntimeError, TimeoutError) as error:  # a dead kernel, a cell that took too long
        cell = report.source or "(before the first cell)"
        raise SeriesFailed(
            f"{output}: {type(error).__name__} in this cell:\n{_indented(cell)}\n{str(error).strip().splitlines()[0]}"
        ) from None
    finally:
        entry.seconds = round(time.monotonic() - started, 1)
        report.close(entry.status, entry.seconds)


def _indented(source: str, lines: int = 12) -> str:
    kept = source.splitlines()
    more = ["..."] if len(kept) > lines else []
    return "\n".join("    " + line for line in kept[:lines] + more)


class _CellLines:
    """Progress on the terminal: one line that is rewritten each second; in a log file a line for each slow cell."""

    SLOW = 5.0  # seconds

    def __init__(self, label: str, notebook: Path, run_dir: Path, injected: bool = False):
        cells = nbformat.read(notebook, as_version=4).cells
        self.label, self.total, self.train_dir = label, len(cells) + injected, run_dir / "train"
        self.source, self.place, self.started, self.seen = "", 0, 0.0, 0
        self.closed = threading.Event()
        if sys.stdout.isatty():
            threading.Thread(target=self._keep_rewriting, daemon=True).start()
        else:
            print(label, flush=True)

    def begin(self, cell, cell_index: int) -> None:
        self.source, self.place, self.started = cell.source, cell_index + 1, time.monotonic()
        self.seen = len(read_progress(self.train_dir))

    def end(self, cell, cell_index: int, **_) -> None:
        seconds = time.monotonic() - self.started
        if not sys.stdout.isatty() and seconds >= self.SLOW:
            print(f"    cell {cell_index + 1}/{self.total}: {seconds:.0f} s", flush=True)

    def line(self) -> str:
        """Where the notebook is; while a launch trains, where the training is."""
        training = read_progress(self.train_dir)[self.seen :]
        seconds = time.monotonic() - self.started
        doing = progress_line(training, seconds) if training else f"{seconds:.0f} s"
        return f"{self.label}  cell {self.place}/{self.total}  {doing}"

    def _keep_rewriting(self) -> None:
        while not self.closed.wait(1.0):
            if self.place:
                print(f"\r\033[K{self.line()}", end="", flush=True)

    def close(self, status: str, seconds: float) -> None:
        self.closed.set()
        start = f"\r\033[K{self.label}  " if sys.stdout.isatty() else "    "
        print(f"{start}{status}, {seconds:.0f} s", flush=True)


# ---- what is needed to repeat the run, and what came out of it ------------------------------------------------------


def record_provenance(run_dir: Path, values: dict) -> None:
    """Write `params.yaml` and `versions.json`: what is needed to repeat the run."""
    (run_dir / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False) if values else "{}\n")
    record = {"commit": commit(), "versions": versions((*STACK, *TOOLS))}
    (run_dir / "versions.json").write_text(json.dumps(record, indent=2) + "\n")


def summarise(entries: list[Entry], run_dir: Path) -> dict:
    """Collect the summary from what lies in the run folder, not from what the notebooks were meant to do."""
    notebooks = []
    for entry in entries:
        counts = count_cells(run_dir / f"{entry.name}.ipynb") if entry.status != "not run" else (0, 0)
        notebooks.append(
            {
                "name": entry.name,
                "status": entry.status,
                "seconds": entry.seconds,
                "code_cells": counts[0],
                "executed_cells": counts[1],
            }
        )
    record = run_dir / "train" / "run.json"
    told = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    training, adapter = told.get("training", {}), told.get("adapter", {})
    return {
        "notebooks": notebooks,
        "training": {name: training.get(name) for name in TRAINING},
        "adapter": {name: adapter.get(name) for name in ADAPTER},
        "versions": versions((*STACK, *TOOLS)),
        "commit": commit(),
    }


def count_cells(notebook: Path) -> tuple[int, int]:
    """The code cells of an executed notebook, blank ones aside, and how many of them have an execution count."""
    if not notebook.exists():
        return 0, 0
    cells = nbformat.read(notebook, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]
    return len(code), sum(cell.execution_count is not None for cell in code)


def what_is_missing(summary: dict) -> list[str]:
    """What a run promised and did not bring: one sentence each, none if all is well."""
    missing = []
    for notebook in summary["notebooks"]:
        if notebook["status"] != "ok" or notebook["executed_cells"] != notebook["code_cells"]:
            missing.append(
                f"{notebook['name']}: {notebook['status']}, {notebook['executed_cells']} of "
                f"{notebook['code_cells']} code cells executed."
            )
    if any(notebook["name"] == TRAINING_NOTEBOOK for notebook in summary["notebooks"]):
        for part in ("training", "adapter"):
            unsaid = [name for name, value in summary[part].items() if value is None]
            if unsaid:
                missing.append(f"train/run.json says nothing about {part}: {', '.join(unsaid)}.")
        if summary["adapter"]["verified"] is not True:
            missing.append("The adapter was not verified.")
    return missing


def readable(summary: dict, run_dir: Path) -> str:
    """The summary as lines for a terminal."""
    lines = ["", f"{'notebook':<28} {'status':<8} {'cells':>7} {'seconds':>8}"]
    for row in summary["notebooks"]:
        cells = f"{row['executed_cells']}/{row['code_cells']}"
        lines.append(f"{row['name']:<28} {row['status']:<8} {cells:>7} {row['seconds']:>8.1f}")
    training, adapter = summary["training"], summary["adapter"]
    if training["distributed_type"] is not None:
        held = ", ".join(f"{count:,}" for count in training["nf4_bytes_per_rank"] or [])
        lines += [
            "",
            f"trained with   {training['distributed_type']} {training['fsdp_version']} on {training['world_size']} "
            f"processes, {training['quant_type']} stored as {training['quant_storage']}",
            f"4-bit bytes    {held} on the ranks, of {training['nf4_bytes_total']:,}",
            f"training loss  {_number(training['loss_first'])} -> {_number(training['loss_last'])}",
            f"held-out loss  {_number(training['held_out_loss_before'])} -> {_number(training['held_out_loss_after'])}",
        ]
    if adapter["path"] is not None:
        lines.append(
            f"adapter        {adapter['path']}: {adapter['tensors']} tensors, "
            f"{'verified' if adapter['verified'] else 'NOT verified'}"
        )
    return "\n".join([*lines, "", f"Everything is in {run_dir}/: open the executed notebooks there."])


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"
