"""What `make real` does, with minutes and the memory of each process: losses, the proof of the adapter, all prompts.

Run as: python benchmarks/smollm2_make_real.py    (minutes; let nothing else run meanwhile)

The two commands of `make real` run as they stand in the Makefile, in the environment that is there already. In a clean
clone the first fetches 93 MB, and the second also makes the tiny base, which the exercises of notebook 04 use.
Writes benchmarks/results/smollm2_make_real.json.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
from smollm2_losses import write

from nbutils.common.paths import ROOT, go_to_root
from nbutils.launching.script_file import SCRIPT

RUN_DIR = "runs/real"
COMMANDS = re.compile(r"^\t\$\(BIN\)/python (-m nbutils .*)$", re.MULTILINE)
BF16_UNITS = ("avx512_bf16", "amx_bf16")  # what makes bf16 fast on a CPU


def commands() -> list[list[str]]:
    """The words of each command of `make real`, as the Makefile has them; the run goes into one known folder."""
    target = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nreal:", 1)[1].split("\n\n", 1)[0]
    found = [line.split() for line in COMMANDS.findall(target)]
    return [words + ["--run-dir", RUN_DIR] * ("run" in words) for words in found]


def kind(process: psutil.Process) -> str:
    """What a process is for: a rank of the training, a notebook's kernel, or something else."""
    words = " ".join(process.cmdline())
    if SCRIPT in words and "accelerate.commands" not in words:
        return "rank"
    return "notebook" if "ipykernel" in words else "other"


def watched(words: list[str]) -> dict:
    """Run a command; its seconds, and the highest memory of any process of each kind, and of all together."""
    started = time.monotonic()
    peaks = {"together": 0}
    with subprocess.Popen([sys.executable, *words]) as running:
        root = psutil.Process(running.pid)
        while running.poll() is None:
            together = 0
            for process in [root, *root.children(recursive=True)]:
                try:
                    name, held = kind(process), process.memory_full_info().pss
                except psutil.Error:
                    continue
                together += held
                peaks[name] = max(peaks.get(name, 0), held)
            peaks["together"] = max(peaks["together"], together)
            time.sleep(1)
    if running.returncode:
        raise SystemExit(f"{' '.join(words)} ended with status {running.returncode}.")
    return {
        "command": " ".join(["python", *words]),
        "seconds": round(time.monotonic() - started),
        "peak_bytes": peaks,
    }


def prompts(notebook: Path) -> str:
    """The table of notebook 05 with every question that it asks, before and after, as Markdown."""
    cells = nbformat.read(notebook, as_version=4).cells
    asked = next(cell for cell in cells if "| question | base | tuned |" in cell.source)
    return next(out.data["text/markdown"] for out in asked.outputs if "text/markdown" in out.get("data", {}))


def main() -> None:
    """Run the commands, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="smollm2_make_real", help="name of the record in benchmarks/results")
    options = parser.parse_args()
    go_to_root()
    done = [watched(words) for words in commands()]
    run = json.loads((Path(RUN_DIR) / "summary.json").read_text(encoding="utf-8"))
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    write(
        options.out,
        "python benchmarks/smollm2_make_real.py",
        "make real: SmolLM2-135M-Instruct trained, saved, verified and used; seconds, memory, losses, prompts",
        bf16_units_of_the_cpu=[unit for unit in BF16_UNITS if unit in flags],
        commands=done,
        seconds=sum(command["seconds"] for command in done),
        notebooks={notebook["name"]: round(notebook["seconds"]) for notebook in run["notebooks"]},
        training=run["training"],
        adapter=run["adapter"],
        prompts=prompts(Path(RUN_DIR) / "05_save_verify_merge.ipynb"),
    )


if __name__ == "__main__":
    main()
