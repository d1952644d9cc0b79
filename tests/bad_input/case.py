"""A row of a table: a folder with something spoiled in it, and the real script on two ranks that must refuse it.

The ranks are forked from one process that has imported the libraries; `typed` is the same as a reader types it.
"""

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

from nbutils.common.paths import ROOT
from nbutils.launching.script_file import write_script
from nbutils.models.tiny import tiny_base

SETTINGS = {
    "dataset": str(ROOT / "data/instructions/train.jsonl"),
    "heldout_dataset": str(ROOT / "data/instructions/heldout.jsonl"),
    "max_steps": 2,
    "max_length": 256,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "lora_r": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "eval_strategy": "no",
    "disable_tqdm": True,
}
GOOD = '{"prompt": "What is a shard?", "completion": "A slice."}\n'
SAVED = SETTINGS | {"save_strategy": "steps", "save_steps": 1}


class Case:
    """A row being prepared: a folder of its own, a model that is a copy of the tiny base, settings to spoil."""

    def __init__(self, folder: Path):
        self.folder, self.settings, self.path, self.variables = folder, {}, None, {}
        (folder / "out/adapter").mkdir(parents=True)
        (folder / "out/adapter/adapter_config.json").write_text("{}")  # an earlier adapter, which must stay
        (folder / "out/notes.txt").write_text("keep me")

    def rows(self, text: str, name: str = "rows.jsonl") -> None:
        (self.folder / name).write_text(text, encoding="utf-8")
        self.settings["dataset"] = str(self.folder / name)

    def base(self, **changes) -> Path:
        """A copy of the tiny base, some keys of its config changed; the weights are linked."""
        base = self.folder / "base"
        shutil.copytree(tiny_base(), base, copy_function=os.link)
        config = json.loads((base / "config.json").read_text()) | changes
        (base / "config.json").unlink()
        (base / "config.json").write_text(json.dumps(config))
        self.settings["model"] = str(base)
        return base

    def installed(self, package: str, version: str) -> None:
        """What Python says when it is asked for a version: metadata that lies before the installed one."""
        info = self.folder / "site" / f"{package}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        self.path = str(info.parent)


def variables(**changes):
    return lambda case: case.variables.update(changes)


def settings(**changes):
    return lambda case: case.settings.update(changes)


def words(settings: dict, **more) -> list[str]:
    return [word for name, value in {**settings, **more}.items() for word in (f"--{name}", str(value))]


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that shows one model, behind a licence, and nothing else; it answers with the real hub's headers."""

    def do_GET(self):
        if self.path.startswith("/api/models/meta-llama/gated/tree/"):
            self.answer(
                200,
                "",
                json.dumps([{"type": "file", "path": "config.json", "size": 9, "oid": "0" * 40}]).encode(),
            )
        elif self.path.startswith("/api/models/meta-llama/gated"):
            body = json.dumps(
                {"id": "meta-llama/gated", "sha": "0" * 40, "siblings": [{"rfilename": "config.json"}]}
            )
            self.answer(200, "", body.encode())
        elif self.path.startswith("/meta-llama/gated/"):
            self.answer(403, "GatedRepo")
        else:
            self.answer(404, "RepoNotFound")

    do_HEAD = do_GET

    def answer(self, status, code, body=b"{}"):
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def environment(hub: str, home: Path, path: str | None = None) -> dict:
    places = [path, os.environ.get("PYTHONPATH"), str(ROOT)]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, places)),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_ENDPOINT": hub,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
    }


def snapshot(folder: Path) -> dict:
    """Every file below a folder, with its time and what is in it."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def prepare(folder: Path, table: dict) -> dict[str, Case]:
    cases = {}
    for number, (name, (spoil, _)) in enumerate(table.items()):
        case = cases[name] = Case(folder / f"case{number}")
        spoil(case)
        told = {
            "model": str(tiny_base()),
            "output_dir": str(case.folder / "out"),
            **SETTINGS,
            **case.settings,
        }
        case.file = case.folder / "train.yaml"
        case.file.write_text(yaml.safe_dump(told))
        case.before = snapshot(case.folder / "out")
    return cases


def fork(folder: Path, runs: list[dict], hub: str) -> dict[str, dict]:
    """Run the script on forked ranks, see tests/ranks/training.py; what came of each run, by name."""
    plan = {"folder": str(folder), "script": str(write_script(folder)), "runs": runs}
    (folder / "plan.json").write_text(json.dumps(plan))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/ranks/training.py"), str(folder / "plan.json")],
        env=environment(hub, folder / "home"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {run["name"]: json.loads((folder / f"{run['name']}.json").read_text()) for run in runs}


def last_words(output: str) -> str:
    """What stands at the end of a rank's output: the lines after the last frame of a traceback."""
    lines = output.rstrip().splitlines()
    while any(re.match(r"\s+(File |\^|~|raise |return )", line) for line in lines):
        lines = lines[1:]
    return lines[-1] if lines else ""


def assert_refused(case: Case, seen: dict, words: str) -> None:
    """Every rank ended with the sentence before it read a weight, and nothing in the output folder was touched."""
    assert all(status not in (0, 99) for status in seen["status"]), (seen["status"], seen["output"])
    for output in seen["output"]:
        assert re.search(words, last_words(output)), output
        assert "was read." not in output
    assert snapshot(case.folder / "out") == case.before, "something in the output folder was touched"
    assert not list(case.folder.rglob("*.unfinished"))


def typed(
    hub: str, folder: Path, *words: str, path: str | None = None
) -> tuple[subprocess.CompletedProcess, float]:
    """`python -m nbutils launch ...` in a terminal of its own; what it said, and the seconds."""
    command = [
        sys.executable,
        "-m",
        "nbutils",
        "launch",
        "--log",
        str(folder / "launch.log"),
        "--timeout",
        "120",
        *words,
    ]
    started = time.monotonic()
    done = subprocess.run(
        command,
        env=environment(hub, folder / "home", path),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
    )
    return done, time.monotonic() - started
