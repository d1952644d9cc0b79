"""Start a script on several ranks with `accelerate launch`, follow it, and end every rank when it must end.

Run from a notebook cell or a terminal alike. A shell command in a cell (`!accelerate launch ...`) hides a failing exit
status, mixes the tracebacks of all ranks, and leaves ranks behind after an interrupt: torchrun gives each rank a
session of its own, which the terminal's Ctrl-C does not reach.
"""

import ctypes
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from nbutils.common.devices import gpus_shown, no_accelerator
from nbutils.common.paths import ROOT, from_here
from nbutils.common.progress_file import read_progress
from nbutils.launching.config_faults import refuse_bad_config
from nbutils.launching.kernel_memory import give_back
from nbutils.launching.out_of_memory import advice

POLL = 0.25  # seconds between two looks at the run
GRACE = 3.0  # seconds a rank has to end by itself before it is killed
REHEARSAL = "nbutils.launching.rehearsal"


class LaunchFailed(RuntimeError):
    """A launch did not end well; the message ends with the first failing rank's own error.

    Attributes:
        rank: the rank that failed first, or None if no rank had begun.
        error: its error, the last lines of its traceback.
        log: the file with the output of all ranks.
        returncode: the exit status of `accelerate launch`; None after a time-out.
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
    show: bool = True,
    live: bool = False,
) -> LaunchResult:
    """Run a script on several ranks with `accelerate launch`, and wait for the end.

    Args:
        script: the training script.
        args: its arguments.
        config: YAML file for `accelerate launch`.
        log: file for the output of all ranks, each line with its rank; its folder is made if missing. The output
            of each rank on its own, and its error, go into a folder beside it.
        rehearsal: run real FSDP on the CPU (see `nbutils.launching.rehearsal`); None means: if no CUDA device is seen.
        module: a Python module that runs the script in place of `nbutils.launching.rehearsal`.
        num_processes: ranks; None means what the file says.
        output_dir: folder where the script writes `progress.jsonl`; without it only the time passed is shown.
        timeout: seconds after which every rank is ended.
        show: print the command and show a progress line.
        live: draw the loss while the script trains, in Jupyter.

    Returns:
        The command, the log, the seconds and the progress lines.

    Raises:
        BadConfig: the config file would not start what was meant; nothing was started or written.
        FileNotFoundError: there is no such script; as above.
        LaunchFailed: the exit status was not zero, or the time was up.
        KeyboardInterrupt: passed on after every rank has been ended.
    """
    rehearsal = no_accelerator() if rehearsal is None else rehearsal
    module = module or (REHEARSAL if rehearsal else None)
    content = refuse_bad_config(config, num_processes, gpus=None if rehearsal else gpus_shown())
    if not Path(script).is_file():
        raise FileNotFoundError(f"There is no script {script}. Write it: python -m nbutils script FOLDER")
    log = Path(log)
    log.parent.mkdir(parents=True, exist_ok=True)
    rank_logs = log.with_name(log.stem + "_ranks") / time.strftime("%H%M%S", time.gmtime())
    any_port = content.get("num_machines", 1) == 1  # several machines must agree on the one in the file
    command = launch_command(script, args, config, module, num_processes, any_port)
    words = command[:2] + ["--log_dir", str(rank_logs), "--tee", "3"] + command[2:]
    if show:
        print(copyable(command), flush=True)

    if in_the_way := give_back():
        print(in_the_way, flush=True)

    seen_before = len(read_progress(output_dir)) if output_dir else 0
    display = _Display(show, live)
    started = time.monotonic()
    ranks = _Family()
    with log.open("w") as out:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", *words[2:]],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={
                # Blocks that can grow: without them a GPU that is nearly full ends with room that nothing fits into.
                "PYTORCH_ALLOC_CONF": "expandable_segments:True",
                **os.environ,
                "PYTHONUNBUFFERED": "1",
                "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[rank ${rank}] ",
            },
            start_new_session=True,  # a Ctrl-C reaches us alone, and we end the ranks in order
            preexec_fn=_end_with_parent,
        )
        try:
            while launcher.poll() is None:
                ranks.look(launcher.pid)
                seconds = time.monotonic() - started
                display.update(_new_lines(output_dir, seen_before), seconds)
                if seconds > timeout:
                    raise LaunchFailed(
                        f"The log of all ranks, which shows where they stood: {log}\nThe launch had not ended after "
                        f"{timeout:g} s, and all its ranks were ended. Allow it more with timeout=...",
                        log=log,
                    )
                time.sleep(POLL)
        finally:
            ranks.end(launcher)
    progress = _new_lines(output_dir, seen_before)
    seconds = time.monotonic() - started
    display.close(progress, seconds, ok=launcher.returncode == 0)
    if launcher.returncode != 0:
        failure = first_failure(log, rank_logs, launcher.returncode)
        if "OutOfMemoryError" in failure.error and (told := advice(args, config, num_processes)):
            failure.args = (f"{told}\n{failure}",)
        raise failure
    return LaunchResult(copyable(command), log, seconds, progress)


def launch_command(
    script: str | Path,
    args: list[str],
    config: str | Path,
    module: str | None = None,
    num_processes: int | None = None,
    any_port: bool = True,
) -> list[str]:
    """The words of the command line, as a reader would type it; port 0 means any free port."""
    words = ["accelerate", "launch", "--config_file", str(config)]
    if any_port:
        words += ["--main_process_port", "0"]
    if num_processes is not None:
        words += ["--num_processes", str(num_processes)]
    if module:
        words += ["-m", module]
    return words + [str(script), *map(str, args)]


def copyable(command: list[str]) -> str:
    """A command line in lines of at most about 100 characters that a shell accepts as one."""
    lines, line = [], ""
    for word, following in zip(command, [*command[1:], ""]):
        piece = shlex.quote(word)
        pair = f"{piece} {shlex.quote(following)}" if word.startswith("-") else piece
        if line and len(line) + len(pair) > 98:
            lines.append(line)
            line = "    " + piece
        else:
            line = f"{line} {piece}" if line else piece
    return " \\\n".join([*lines, line])


# ---- the end of all ranks -------------------------------------------------------------------------------------------

_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """Runs in the launcher before it begins: if the kernel of the notebook dies, the launcher gets SIGTERM."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class _Family:
    """Every process that the launcher has started, directly or not, as long as it lives."""

    def __init__(self):
        self.members: dict[int, psutil.Process] = {}

    def look(self, pid: int) -> None:
        """Remember the descendants that are alive now: after the launcher's death nobody can list them."""
        try:
            for child in psutil.Process(pid).children(recursive=True):
                self.members.setdefault(child.pid, child)
        except psutil.NoSuchProcess:
            pass

    def end(self, launcher: subprocess.Popen) -> None:
        """End the launcher and every rank: ask first, kill after `GRACE` seconds."""
        with _without_interrupts():
            self.look(launcher.pid)
            for pid in list(self.members):
                self.look(pid)
            living = [member for member in self.members.values() if member.is_running()]
            if launcher.poll() is None:
                living.append(psutil.Process(launcher.pid))
            for signal_, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
                for process in living:
                    try:
                        process.send_signal(signal_)  # psutil checks that the id is still the same process
                    except psutil.NoSuchProcess:
                        continue
                _, living = psutil.wait_procs(living, timeout=patience)
            launcher.wait()


