"""Run the course's training script on real ranks, kill them, resume them. The libraries are imported once, then forked.

Run as: python tests/ranks/training.py PLAN.json      (the tests do it)

PLAN.json holds `folder`, `script` and `runs`: a list of {name, out, fsdp, world, args, kill}. What came of each run
goes to `<folder>/<name>.json`: the exit status of each rank and its output. `kill` is one of
    {"rank": 1, "step": 5}             before that rank's 5th training step; "rank": null kills all
    {"rank": 0, "fsync": 7}            at its 7th fsync, all of which lie inside a checkpoint's or adapter's writing
    {"rank": 1, "torn": 2}             in the middle of writing its 2nd file of pieces
    {"rank": 1, "term": 5}             SIGTERM to that rank alone, before its 5th training step
    {"rank": 0, "term_in_evaluation": 2}   SIGTERM in its 2nd batch of an evaluation
    {"rank": 1, "seconds": 3.1}        that long after its first training step began, wherever it is
`refuse` is true where the run must be refused before a weight is read: reading one is then said and ends the rank.
`gradients` is true where each rank shall write, before each training step, the bytes of gradients that FSDP holds, to
`<folder>/<name>.gradients<rank>`, a line each.
`path` is a folder that goes before all others on the import path, `variables` go into the environment.
"""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import trl  # noqa: F401 (imported once, for all ranks)
from torch.distributed.fsdp import FSDPModule

from nbutils.adapters import checkpoint_folder as checkpoints
from nbutils.adapters import save as saving
from nbutils.common.paths import ROOT
from nbutils.launching.config_files import launch_environment
from nbutils.models import loading
from nbutils.training import trainer as resuming

GRACE = 1.0  # seconds between the death of one rank and that of the others; torchrun does the same
CONFIG = str(ROOT / "configs/accelerate/rehearsal_fsdp{}.yaml")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ask_before(name: str, due: Callable[[], bool]) -> None:
    plain = getattr(resuming.ResumableTrainer, name)

    def asked(*args, **kwargs):
        if due():
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args, **kwargs)

    setattr(resuming.ResumableTrainer, name, asked)


def arm(kill: dict, number: int) -> None:
    """Arrange for this rank to be killed; only here, never in the product."""
    if kill is None or kill["rank"] not in (None, number):
        return
    count = 0

    def at(which: int) -> bool:
        nonlocal count
        count += 1
        return count == which

    if "step" in kill:
        plain_step = resuming.ResumableTrainer.training_step
        resuming.ResumableTrainer.training_step = lambda *args, **kwargs: (
            die() if at(kill["step"]) else plain_step(*args, **kwargs)
        )
    for moment, name in (("term", "training_step"), ("term_in_evaluation", "prediction_step")):
        if moment in kill:
            ask_before(name, lambda which=kill[moment]: at(which))
    if "seconds" in kill:
        plain_begin = resuming.ResumableTrainer.training_step

        def first_step(*args, **kwargs):
            if at(1):
                threading.Timer(kill["seconds"], die).start()
            return plain_begin(*args, **kwargs)

        resuming.ResumableTrainer.training_step = first_step
    if "fsync" in kill:
        plain_fsync = saving.fsync
        for module in (saving, checkpoints):
            module.fsync = lambda path: die() if at(kill["fsync"]) else plain_fsync(path)
    if "torn" in kill:
        plain_save = checkpoints.save_file

        def torn(tensors, file, **kwargs):
            plain_save(tensors, file, **kwargs)
            if at(kill["torn"]):
                os.truncate(file, Path(file).stat().st_size // 2)
                die()

        checkpoints.save_file = torn


def gradient_bytes(model) -> int:
    """Of all gradients that wait on this rank between two passes of a step: whole ones or shards, of FSDP 1 or 2."""
    found = [parameter.grad for parameter in model.parameters()]
    for module in model.modules():
        if handle := getattr(module, "_handle", None):  # FSDP 1
            found += [handle.flat_param.grad, getattr(handle.flat_param, "_saved_grad_shard", None)]
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            for parameter in group.fsdp_params if group else ():
                whole = getattr(parameter, "_unsharded_param", None)
                found += [parameter.unsharded_accumulated_grad, whole is not None and whole.grad]
    found = [getattr(one, "_local_tensor", one) for one in found if isinstance(one, torch.Tensor)]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in found}.values())


def watch_gradients(file: Path) -> None:
    plain = resuming.ResumableTrainer.training_step

    def step(self, model, *args, **kwargs):
        with file.open("a") as out:
            out.write(f"{gradient_bytes(model)}\n")
        return plain(self, model, *args, **kwargs)

    resuming.ResumableTrainer.training_step = step


def be_rank(number: int, run: dict, port: int, script: str, log: Path) -> None:
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    if run["world"] > 1:
        os.environ |= launch_environment(CONFIG.format(run["fsdp"]))
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(run["world"])}
        os.environ |= {
            "LOCAL_WORLD_SIZE": str(run["world"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    os.environ |= run.get("variables", {})
    from nbutils.launching import rehearsal

    try:
        rehearsal.enable()
        arm(run.get("kill"), number)
        if run.get("gradients"):
            watch_gradients(log.with_name(f"{run['name']}.gradients{number}"))
        sys.path[:0] = filter(None, [run.get("path")])
        if run.get("refuse"):
            loading.load_nf4 = lambda model: os._exit(
                print(f"A weight of {model} was read.", flush=True) or 99
            )
        sys.argv = [script, *run["args"]]
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as end:  # argparse has said what it had to say
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_once(run: dict, script: str, folder: Path) -> dict:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    logs = [folder / f"{run['name']}.log{number}" for number in range(run["world"])]
    ranks = [
        context.Process(target=be_rank, args=(number, run, port, script, logs[number]))
        for number in range(run["world"])
    ]
    started = time.monotonic()
    for process in ranks:
        process.start()
    first_death = None
    while any(process.is_alive() for process in ranks):
        time.sleep(0.05)
        if first_death is None and any(process.exitcode not in (None, 0) for process in ranks):
            first_death = time.monotonic()
        late = time.monotonic() - started > run.get("timeout", 120)
        if late or (first_death is not None and time.monotonic() - first_death > GRACE):
            for process in ranks:
                process.kill()
    return {
        "status": [process.exitcode for process in ranks],
        "seconds": round(time.monotonic() - started, 2),
        # Killed while it wrote a checkpoint: the beginning of one is left under another name.
        "unfinished": bool(list(folder.glob(f"{Path(run['out']).name}/.checkpoint-*.unfinished"))),
        "output": [log.read_text()[-6000:] for log in logs],
    }


def main(plan: dict) -> None:
    folder = Path(plan["folder"])
    for run in plan["runs"]:
        seen = run_once(run, plan["script"], folder)
        (folder / f"{run['name']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
