"""Where a step's seconds go on a GPU: multiplying, attention, dequantising, moving, waiting.

`nbutils.launching.measured_run` switches it on with NBUTILS_PROFILE_STEP=5: that step of rank 0 is watched by
torch.profiler, and `profile_rank0.json` beside the rank's own lines holds the seconds.
"""

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

# What a kernel's name tells, the first that fits. Names are those of CUDA's libraries, bitsandbytes and Triton.
KINDS = {
    "gather": r"nccl",
    "from host": r"Memcpy HtoD",
    "to host": r"Memcpy DtoH",
    "dequantise": r"[Dd]equantize",
    "attention": r"flash|fmha|sdpa|attention",
    "multiply": r"gemm|cutlass|nvjet|xmma|cublas|wgmma",
    "compiled": r"^triton",
    "copy on the GPU": r"Memcpy DtoD|[Cc]opy|split_with_sizes|cat_|CatArray",
}
MOVES = ("gather", "from host", "to host")  # beside the computing, if all goes well


class StepProfile:
    """Watches one step of this rank.

    Args:
        step: which, counted from 1.
        file: for the result, JSON.
    """

    def __init__(self, step: int, file: Path):
        self.step, self.file, self.profiler, self.began = step, file, None, 0.0
        self.optimizer = 0.0  # seconds

    def at_optimizer(self, begins: bool) -> None:
        """Count the optimizer's seconds, which are the CPU's where weights wait in host memory.

        Args:
            begins: gradients are clipped and it begins; or it is done.
        """
        now = time.perf_counter()
        self.optimizer = -now if begins else self.optimizer + now

    def at_step_end(self, done: int) -> None:
        """Begin when the step before is done, and write when the watched one is.

        Args:
            done: optimizer steps so far.
        """
        from torch.profiler import ProfilerActivity, profile, supported_activities

        if done == self.step - 1:
            on_gpu = (
                ProfilerActivity.CUDA in supported_activities()
            )  # alone: what the CPU does would slow the step
            activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
            self.profiler = profile(activities=[activity])
            self.profiler.start()
            self.began = time.perf_counter()
        elif done == self.step:
            seconds = time.perf_counter() - self.began
            self.profiler.stop()
            found = seconds_by_kind(kernels(self.profiler), seconds) | {"optimizer": round(self.optimizer, 4)}
            self.file.write_text(json.dumps(found, indent=1) + "\n")

    def callback(self):
        """For the Trainer, which tells it where a step ends and where its optimizer begins and ends."""
        from transformers import TrainerCallback

        profile = self

        class Watcher(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                profile.at_optimizer(begins=True)

            def on_optimizer_step(self, args, state, control, **kwargs):
                profile.at_optimizer(begins=False)

            def on_step_end(self, args, state, control, **kwargs):
                profile.at_step_end(state.global_step)

        return Watcher()


def kernels(profiler) -> list[tuple[str, float, float]]:
    """Name, begin and end in seconds of everything that ran on the GPU.

    Args:
        profiler: stopped.
    """
    from torch.autograd import DeviceType

    return [
        (event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]


def seconds_by_kind(ran: Sequence[tuple[str, float, float]], seconds: float) -> dict:
    """Seconds of a step by what the GPU did.

    Args:
        ran: name, begin and end in seconds of each kernel or copy.
        seconds: of the whole step, by the clock.

    Returns:
        `step`; `by_kind`, the sums; `computing`, seconds in which at least one kernel computed; `moving_alone`, in
        which bytes came or went and nothing computed; `idle`, the rest; `longest`, the 25 names with most seconds;
        `gaps`, the 12 longest stretches in which nothing computed, with the kernels before and after.
    """
    kinds, names, count = defaultdict(float), defaultdict(float), defaultdict(int)
    computing, moving = [], []
    for name, begin, end in ran:
        kind = kind_of(name)
        kinds[kind] += end - begin
        names[name[:110]] += end - begin
        count[name[:110]] += 1
        (moving if kind in MOVES else computing).append((begin, end))
    busy, either = _covered(computing), _covered(computing + moving)
    gaps = sorted(_gaps([span for span in ran if kind_of(span[0]) not in MOVES]), reverse=True)
    most = sorted(names, key=names.get, reverse=True)[:25]
    return {
        "step": round(seconds, 4),
        "computing": round(busy, 4),
        "moving_alone": round(either - busy, 4),
        "idle": round(seconds - either, 4),
        "by_kind": {kind: round(kinds[kind], 4) for kind in sorted(kinds, key=kinds.get, reverse=True)},
        "longest": [{"name": name, "seconds": round(names[name], 4), "times": count[name]} for name in most],
        "gaps": [{"seconds": round(gap, 4), "after": a[:60], "before": b[:60]} for gap, a, b in gaps[:12]],
        "gaps_over_1_ms": [
            sum(gap > 1e-3 for gap, *_ in gaps),
            round(sum(g for g, *_ in gaps if g > 1e-3), 4),
        ],
    }


def kind_of(name: str) -> str:
    """What a kernel or copy of this name does."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")


def _gaps(ran: Sequence[tuple[str, float, float]]) -> Iterator[tuple[float, str, str]]:
    """Seconds in which none of them ran, with the name of the one before and of the one after."""
    last, reached = "", None
    for name, begin, end in sorted(ran, key=lambda one: one[1]):
        if reached is not None and begin > reached:
            yield begin - reached, last, name
        if reached is None or end > reached:
            last, reached = name, end


def _covered(spans: list[tuple[float, float]]) -> float:
    """Seconds that the spans cover together."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