@contextmanager
def _without_interrupts():
    """A second, impatient Ctrl-C must not stop the clearing up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# ---- which rank failed first ----------------------------------------------------------------------------------------

WHY_KILLED = {
    signal.SIGKILL: " The kernel does this when host memory runs out.",
    signal.SIGBUS: " A file that it had mapped became shorter or its disk went away: the model's, most likely.",
    signal.SIGXFSZ: " A file it wrote reached the limit for its size: see `ulimit -f`.",
}
_FAILED = re.compile(r"rank\s+: (\d+) \(local_rank: \d+\)\s+exitcode\s+: (-?\d+) \(pid: (\d+)\)")
_ENDED_BY_AGENT = re.compile(r"Sending process (\d+) closing signal")


def first_failure(log: Path, rank_logs: Path, returncode: int) -> LaunchFailed:
    """Find out which rank failed first, and with what.

    torchrun ends the other ranks when one has failed, and ranks that wait for a dead one raise errors of their own:
    the last traceback in a log is seldom the cause. A rank that was killed from outside comes first; else the rank
    whose error was written first.

    Args:
        log: the output of all ranks.
        rank_logs: the `--log_dir` of the launch, with `error.json` and `stderr.log` for each rank.
        returncode: the exit status of `accelerate launch`.

    Returns:
        The exception to raise.
    """
    text = log.read_text(errors="replace")
    ended_by_agent = {int(pid) for pid in _ENDED_BY_AGENT.findall(text)}
    exits = {int(rank): (int(code), int(pid)) for rank, code, pid in _FAILED.findall(text)}
    where = (
        f"The log of all ranks: {log}\n"  # the cause comes last: it is what a terminal shows at the bottom
    )

    for rank, (code, pid) in sorted(exits.items()):
        if code < 0 and pid not in ended_by_agent and -code not in (signal.SIGABRT, signal.SIGTERM):
            name = signal.Signals(-code).name
            error = f"Rank {rank} was killed by signal {-code} ({name}).{WHY_KILLED.get(-code, '')}"
            return LaunchFailed(where + error, log=log, rank=rank, error=error, returncode=returncode)

    errors = []  # (time, rank, message, place)
    for folder in (path for path in rank_logs.glob("*/attempt_*/*") if path.name.isdigit()):
        rank = int(folder.name)
        if (folder / "error.json").exists():
            errors.append(
                ((folder / "error.json").stat().st_mtime_ns, rank, *_recorded(folder / "error.json"))
            )
        elif rank in exits and exits[rank][1] not in ended_by_agent and (folder / "stderr.log").exists():
            tail = _last_words((folder / "stderr.log").read_text(errors="replace"))
            errors.append(((folder / "stderr.log").stat().st_mtime_ns, rank, tail, ""))
    if errors:
        _, rank, error, place = min(errors)
        message = f"{where}Rank {rank} failed first{place}:\n{error}"
        return LaunchFailed(message, log=log, rank=rank, error=error, returncode=returncode)
    error = _last_words(text)
    message = (
        f"{where}accelerate launch ended with exit status {returncode} before any rank reported an error:\n"
    )
    return LaunchFailed(message + error, log=log, error=error, returncode=returncode)


def _recorded(path: Path) -> tuple[str, str]:
    """The error that `torch.distributed.elastic`'s `record` wrote, and the place in the code where it arose."""
    try:
        message = json.loads(path.read_text(encoding="utf-8"))["message"]
    except (ValueError, KeyError):  # the rank was ended while it wrote
        return "(its error file is damaged; see the log)", ""
    if isinstance(message, str):
        return message, ""
    stack = message.get("extraInfo", {}).get("py_callstack", "")
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', stack)
    if not frames:
        return message["message"], ""
    file, line, function = frames[-1]
    return message["message"], f", in {function}(), {_short(file)}, line {line}"


