"""The command line of a launch: as a reader would type it, and as it is started."""

import os
import shlex
import sys
from pathlib import Path


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


def resuming(command: list[str]) -> list[str]:
    """The same command, with the script told to go on from its newest checkpoint."""
    return command if "--resume" in command else [*command, "--resume", "true"]


def as_started(command: list[str], rank_logs: Path) -> list[str]:
    """The same command with this Python, and with the output of each rank in a folder of its own besides."""
    program = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*program, "--log_dir", str(rank_logs), "--tee", "3", *command[2:]]


def environment_of_ranks(save_grace: float) -> dict[str, str]:
    """What the launcher and its ranks get besides what this process has.

    Args:
        save_grace: seconds that torchrun gives ranks that were asked to end before it kills them.
    """
    return {
        # Blocks that can grow: without them a GPU that is nearly full ends with room that nothing fits into.
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(round(save_grace)),
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",  # under another locale, names that libraries in Rust write would be others than Python's
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[rank ${rank}] ",
    }


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
