"""Run a training script unchanged, under a memory cap if you like, and write down what each rank used.

Run as: accelerate launch --config_file CONFIG -m nbutils.launching.measured_run SCRIPT.py ...
with NBUTILS_MEASURE_DIR=folder and, for a cap, NBUTILS_CAP_GIB=21.3 in the environment; with NBUTILS_LINK_GBS the links
are made slow (`nbutils.launching.slow_links`); with NBUTILS_PROFILE_STEP=5 one step is watched
(`nbutils.launching.step_profile`).

The script knows nothing of this: the phases are seen from outside, by standing around `load_nf4`, `Trainer.train`
and the Trainer's own callbacks. The cap is `torch.cuda.set_per_process_memory_fraction`. It limits PyTorch's allocator;
the CUDA context and NCCL come on top.
"""

import functools
import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

GIB = 2**30


class Phases:
    """One JSON line for each moment of a rank's life: time, and GPU memory since the moment before.

    Args:
        folder: the lines go to `rank{n}.jsonl` in it.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank{rank}.jsonl"
        self.path.write_text("")
        self.mark("start", pid=os.getpid())

    def mark(self, phase: str, **more) -> None:
        """Write one line. `peak` is the highest allocation since the line before.

        Args:
            phase: name of the moment.
            more: further figures for the line.
        """
        line = {"phase": phase, "time": round(time.time(), 3), **gpu_memory(), **more}
        with self.path.open("a") as out:
            out.write(json.dumps(line) + "\n")


def gpu_memory() -> dict:
    """This process's GPU memory in bytes: allocated, its peak since the last call, reserved, and outside the allocator.

    Returns:
        `allocated`, `peak`, `reserved_peak`, `outside` (CUDA context, NCCL and whatever else uses this GPU) and
        `pinned` (host memory of the pinning allocator, as reserved); empty without a GPU or before its first use.
    """
    import torch

    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {}
    free, total = torch.cuda.mem_get_info()
    figures = {
        "allocated": torch.cuda.memory_allocated(),
        "peak": torch.cuda.max_memory_allocated(),
        "reserved_peak": torch.cuda.max_memory_reserved(),
        "outside": total - free - torch.cuda.memory_reserved(),
    }
    pinned = torch.cuda.host_memory_stats() if hasattr(torch.cuda, "host_memory_stats") else {}
    figures["pinned"] = pinned.get("allocated_bytes.current", 0)
    torch.cuda.reset_peak_memory_stats()
    return figures


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process; 0 if it was not used."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def set_cap(gib: float, device: int) -> None:
    """Let this process's allocator reserve at most `gib` GiB on a GPU.

    Args:
        gib: the cap.
        device: index of the GPU.
    """
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total), device)


def slow_links():
    """Slow the links down if the environment asks for it: NBUTILS_LINK_GBS=0,25,12 and NBUTILS_LINK_STEPS=4."""
    if not (speeds := os.environ.get("NBUTILS_LINK_GBS")):
        return None
    from nbutils.launching.slow_links import SlowLinks

    links = SlowLinks([float(speed) for speed in speeds.split(",")], int(os.environ["NBUTILS_LINK_STEPS"]))
    links.stand_in_the_way()
    return links


def step_profile(folder: Path, rank: int):
    """Watch one step of rank 0 if the environment names one: NBUTILS_PROFILE_STEP=5."""
    if rank or not (step := os.environ.get("NBUTILS_PROFILE_STEP")):
        return None
    from nbutils.launching.step_profile import StepProfile

    return StepProfile(int(step), folder / f"profile_rank{rank}.json")


def watch(phases: Phases, at_end: Callable[[], None], links=None, profile=None) -> None:
    """Stand around the loading and the training of a script that has not been imported yet.

    Args:
        phases: where to write.
        at_end: called when training ends; what an evaluation needs after that is not the training's.
        links: that are made slow, or None; each step's line tells the bytes that came in over them so far.
        profile: of one step, or None.
    """
    from transformers import Trainer, TrainerCallback

    import nbutils.models.loading

    class Watcher(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            phases.mark("wrapped")

        def on_step_end(self, args, state, control, **kwargs):
            more = {"incoming": links.incoming.bytes, "link_gbs": links.incoming.gbs} if links else {}
            phases.mark("step", step=state.global_step, graphs=compiled_graphs(), **more)
            if links:
                links.at_step(state.global_step)

        def on_train_end(self, args, state, control, **kwargs):
            phases.mark("trained")
            at_end()

    plain_load, plain_train = nbutils.models.loading.load_nf4, Trainer.train

    @functools.wraps(plain_load)
    def load_nf4(*args, **kwargs):
        phases.mark("load begins")
        model = plain_load(*args, **kwargs)
        phases.mark("loaded")
        return model

    @functools.wraps(plain_train)
    def train(self, *args, **kwargs):
        self.add_callback(Watcher())
        if profile:
            self.add_callback(profile.callback())
        phases.mark("train begins")
        return plain_train(self, *args, **kwargs)

    nbutils.models.loading.load_nf4 = load_nf4
    Trainer.train = train


def main() -> None:
    """Set the cap, watch, and run the script named on the command line as `__main__`."""
    import torch

    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    phases = Phases(Path(os.environ["NBUTILS_MEASURE_DIR"]), rank)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        if cap := os.environ.get("NBUTILS_CAP_GIB"):
            set_cap(float(cap), local_rank)
    else:
        from nbutils.launching import rehearsal

        rehearsal.enable()
    peak_trace = os.environ.get("NBUTILS_PEAK_TRACE") and torch.cuda.is_available()

    def write_trace() -> None:
        if peak_trace:
            from nbutils.launching.memory_snapshot import write_peak

            write_peak(phases.path.with_name(f"peak_rank{rank}.json"))
            torch.cuda.memory._record_memory_history(enabled=None)

    if peak_trace:
        torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=400_000)
    watch(phases, write_trace, slow_links(), step_profile(phases.path.parent, rank))
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:  # an out-of-memory is a result too
        phases.mark("end")
    if not torch.cuda.is_available():
        rehearsal.end_here()


if __name__ == "__main__":
    main()
