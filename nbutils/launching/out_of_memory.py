"""After `CUDA out of memory`: what the memory plan says about these settings, and the first change that helps."""

import itertools
from pathlib import Path

import yaml

from nbutils.common.nvidia_smi import find_gpus
from nbutils.planning.memory_items import GIB
from nbutils.planning.memory_plan import DRIVER, OUTSIDE, left_gib, plan, what_to_change
from nbutils.planning.run_setup import LORA_RANK, Choices, Setup
from nbutils.planning.shapes import shape_of


def advice(arguments: list[str], config: str | Path, num_processes: int | None = None) -> str:
    """The plan of a launch of the training script, in two sentences.

    Args:
        arguments: of the script, with `--config FILE` or the settings themselves.
        config: for `accelerate launch`.
        num_processes: ranks, if they differ from the config's.

    Returns:
        Empty if the settings do not say enough for a plan, for example if the model is not in a local folder.
    """
    told = settings_of(arguments)
    try:
        shape, setup = shape_of(told["model"]), Setup.read(config, num_processes)
        batch, length = int(told["per_device_train_batch_size"]), int(told["max_length"])
        lora_r = int(told.get("lora_r", LORA_RANK))
        # On the command line everything is text: "false" is not false yet.
        typed = {name: yaml.safe_load(value) for name, value in told.items() if isinstance(value, str)}
        choices = Choices.read(told | typed)
        expected = plan(shape, setup, batch, length, lora_r, choices=choices)
        known = [gpu["gib"] for gpu in find_gpus() if gpu["gib"]]
    except (KeyError, OSError, TypeError, ValueError, yaml.YAMLError):
        return ""
    said = (
        f"The plan for these settings: {expected.gpu_peak_bytes / GIB:.1f} GiB a rank at its peak, "
        f"{expected.peak_moment}, and {OUTSIDE / GIB:.1f} GiB beside PyTorch."
    )
    room = left_gib(min(known) - DRIVER) * GIB if known else 0.0
    # Where the plan thought that it would fit, it is asked for something that needs clearly less.
    budget = (
        min(int(room), int(0.9 * expected.gpu_peak_bytes)) if room > 0 else int(0.9 * expected.gpu_peak_bytes)
    )
    changes = what_to_change(shape, setup, batch, length, lora_r, budget, choices)
    if not changes:
        return said
    return said + f" Change first: {next((one for one in changes if one.endswith('fits')), changes[0])}."


def settings_of(arguments: list[str]) -> dict:
    """The settings that a script is given: those of its `--config` file, and over them those of its command line."""
    words = {}
    for word, following in itertools.pairwise([*map(str, arguments), "--"]):
        if word.startswith("--"):
            name, joined, value = word.removeprefix("--").partition("=")
            if not joined:  # a switch alone, like --compile_layers, is on
                value = "true" if following.startswith("--") else following
            words[name.replace("-", "_")] = value  # the script takes --output-dir as well
    try:
        from_file = yaml.safe_load(Path(words["config"]).read_text(encoding="utf-8"))
    except (KeyError, OSError, UnicodeDecodeError, yaml.YAMLError):
        from_file = {}
    return (from_file if isinstance(from_file, dict) else {}) | words
