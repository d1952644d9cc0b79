"""Run the notebooks in order with papermill, and say at the end what came out."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from nbutils.common.paths import RUNS, go_to_root, new_run_dir, point_latest_to
from nbutils.launching.launch import HAVE_SAVED
from nbutils.lessons.course_map import number
from nbutils.models.made_here import NAMES
from nbutils.publishing import parameters
from nbutils.publishing.cell_progress import CellProgress
from nbutils.publishing.run_summary import (
    TRAINING_NOTEBOOK,
    readable,
    record_provenance,
    summarise,
    what_is_missing,
)

NOTEBOOKS = Path("notebooks")
CELL_TIMEOUT = 3600  # seconds, if a launch may not take longer; papermill has no limit of its own
AROUND_A_LAUNCH = 600  # seconds that a cell may take in addition to the launch in it


class SeriesFailed(RuntimeError):
    """A notebook failed, or the run lacks a part that it promised.

    Attributes:
        saved: the training of a notebook was asked to stop, and has saved.
    """

    def __init__(self, message: str, saved: bool = False):
        super().__init__(message)
        self.saved = saved


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
    paths = sorted(folder.glob("[0-9]*_*.ipynb"))
    numbers = [number(path.stem) for path in paths]
    for asked in [*([begin] if begin else []), *(only or [])]:
        if asked not in numbers:
            raise parameters.BadParameters(
                f"There is no notebook {asked} in {folder}/; found {', '.join(numbers)}."
            )
    chosen = [
        path for path, its in zip(paths, numbers) if (not begin or its >= begin) and (not only or its in only)
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
    go_to_root()
    entries = select(folder, begin, only)
    if begin and not run_dir and (RUNS / "latest").is_dir():
        run_dir = RUNS / (RUNS / "latest").resolve().name
    if params is None and begin and run_dir and (Path(run_dir) / "params.yaml").exists():
        params = Path(run_dir) / "params.yaml"
    values = _checked_values(params, overrides or {}, folder)
    if any(entry.name == TRAINING_NOTEBOOK for entry in entries):
        look_first(values)
    run_dir = _new_folder(run_dir, values)
    numbers = ", ".join(number(entry.name) for entry in entries)
    source = params or "the defaults of the notebooks"
    print(f"Notebooks {numbers} into {run_dir}/ (parameters: {source})", flush=True)
    cell_timeout = cell_timeout or max(CELL_TIMEOUT, values.get("time_limit", 0) + AROUND_A_LAUNCH)
    _execute_all(entries, values, run_dir, cell_timeout)
    return run_dir


def _checked_values(params: Path | None, overrides: dict[str, str], folder: Path) -> dict:
    contracts = [parameters.read_contract(path) for path in sorted(folder.glob("[0-9]*_*.ipynb"))]
    values = parameters.read_params_file(params) if params else {}
    for name, text in overrides.items():
        values[name] = parameters.from_command_line(name, text, contracts)
    parameters.check(values, contracts)
    if "run_dir" in values:
        raise parameters.BadParameters(
            "run_dir: found it given, and the runner fills it in itself. Use --run-dir."
        )
    return values


def _new_folder(wanted: str | Path, values: dict) -> Path:
    run_dir = new_run_dir(wanted)
    if run_dir.resolve().parent == RUNS.resolve():
        point_latest_to(run_dir)
    record_provenance(run_dir, values)
    return run_dir


def _execute_all(entries: list[Entry], values: dict, run_dir: Path, cell_timeout: int) -> None:
    try:
        with _passing_on_sigterm():
            for number, entry in enumerate(entries, 1):
                execute(entry, values, run_dir, f"{number}/{len(entries)}", cell_timeout)
    finally:
        summary = summarise(entries, run_dir)
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(readable(summary, run_dir), flush=True)
    missing = what_is_missing(summary)
    if missing:
        raise SeriesFailed("The run lacks what it promised:\n  " + "\n  ".join(missing))


@contextmanager
def _passing_on_sigterm() -> Iterator[None]:
    """A SIGTERM (Slurm's, a cloud's) goes to the kernel: a launch in it lets its ranks save, anything else ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(*_) -> None:
        for kernel in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                kernel.send_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


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
    config = values.get("accelerate_config")
    if not config and not any(given.values()):
        return
    from nbutils.launching.first_look import look  # two seconds of imports
    from nbutils.models.hub import CannotDownload

    try:
        look(given, config, values.get("num_processes"))
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
    report = CellProgress(f"[{place}] {entry.name}", entry.source, run_dir, injected=bool(given))
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
        saved = error.ename == "LaunchStopped" and HAVE_SAVED in error.evalue
        words = f"python -m nbutils run --from {number(entry.name)} --run-dir {run_dir}"
        raise SeriesFailed(
            f"{output}: cell In [{error.exec_count}] failed with {error.ename}: {error.evalue}\n"
            f"{_indented(error.source)}\nThe executed notebook, up to this cell, is {output}."
            + f"\nThe series goes on from there, with its parameters: {words}"
            * saved,
            saved,
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
