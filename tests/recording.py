"""Write what a long test found, with where, when and on what it was run."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from nbutils.course import ROOT

PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "bitsandbytes", "safetensors")


def record(what: str, command: str, **results) -> None:
    """Write results to the file that the environment variable RECORD names; nothing if it names none."""
    if not os.environ.get("RECORD"):
        return
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    commit = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    report = {
        "what": what,
        "machine": {"cpu": cpus[0].split(":")[1].strip(), "cores": len(cpus), "gpus": []},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": command,
        **results,
    }
    Path(os.environ["RECORD"]).write_text(json.dumps(report, indent=1) + "\n")
