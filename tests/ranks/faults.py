"""The script, rehearsed where there is no GPU, with a fault at one stage of one rank; the product knows nothing of it.

Run as: FAULT='{"stage": "step", "rank": 1, "what": "kill", "count": 3}' accelerate launch ... -m faults SCRIPT ...

`stage` is one of load, wrap, step, backward, checkpoint, save; the fault comes when the rank enters it for the
`count`-th time.
`what` is one of
    kill       signal 9, as the kernel sends it when memory runs out
    freeze     signal 19: the rank neither goes on nor ends, as one that waits for a dead file system
    truncate   the model's file loses its end while it is mapped
    full       the disk of the output folder is filled to the last byte
    poison     NaN in the adapter of this rank
    wait       write the file `asked` beside the output folder, and go on when the file `answered` is there
"""

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import torch

from nbutils.adapters import save as saving
from nbutils.launching import rehearsal
from nbutils.models import loading
from nbutils.models import safetensors_reader as checkpoint
from nbutils.training import trainer as resuming


def arm(fault: dict, script_arguments: list[str]) -> None:
    """Put the fault in front of its stage, on its rank."""
    if int(os.environ["RANK"]) != fault["rank"]:
        return
    from accelerate import Accelerator

    owner, name = {
        "load": (checkpoint.Checkpoint, "read") if fault["what"] == "truncate" else (loading, "load_nf4"),
        "wrap": (Accelerator, "prepare"),
        "step": (resuming.ResumableTrainer, "training_step"),
        "backward": (Accelerator, "backward"),
        "checkpoint": (resuming, "save_pieces"),
        "save": (saving, "_write"),
    }[fault["stage"]]
    told = dict(zip(script_arguments[::2], script_arguments[1::2]))
    plain, seen = getattr(owner, name), [0]

    def with_fault(*args, **kwargs):
        seen[0] += 1
        if seen[0] == fault.get("count", 1):
            strike(fault["what"], told, args)
        return plain(*args, **kwargs)

    setattr(owner, name, with_fault)


def strike(what: str, told: dict[str, str], args: tuple) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "truncate":
        file = Path(told["--model"], "model.safetensors")
        os.truncate(file, 4096)
    elif what == "full":
        with Path(told["--output_dir"], "filler").open("wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(b"x" * 4096)
            except OSError:
                pass
    elif what == "wait":
        beside = Path(told["--output_dir"]).parent
        (beside / "asked").touch()
        while not (beside / "answered").exists():
            time.sleep(0.01)
    elif what == "poison":
        for group in args[0].optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(float("nan"))


if __name__ == "__main__":
    if os.environ.get("FAULT"):
        arm(json.loads(os.environ["FAULT"]), sys.argv[2:])
    if torch.cuda.is_available():
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        rehearsal.main()
