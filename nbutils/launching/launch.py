"""Start a script on several ranks with `accelerate launch`, follow it, and end every rank when it must end.

Run from a notebook cell or a terminal alike. A shell command in a cell (`!accelerate launch ...`) hides a failing exit
status, mixes the tracebacks of all ranks, and leaves ranks behind after an interrupt: torchrun gives each rank a
session of its own, which the terminal's Ctrl-C does not reach.

Beside this module: what is typed and started (`launch_command`), where it is logged (`log_files`), the end of every
process (`process_tree`), a stop that saves (`stop_request`), what failed first (`first_failure`), what is shown
(`progress_display`).
"""

import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from nbutils.common.devices import gpus_shown, no_accelerator
from nbutils.common.disk import refuse_output
from nbutils.common.exit_status import RESUME_ME, all_want_to_be_resumed
from nbutils.common.paths import from_here
from nbutils.common.progress_file import ProgressReader
from nbutils.launching.config_faults import refuse_bad_config
from nbutils.launching.first_failure import exit_statuses, first_failure
from nbutils.launching.kernel_memory import give_back
from nbutils.launching.launch_command import (
    as_started,
    copyable,
    environment_of_ranks,
    launch_command,
    resuming,
)
from nbutils.launching.log_files import own_folder, own_log
from nbutils.launching.out_of_memory import advice
from nbutils.launching.process_tree import ProcessTree, end_with_parent
from nbutils.launching.progress_display import ProgressDisplay
from nbutils.launching.recipe_faults import refuse_for_recipe
from nbutils.launching.script_file import is_recipe
from nbutils.launching.stop_request import StopRequest

POLL = 0.25  # seconds between two looks at the run
SAVE_GRACE = 300.0  # seconds that ranks have to finish a step and save, once they are asked to end
HAVE_SAVED = f"They have saved (exit status {RESUME_ME})."
REHEARSAL = "nbutils.launching.rehearsal"


class LaunchFailed(RuntimeError):
    """A launch did not end well; the message ends with the first failing rank's own error.

    Attributes:
        rank: the rank that failed first, over all machines, or None if no rank had begun.
        error: its error, the last lines of its traceback.
        log: the file with the output of all ranks.
        returncode: the exit status of `accelerate launch`; None if it had to be ended.
    """

    def __init__(
        self,
        message: str,
        *,
        log: Path,
        rank: int | None = None,
        error: str = "",
        returncode: int | None = None,
    ):
        super().__init__(message)
        self.log, self.rank, self.error, self.returncode = log, rank, error, returncode


class LaunchStopped(LaunchFailed):
    """A launch was asked to end before its work was done; the message says whether it saved, and how to go on.

    Attributes:
        saved: every rank said with its exit status, 75, that it has saved.
    """

    def __init__(self, message: str, *, log: Path, saved: bool):
        super().__init__(message, log=log)
        self.saved = saved


@dataclass
class LaunchResult:
    """What a launch that ended well leaves: its command, its log, its seconds, and its progress lines."""

    command: str
    log: Path
    seconds: float
    progress: list[dict] = field(default_factory=list, repr=False)


def choose_config(fsdp_version: int = 1, rehearsal: bool | None = None) -> Path:
    """The file for `accelerate launch` that fits this machine.

    Args:
        fsdp_version: 1 or 2.
        rehearsal: True for a machine without GPUs; None means to look.

    Returns:
        A path under `configs/accelerate` of the repository, as it is called from the working directory.

    Raises:
        ValueError: another version of FSDP is asked for.
    """
    if fsdp_version not in (1, 2):
        raise ValueError(f"fsdp_version is {fsdp_version!r}; it must be 1 or 2.")
    rehearsal = no_accelerator() if rehearsal is None else rehearsal
    if rehearsal:
        return from_here(f"configs/accelerate/rehearsal_fsdp{fsdp_version}.yaml")
    return from_here(
        "configs/accelerate/config_fsdp.yaml" if fsdp_version == 1 else "configs/accelerate/config_fsdp2.yaml"
    )


