"""What is wrong with a config file for `accelerate launch`, said before a process is started.

Accelerate refuses an unknown key on the first level. Inside `fsdp_config` it drops what it does not know, and what only
the other version of FSDP knows, without a word.
"""

import difflib
from pathlib import Path

import yaml

from nbutils.planning.hybrid_shard import hybrid_fault

# What FSDP 1 reads and FSDP 2 ignores, with what stands in its place.
ONLY_FSDP1 = {
    "fsdp_sharding_strategy": "write fsdp_reshard_after_forward: true for FULL_SHARD, false for SHARD_GRAD_OP",
    "fsdp_use_orig_params": "leave it out: FSDP 2 always keeps the original parameters",
    "fsdp_sync_module_states": "leave it out: FSDP 2 has no such step",
    "fsdp_backward_prefetch": "leave it out: FSDP 2 always prefetches",
    "fsdp_forward_prefetch": "leave it out: FSDP 2 has no such choice",
}
ONLY_FSDP2 = {
    "fsdp_reshard_after_forward": "write fsdp_sharding_strategy: FULL_SHARD or SHARD_GRAD_OP",
    "fsdp_activation_checkpointing_offload": "leave it out, or write fsdp_version: 2",
}


class BadConfig(ValueError):
    """A config file that would not start the run that was meant. Nothing was started."""


def refuse_bad_config(file: str | Path, num_processes: int | None = None, gpus: int | None = None) -> dict:
    """Read a config file and refuse what accelerate would misunderstand, drop, or find out late.

    Args:
        file: YAML for `accelerate launch`.
        num_processes: ranks over all machines, if it differs from the file's.
        gpus: CUDA devices of this machine; None if the ranks need none (a rehearsal).

    Returns:
        The file's content.

    Raises:
        BadConfig: what was found, what was wanted, what to do.
    """
    content = read_config(Path(file))
    _refuse_unknown_keys(file, content)
    _refuse_bad_counts(file, content, num_processes, gpus)
    if content.get("distributed_type") == "FSDP":
        _refuse_keys_of_the_other_fsdp(file, content["fsdp_config"])
        _refuse_hybrid_of_other_groups(file, content, num_processes, gpus)
        _refuse_mixed_precision(file, content)
        _refuse_what_the_plugin_refuses(file)
    return content


