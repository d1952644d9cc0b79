"""Where a measurement on CPUs comes from: machine, versions, commit, date."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "bitsandbytes", "datasets")


def provenance(command: str) -> dict:
    """What every recorded file says about itself.

    Args:
        command: that made it.

    Returns:
        `machine`, `versions`, `commit`, `date` and `command`. The commit ends in `-dirty` if files were changed.
    """
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpus = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    commit = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    return {
        "machine": {"cpu": cpus[0], "cores": len(cpus), "gpus": []},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "commit": subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": command,
    }
