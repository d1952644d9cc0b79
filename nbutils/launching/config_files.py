"""Accelerate's config files: what a file turns into, and one for the reader's machine."""

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from nbutils.planning.memory_plan import left_gib
from nbutils.planning.model_needs import MODELS, gpu_gib, has_room

RECIPE = Path("configs/accelerate/config_fsdp.yaml")
RECIPE_FSDP2 = Path("configs/accelerate/config_fsdp2.yaml")


def flat_keys(file: str | Path) -> dict[str, object]:
    """The keys of a config file on one level, those of `fsdp_config` beside the others.

    Args:
        file: a YAML file for `accelerate launch`.

    Returns:
        Key to value, in the order of the file; the key `fsdp_config` itself is left out.
    """
    content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    inner = content.pop("fsdp_config", None) or {}
    return content | inner


def launch_environment(file: str | Path) -> dict[str, str]:
    """The environment variables that `accelerate launch` would give to the processes of a config file.

    Args:
        file: a YAML file for `accelerate launch`.

    Returns:
        The variables whose names begin with `ACCELERATE_` or `FSDP_`.
    """
    variables, _ = _prepared(file)
    return {name: value for name, value in variables.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def torchrun_arguments(file: str | Path) -> dict[str, str]:
    """What `accelerate launch` would tell torchrun about machines and processes.

    Args:
        file: a YAML file for `accelerate launch`.

    Returns:
        `nnodes`, `nproc_per_node`, `node_rank` and, if the file sets them, the rendezvous.
    """
    _, arguments = _prepared(file)
    names = ("nnodes", "nproc_per_node", "node_rank", "master_addr", "rdzv_backend", "rdzv_endpoint")
    return {name: str(vars(arguments)[name]) for name in names if vars(arguments).get(name) not in (None, "")}


def _prepared(file: str | Path) -> tuple[dict[str, str], argparse.Namespace]:
    """Let accelerate's own launcher work out a launch; nothing is started."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    load_config_from_file(
        str(file)
    )  # unknown keys and missing files are refused here, with accelerate's message
    # Told the number of threads, accelerate prints no advice about it here; it changes nothing of what is returned.
    threads = ["--num_cpu_threads_per_process", "1"]
    arguments = launch_command_parser().parse_args(["--config_file", str(file), *threads, "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    if arguments.num_machines == 1:
        arguments.main_process_port = 0  # any free port: nothing will listen
    with _environment({}, clear=("ACCELERATE_", "FSDP_")):
        return prepare_multi_gpu_env(arguments), arguments


def resolve(file: str | Path) -> FullyShardedDataParallelPlugin:
    """The FSDP plugin that a config file turns into inside a launched process.

    Without an accelerator the plugin refuses `sync_module_states`. The two keys that need it are then left out while
    the plugin is built and written into it afterwards, so that a config for GPUs can be read on a laptop.

    Args:
        file: a YAML file for `accelerate launch`.

    Returns:
        Accelerate's own plugin.
    """
    import torch

    variables = launch_environment(file)
    needs_accelerator = ("FSDP_SYNC_MODULE_STATES", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    held_back = (
        {}
        if torch.accelerator.is_available()
        else {key: variables.pop(key, "false") for key in needs_accelerator}
    )
    with _environment(variables, clear=("FSDP_",)):
        plugin = FullyShardedDataParallelPlugin()
    for key, value in held_back.items():
        name = key.removeprefix("FSDP_").lower()
        if name == "cpu_ram_efficient_loading" or plugin.fsdp_version == 1:
            setattr(plugin, name, value == "true")
    return plugin


def variant(file: str | Path, folder: str | Path, **changes: object) -> Path:
    """Write a copy of a config file with some keys changed.

    Args:
        file: the YAML file to start from.
        folder: the copy goes into `variants` in it, which is made if missing.
        changes: new values; a key that begins with `fsdp_` belongs to `fsdp_config`.

    Returns:
        The path of the copy.
    """
    content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    for key, value in changes.items():
        place = content["fsdp_config"] if key.startswith("fsdp_") else content
        place[key] = value
    folder = Path(folder) / "variants"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".yaml", delete=False, encoding="utf-8") as copy:
        yaml.safe_dump(content, copy)
    return Path(copy.name)


def for_machine(gpus: int, vram_gib: float, model: str = "llama31_70b") -> ClusterConfig:
    """A config for this many GPUs of this size: the recipe's, with offload only if the shards do not fit with room.

    Args:
        gpus: number of GPUs in this machine; one process each.
        vram_gib: what the smallest of them shows to programs, in GiB: 23.6 for most cards of 24 GB.
        model: a name in nbutils.planning.model_needs.MODELS.

    Returns:
        Accelerate's own config object; `to_yaml_file` writes it.

    Raises:
        ValueError: fewer than two GPUs, or too little memory even with offload.
    """
    if gpus < 2:
        raise ValueError(
            f"Found {gpus} GPU, wanted at least 2: FSDP shards over several. One GPU needs no FSDP: plain QLoRA with "
            "PEFT's own prep runs there, and the rehearsal configs run this course without any."
        )
    sizes = MODELS[model]
    if not has_room(sizes, gpus, True, vram_gib):
        raise ValueError(
            f"{model} needs about {gpu_gib(sizes, gpus, offload=True):.1f} GiB a GPU even with offload, and some room; "
            f"found {vram_gib:.1f} GiB, which leave {left_gib(vram_gib):.1f} to PyTorch. Take a smaller model or GPUs "
            "with more memory."
        )
    config = load_config_from_file(str(RECIPE))
    config.num_processes = gpus
    config.fsdp_config["fsdp_offload_params"] = not has_room(sizes, gpus, False, vram_gib)
    return config


@contextlib.contextmanager
def _environment(variables: dict[str, str], clear: tuple[str, ...]) -> Iterator[None]:
    before = dict(os.environ)
    for name in before:
        if name.startswith(clear):
            del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