def read_config(file: Path) -> dict:
    """What a config file says.

    Raises:
        BadConfig: there is none, or it is no config file.
    """
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [other.name for other in file.parent.glob("*.yaml")], n=1)
        hint = f"Did you mean {file.parent / near[0]}?" if near else "Take one of configs/accelerate/."
        raise BadConfig(f"There is no config file {file}. {hint}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise BadConfig(f"{file} cannot be read as YAML: {' '.join(str(problem).split())}") from None
    if not isinstance(content, dict) or not isinstance(content.get("fsdp_config", {}), dict | None):
        raise BadConfig(
            f"{file} must hold lines `key: value`, and below fsdp_config lines `fsdp_key: value`."
        )
    if content.get("distributed_type") == "FSDP" and not content.get("fsdp_config"):
        raise BadConfig(
            f"{file} says distributed_type: FSDP and has no fsdp_config. Take one of configs/accelerate/."
        )
    return content


def _refuse_unknown_keys(file, content: dict) -> None:
    """Accelerate's own lists: the fields of its config class, and the options of `accelerate launch`."""
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    options = {action.dest for action in launch_command_parser()._actions}
    known = set(ClusterConfig.__dataclass_fields__) | {"rdzv_conf"}
    for place, keys, allowed in (
        ("", content, known),
        (
            " below fsdp_config",
            content.get("fsdp_config") or {},
            {o for o in options if o.startswith("fsdp_")},
        ),
    ):
        for key in keys:
            if str(key) not in allowed:
                near = difflib.get_close_matches(str(key), allowed, n=1)
                hint = f"Did you mean {near[0]}?" if near else "Take it out."
                raise BadConfig(
                    f"{file}: accelerate knows no key {key}{place}, and would run without it. {hint}"
                )


def _refuse_bad_counts(file, content: dict, num_processes: int | None, gpus: int | None) -> None:
    ranks, machines = _ranks(content, num_processes), content.get("num_machines", 1)
    if not isinstance(ranks, int) or not isinstance(machines, int) or ranks < 1 or machines < 1:
        raise BadConfig(
            f"{file}: num_processes is {ranks!r}, num_machines {machines!r}; wanted whole numbers from 1."
        )
    if ranks % machines:
        raise BadConfig(
            f"{file}: {ranks} processes cannot be shared out evenly among {machines} machines. num_processes counts "
            f"all machines together: write {machines} times the number of GPUs of one."
        )
    if machines > 1 and not content.get("main_process_ip"):
        raise BadConfig(
            f"{file}: {machines} machines, and no main_process_ip. Give the address of machine 0, which all can reach."
        )
    here = ranks // machines
    if gpus is not None and not content.get("use_cpu") and here > gpus:
        raise BadConfig(
            f"{file} asks for {here} processes on this machine, one a GPU, and it shows {gpus} "
            f"GPU{'s' * (gpus != 1)}. {_way_out(gpus, machines)}"
        )


def _ranks(content: dict, num_processes: int | None):
    """Over all machines: what is asked for, a 0 too, else what the file says."""
    return content.get("num_processes", 1) if num_processes is None else num_processes


def _way_out(gpus: int, machines: int) -> str:
    if not gpus:
        return "Launch the rehearsal: -m nbutils.launching.rehearsal, or look at CUDA_VISIBLE_DEVICES."
    fewer = f"Set num_processes to {gpus * machines}, or look at CUDA_VISIBLE_DEVICES."
    rehearse = " The course on CPU processes instead: CUDA_VISIBLE_DEVICES= make tutorial"
    return fewer + rehearse * (gpus == 1)


def _refuse_keys_of_the_other_fsdp(file, keys: dict) -> None:
    version = str(keys.get("fsdp_version", 1))
    if version not in ("1", "2"):
        raise BadConfig(f"{file}: fsdp_version is {version}; there is 1 and 2.")
    for key, instead in (ONLY_FSDP1 if version == "2" else ONLY_FSDP2).items():
        if key in keys:
            raise BadConfig(
                f"{file}: {key} belongs to FSDP {3 - int(version)}, this is a file for FSDP {version}, and accelerate "
                f"would drop the key without a word. Instead: {instead}."
            )


def _refuse_hybrid_of_other_groups(file, content: dict, num_processes: int | None, gpus: int | None) -> None:
    ranks = _ranks(content, num_processes) // content.get("num_machines", 1)
    on_cpus = gpus is None or content.get("use_cpu")  # a rehearsal counts a device for each rank
    strategy = content["fsdp_config"].get("fsdp_sharding_strategy")
    if fault := hybrid_fault(strategy, ranks, ranks if on_cpus else gpus):
        raise BadConfig(f"{file}: {fault}")


def _refuse_mixed_precision(file, content: dict) -> None:
    found = content.get("mixed_precision", "no")
    if found not in ("no", False):  # YAML reads a bare no as false
        raise BadConfig(
            f"{file}: mixed_precision is {found}, wanted 'no'. The 4-bit weights are packed into bfloat16; FSDP would "
            "cast what it gathers, and packed bytes that are cast are other weights (notebook 02b)."
        )


def _refuse_what_the_plugin_refuses(file) -> None:
    """A misspelt value, such as FULLSHARD: accelerate itself finds it only when the trainer is made, after loading."""
    from nbutils.launching.config_files import resolve

    try:
        resolve(file)
    except (KeyError, ValueError) as problem:
        raise BadConfig(
            f"{file}: accelerate cannot make an FSDP plugin of it ({type(problem).__name__}: {problem}). Look for this "
            "value below fsdp_config, and compare with the files in configs/accelerate/."
        ) from None
    except (
        ConnectionError
    ) as problem:  # several machines agree on a port; accelerate tries the one of machine 0
        raise BadConfig(f"{file}: {problem}") from None
