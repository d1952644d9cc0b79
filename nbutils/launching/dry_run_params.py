"""The dry run of a night: settings from the same file of parameters that the night will be started with."""

import json
from pathlib import Path

import yaml

from nbutils.common.devices import no_accelerator
from nbutils.common.paths import ROOT, from_here
from nbutils.common.refused import Refused

# A parameter of notebook 04, and the option of `dryrun` that is the same. Steps and hours are the night's own.
OPTIONS = {
    "model": "model",
    "accelerate_config": "config",
    "num_processes": "num_processes",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "max_length": "max_length",
    "lora_r": "lora_r",
}
SETTINGS = (
    "packing",
    "ignore_columns",
    "max_cut_share",
    "heldout_dataset",
)  # of the script, if they say something


def of_params(file: Path) -> tuple[dict, list[str]]:
    """What a file of `configs/params` says about memory and speed.

    Args:
        file: YAML.

    Returns:
        Values of options by name, and further settings of the script as `name=value`: those of its `goal` come last.

    Raises:
        Refused: it holds no parameters.
    """
    given = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(given, dict):
        raise Refused(f"{file} holds {type(given).__name__}; wanted parameters, as in configs/params.")
    options = {option: given[name] for name, option in OPTIONS.items() if given.get(name)}
    pairs = as_pairs({name: given[name] for name in SETTINGS if given.get(name)})
    for path in ("model", "config"):
        if (ROOT / options.get(path, "")).exists() and path in options:
            options[path] = str(from_here(options[path]))
    if no_accelerator():  # its config is for GPUs
        fsdp = given.get("fsdp_version", 1)
        options["config"] = str(from_here(f"configs/accelerate/rehearsal_fsdp{fsdp}.yaml"))
    return options, pairs + (of_goal(ROOT / given["goal"]) if given.get("goal") else [])


def of_goal(file: Path) -> list[str]:
    """The settings of a file of `configs/goals`, as `name=value`.

    Args:
        file: YAML.
    """
    return as_pairs(yaml.safe_load(file.read_text(encoding="utf-8")) or {})


def as_pairs(settings: dict) -> list[str]:
    """Settings as they are typed behind `--set`."""
    return [f"{name}={json.dumps(value)}" for name, value in settings.items()]