def _short(path: str) -> str:
    """A path without what is private to this machine."""
    if "site-packages/" in path:
        return path.rsplit("site-packages/")[-1]
    return os.path.relpath(path, ROOT) if path.startswith(str(ROOT)) else Path(path).name


def _last_words(text: str) -> str:
    """The last error of a text: from the last line that is no part of a traceback's frames, or its last lines.

    A thread of C++, such as NCCL's watchdog, ends the process without a Python error. Its words follow `what():`, and
    below them stand hundreds of lines that Python writes when it is aborted.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    for number in range(len(lines) - 1, -1, -1):
        if thrown := re.match(r"(?:\[rank \d+\] ?:?)?\s*what\(\):\s+(.+)", lines[number]):
            return thrown.group(1)
        if re.match(r"(\[rank \d+\] ?:?)?\s*[\w.]+(Error|Exception|Exit|Interrupt|Failed)\b", lines[number]):
            return "\n".join(lines[number : number + 10])
    return "\n".join(lines[-5:]) or "(it printed nothing)"


# ---- what the reader sees -------------------------------------------------------------------------------------------


def _new_lines(output_dir: str | Path | None, seen_before: int) -> list[dict]:
    """The progress lines of this launch; an older run may have left its own in the same folder."""
    lines = read_progress(output_dir) if output_dir else []
    return lines[seen_before:] if len(lines) >= seen_before else lines


def progress_line(lines: list[dict], seconds: float) -> str:
    """One line: bar, step, loss, time left.

    Args:
        lines: what `read_progress` returned, oldest first.
        seconds: since the launch.
    """
    if not lines:
        return f"starting the ranks and loading the model ... {_clock(seconds)}"
    step, steps = lines[-1]["step"], max(1, lines[-1]["max_steps"])
    parts = [f"[{'#' * round(20 * step / steps):.<20}] step {step}/{steps}"]
    for name, label in (("loss", "loss"), ("eval_loss", "held-out loss")):
        values = [line[name] for line in lines if name in line]
        if values:
            parts.append(f"{label} {values[-1]:.4f}")
    if 0 < step < steps:
        parts.append(f"{_clock(lines[-1]['seconds'] / step * (steps - step))} left")
    return " | ".join(parts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class _Display:
    """The progress line: rewritten in a notebook and in a terminal; elsewhere its last state, once."""

    def __init__(self, show: bool, live: bool):
        self.show, self.live = show, live
        self.handle = None
        self.last = 0.0
        self.notebook = show and _in_notebook()

    def update(self, lines: list[dict], seconds: float) -> None:
        if not self.show or seconds - self.last < 1:
            return
        self.last = seconds
        self._put(progress_line(lines, seconds), lines)

    def close(self, lines: list[dict], seconds: float, ok: bool) -> None:
        if not self.show:
            return
        text = progress_line(lines, seconds) if lines else ""
        ending = f"{'finished' if ok else 'failed'} after {_clock(seconds)}"
        self._put(f"{text} | {ending}" if text else ending, lines, final=True)

    def _put(self, text: str, lines: list[dict], final: bool = False) -> None:
        if self.notebook:
            self._rewrite(text, lines, final)
        elif sys.stdout.isatty():
            print(f"\r\033[K{text}", end="\n" if final else "", flush=True)
        elif final:
            print(text, flush=True)

    def _rewrite(self, text: str, lines: list[dict], final: bool) -> None:
        from IPython.display import display

        if self.live and not final:
            text = f"{text}\n\n{loss_curve(lines)}"
        bundle = {"text/plain": text}
        if self.handle is None:
            self.handle = display(bundle, raw=True, display_id=True)
        else:
            self.handle.update(bundle, raw=True)


def _in_notebook() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and hasattr(shell, "kernel")


def loss_curve(lines: list[dict], height: int = 8, width: int = 60) -> str:
    """The training loss as a small chart of characters, which every front end shows."""
    losses = [line["loss"] for line in lines if "loss" in line][-width:]
    if len(losses) < 2:
        return ""
    low, high = min(losses), max(losses)
    rows = [round((loss - low) / ((high - low) or 1) * (height - 1)) for loss in losses]
    chart = ["".join("o" if row == level else " " for row in rows) for level in range(height - 1, -1, -1)]
    chart[0] = f"{high:8.4f} |{chart[0]}"
    chart[-1] = f"{low:8.4f} |{chart[-1]}"
    return "\n".join([chart[0], *(f"{'':8} |{line}" for line in chart[1:-1]), chart[-1]])