def launch(
    script: str | Path,
    args: list[str],
    config: str | Path,
    *,
    log: str | Path,
    rehearsal: bool | None = None,
    module: str | None = None,
    num_processes: int | None = None,
    output_dir: str | Path | None = None,
    timeout: float = 3600,
    save_grace: float = SAVE_GRACE,
    show: bool = True,
) -> LaunchResult:
    """Run a script on several ranks with `accelerate launch`, and wait for the end.

    Args:
        script: the training script.
        args: its arguments.
        config: YAML file for `accelerate launch`.
        log: file for the output of all ranks; that of each rank alone goes into a folder beside it. If another launch
            writes to it now, this one takes the next free name; result and error name it.
        rehearsal: run real FSDP on the CPU; None means: if no CUDA device is seen.
        module: a Python module that runs the script in place of `nbutils.launching.rehearsal`.
        num_processes: ranks; None means what the file says.
        output_dir: folder where the script writes `progress.jsonl`; without it only the time passed is shown.
        timeout: seconds after which every rank is asked to end, with SIGTERM.
        save_grace: seconds that the ranks then have to save; after them they are ended.
        show: print the command and show a progress line.

    Raises:
        BadConfig, Refused, FileNotFoundError: config, output folder or script; nothing was started or written.
        LaunchStopped: the time was up, or this process was told to end (SIGTERM).
        LaunchFailed: the exit status was not zero.
        KeyboardInterrupt: passed on after every rank has been ended.
    """
    command = _checked_command(script, args, config, rehearsal, module, num_processes)
    if output_dir:
        refuse_output(Path(output_dir))
    progress = ProgressReader(output_dir, from_end=True) if output_dir else None
    with own_log(Path(log)) as (path, out):
        run = _Run(command, path, out, progress, ProgressDisplay(show))
        failed = run.to_its_end(timeout, save_grace)
    if failed and "OutOfMemoryError" in failed.error and (told := advice(args, config, num_processes)):
        failed.args = (f"{told}\n{failed}",)
    if failed:
        raise failed
    return LaunchResult(copyable(command), path, run.seconds, run.lines())


def _checked_command(script, args, config, rehearsal, module, num_processes) -> list[str]:
    """The words of `accelerate launch`, once the config and the script have been looked at."""
    rehearsal = no_accelerator() if rehearsal is None else rehearsal
    module = module or (REHEARSAL if rehearsal else None)
    gpus = None if rehearsal else gpus_shown()
    if is_recipe(script):  # first: this does without accelerate, which takes seconds to import
        refuse_for_recipe(config, num_processes, gpus)
    content = refuse_bad_config(config, num_processes, gpus)
    if not Path(script).is_file():
        raise FileNotFoundError(f"There is no script {script}. Write it: python -m nbutils script FOLDER")
    any_port = content.get("num_machines", 1) == 1  # several machines must agree on the one in the file
    return launch_command(script, args, config, module, num_processes, any_port)


class _Run:
    """One launch between its start and its end."""

    def __init__(
        self,
        command: list[str],
        log: Path,
        out: TextIO,
        progress: ProgressReader | None,
        display: ProgressDisplay,
    ):
        self.command, self.log, self.out, self.display = command, log, out, display
        self.progress = progress
        self.rank_logs = own_folder(log)
        self.seconds = 0.0

    def lines(self) -> list[dict]:
        return self.progress.read() if self.progress else []

    def to_its_end(self, timeout: float, save_grace: float) -> LaunchFailed | None:
        """Start the ranks and wait; whatever happens, none is left."""
        self.display.begin(copyable(self.command), give_back())
        started = time.monotonic()
        launcher = self._start(save_grace)
        ranks = ProcessTree(launcher)
        stop = StopRequest(ranks, timeout, save_grace)
        try:
            with stop.hear_sigterm():
                while launcher.poll() is None and not stop.over:
                    ranks.look()
                    stop.look()
                    self.seconds = time.monotonic() - started
                    self.display.update(self.lines(), self.seconds)
                    time.sleep(POLL)
        finally:
            ended_alone = launcher.poll() is not None
            ranks.end()
        self.seconds = time.monotonic() - started
        status = launcher.returncode
        ok = status == 0 and ended_alone  # torchrun may end with 0 after a SIGTERM of ours
        codes = exit_statuses(self.log) if ended_alone else set()
        told = codes == {RESUME_ME} or (ended_alone and not codes and all_want_to_be_resumed(self.rank_logs))
        saved = told and not ok
        how = "finished" if ok else "stopped and saved" if saved else "failed"
        self.display.close(self.lines(), self.seconds, how)
        if ok:
            return None
        if saved or (stop.why and codes <= {RESUME_ME, -signal.SIGTERM}):
            return self._stopped(stop, saved)
        failure = first_failure(self.log, self.rank_logs, status)
        message = f"{stop.why}\n{failure.message}".lstrip()
        return LaunchFailed(message, log=self.log, rank=failure.rank, error=failure.error, returncode=status)

    def _start(self, save_grace: float) -> subprocess.Popen:
        return subprocess.Popen(
            as_started(self.command, self.rank_logs),
            stdout=self.out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment_of_ranks(save_grace),
            start_new_session=True,  # a Ctrl-C reaches us alone, and we end the ranks in order
            preexec_fn=end_with_parent,
        )

    def _stopped(self, stop: StopRequest, saved: bool) -> LaunchStopped:
        why = stop.why or "The ranks were told to end."
        if saved:
            then = f"{HAVE_SAVED} Go on with:\n{copyable(resuming(self.command))}"
        else:
            late = f" within {stop.save_grace:g} s, and were ended" if stop.over else ""
            then = (
                f"They did not say that they have saved{late}. Where the run keeps checkpoints, go on from the "
                f"newest with:\n{copyable(resuming(self.command))}\n"
                "For more time: timeout=..., --time-limit on the command line, the parameter time_limit of a notebook."
            )
        where = f"The log of all ranks, which shows where they stood: {self.log}\n"
        return LaunchStopped(f"{where}{why} {then}", log=self.log, saved=saved)
