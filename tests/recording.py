"""Write what a long test found, with where, when and on what it was run."""

import json
import os
from pathlib import Path

from nbutils.common.provenance import provenance


def record(what: str, command: str, **results) -> None:
    """Write results to the file that the environment variable RECORD names; nothing if it names none."""
    if not os.environ.get("RECORD"):
        return
    report = {"what": what, **provenance(command), **results}
    Path(os.environ["RECORD"]).write_text(json.dumps(report, indent=1) + "\n")
