"""Where the seconds of a tiny launch go, before and after a change of the package, in alternating runs.

Run as: python benchmarks/launch_seconds.py --before 55c7036 --out benchmarks/results/launch_seconds.json
        (7 minutes on two busy cores; better, nothing else runs)

The real script on two CPU processes, two steps. Marks are printed from a copy of it: after its imports, when model and
data are there, when the trainer is. `--before` names the commit to compare with; its tree is checked out on the side.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from nbutils.common.paths import ROOT, go_to_root
from nbutils.common.provenance import provenance
from nbutils.launching.script_file import script_text
from nbutils.models.tiny import tiny_base

MARK = 'print("mark {0} %.3f" % __import__("time").time(), flush=True)\n'
# A mark, and the beginning of the line of the script before which it stands.
MARKS = {
    "rehearsal ready": "import json",
    "script's imports": "@dataclass",
    "model and data": "    trainer = ",
    "trainer": "    trainer.train(",
}
SETTINGS = {
    "dataset": "data/instructions/train.jsonl",
    "heldout_dataset": "data/instructions/heldout.jsonl",
    "max_steps": 2,
    "max_length": 128,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 8,
    "lora_r": 8,
    "logging_steps": 1,
    "eval_steps": 100,
    "save_strategy": "no",
    "disable_tqdm": True,
}
# Changes of what one process does when it imports what the script imports, each alone.
IMPORTS = {
    "as it is": "",
    "fewer collections": "import gc; gc.set_threshold(100_000)\n",
    "bitsandbytes without the compiler": "from nbutils import rehearsal as r\n"
    "r._import_bitsandbytes_without_the_compiler()\n",
}


def marked_script(tree: Path) -> str:
    """The training script of a tree with a print at each mark."""
    show = "from nbutils.launching.script_file import script_text; print(script_text(), end='')"
    text = subprocess.run(
        [sys.executable, "-c", show],
        cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name, line in MARKS.items():
        indent = line[: len(line) - len(line.lstrip())]
        assert f"\n{line}" in text, f"the script no longer has a line that begins with {line!r}"
        text = text.replace(f"\n{line}", f"\n{indent}{MARK.format(name)}{line}", 1)
    return text + "    " + MARK.format("script")


def cpu_seconds() -> float:
    """Of all processes that were started from here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(tree: Path, folder: Path) -> dict:
    """One launch with the package of a tree; seconds since its beginning at each mark, on the slower rank."""
    folder.mkdir(parents=True, exist_ok=True)
    progress = folder / "out/progress.jsonl"
    progress.unlink(missing_ok=True)
    script = folder / "marked.py"
    script.write_text(marked_script(tree))
    settings = {"model": str(tiny_base().resolve()), "output_dir": str(progress.parent), **SETTINGS}
    (folder / "train.yaml").write_text(yaml.safe_dump(settings))
    words = ["--config_file", "configs/accelerate/rehearsal_fsdp1.yaml", "--main_process_port", "0"]
    words += ["-m", "nbutils.launching.rehearsal", str(script), "--config", str(folder / "train.yaml")]
    cpu, begun, first = cpu_seconds(), time.time(), None
    with (folder / "log").open("w") as log:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", *words],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree), "PYTHONUNBUFFERED": "1"},
            stdout=log,
            stderr=log,
        )
        while launcher.poll() is None:
            if first is None and progress.exists() and '"step": 1,' in progress.read_text():
                first = time.time()
            time.sleep(0.02)
    ended = time.time()
    text = (folder / "log").read_text()
    assert launcher.returncode == 0, text[-2000:]
    at = {}
    for name, moment in re.findall(r"mark (.+?) ([\d.]+)\n", text):
        at[name] = max(at.get(name, 0), float(moment) - begun)
    script_end = at.pop("script")
    at |= {"first step": first - begun, "script's end": script_end, "launch's end": ended - begun}
    losses = [json.loads(line).get("loss") for line in progress.read_text().splitlines()]
    at = {name: round(seconds, 2) for name, seconds in at.items()}
    return {"at": at, "cpu_seconds": round(cpu_seconds() - cpu, 2), "losses": [x for x in losses if x]}


def imports(before: str) -> dict:
    """CPU seconds of one process that imports what the script imports, and of its end."""
    lines = re.findall(r"^(?:import|from) .*$", script_text(), re.MULTILINE)
    code = (
        before + "\n".join(lines) + '\nimport os; used = os.times(); print("used", used.user + used.system)'
    )
    seen = {"imports": [], "end": [], "end_after_freeze": []}
    for freeze, name in (("", "end"), ("\nimport gc; gc.freeze()", "end_after_freeze")):
        start = cpu_seconds()
        done = subprocess.run(
            [sys.executable, "-c", code + freeze], capture_output=True, text=True, check=True
        )
        used = float(done.stdout.split("used")[1])
        seen["imports"].append(used)
        seen[name].append(cpu_seconds() - start - used)
    return {name: statistics.mean(values) for name, values in seen.items()}


def medians(runs: list[dict]) -> dict:
    """The median of each mark."""
    return {name: round(statistics.median(run["at"][name] for run in runs), 2) for name in runs[0]["at"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, help="commit to compare with")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/launch_seconds"))
    options = parser.parse_args()
    go_to_root()
    folder = options.folder.resolve()
    tree = folder / "tree_before"
    folder.mkdir(parents=True, exist_ok=True)
    if not tree.exists():
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), options.before], check=True)
    command = (
        f"python benchmarks/launch_seconds.py --before {options.before} --runs {options.runs} --out FILE"
    )
    report = {
        "what": "Seconds of a tiny launch on two CPU processes, and where they go",
        **provenance(command),
    }
    report |= {"before": options.before, "settings": SETTINGS}
    seen = {"before": [], "after": []}
    try:
        for _ in range(options.runs):
            for name, place in (("before", tree), ("after", ROOT)):
                seen[name].append(run(place, folder / name))
                print(name, seen[name][-1]["at"], seen[name][-1]["cpu_seconds"], flush=True)
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=True)
    all_runs = seen["before"] + seen["after"]
    report["losses_identical"] = all(run["losses"] == all_runs[0]["losses"] for run in all_runs)
    for name, runs in seen.items():
        cpu = statistics.median(r["cpu_seconds"] for r in runs)
        report[name + "_the_change"] = {"median_at": medians(runs), "median_cpu_seconds": cpu, "runs": runs}
        print(name, medians(runs), f"{cpu:.1f} s of CPU time in all")
    report["imports_cpu_seconds"] = {
        name: {key: round(statistics.median(r[key] for r in rounds), 2) for key in rounds[0]}
        for name, before in IMPORTS.items()
        if (rounds := [imports(before) for _ in range(3)])
    }
    print(json.dumps(report["imports_cpu_seconds"], indent=1))
    print("losses identical:", report["losses_identical"])
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
