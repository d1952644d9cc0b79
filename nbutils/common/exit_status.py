"""The exit status by which a rank, a launch and a run of the series say that there is more to do.

torchrun ends with 1 and without a summary if it gets a SIGTERM itself, as when Slurm signals every process of a job,
whatever its ranks say. So a rank leaves a note as well, beside the file for errors that torchrun gives each of them.
"""

import os
import sys
from pathlib import Path
from typing import NoReturn

RESUME_ME = (
    75  # EX_TEMPFAIL of sysexits.h, "try again later": asked to end, it has saved, and wants to be resumed
)
NOTE = "resume_me"


def end_to_be_resumed() -> NoReturn:
    """End this process with status 75, and leave the note."""
    if errors := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(errors).with_name(NOTE).touch()
    sys.exit(RESUME_ME)


def all_want_to_be_resumed(rank_logs: Path) -> bool:
    """Has every rank of this machine left its note?

    Args:
        rank_logs: the `--log_dir` of the launch: a folder for each rank, by its number on this machine.
    """
    folders = [path for path in rank_logs.glob("*/attempt_*/*") if path.name.isdigit()]
    return bool(folders) and all((folder / NOTE).exists() for folder in folders)
