"""What the training script would refuse of a config file once its model is loaded, said before a process is started.

A file that accelerate understands may still be none for this recipe: other examples come with theirs.
"""

from pathlib import Path

from nbutils.launching.config_faults import BadConfig, read_config

LAYER = "LlamaDecoderLayer"  # of the models in nbutils.models.supported
TAKE_OURS = "Take one of configs/accelerate/."
# Keys of FSDP that need GPUs, and what the recipe's plugin says of them on CPUs only after loading.
NEED_GPUS = {
    "fsdp_offload_params": "weights cannot wait in host memory for a GPU that is not there",
    "fsdp_sync_module_states": "there is no GPU to send the weights to",
    "fsdp_cpu_ram_efficient_loading": "it needs fsdp_sync_module_states, and that a GPU",
}


def refuse_for_recipe(file: str | Path, num_processes: int | None = None, gpus: int | None = None) -> None:
    """Refuse a config file that is good for another script than the course's.

    Args:
        file: YAML for `accelerate launch`.
        num_processes: ranks over all machines, if it differs from the file's.
        gpus: CUDA devices of this machine; None if the ranks need none (a rehearsal).

    Raises:
        BadConfig: what was found, what was wanted, what to do.
    """
    content = read_config(Path(file))
    ranks = num_processes or content.get("num_processes", 1)
    _refuse_other_ways(file, content, ranks)
    fsdp = content.get("fsdp_config") or {}
    _refuse_other_units(file, fsdp)
    if _on(fsdp, "fsdp_activation_checkpointing"):
        raise BadConfig(
            f"{file}: fsdp_activation_checkpointing is true, and the script makes its checkpoints itself. Leave it "
            "out; the script's setting activation_checkpointing says whether there are any."
        )
    if gpus is None or content.get("use_cpu"):
        for key, why in NEED_GPUS.items():
            if _on(fsdp, key):
                raise BadConfig(
                    f"{file}: {key} is true, and this run is on CPUs: {why}. For a rehearsal take "
                    f"configs/accelerate/rehearsal_fsdp{fsdp.get('fsdp_version', 1)}.yaml."
                )


def _refuse_other_ways(file, content: dict, ranks: int) -> None:
    found = content.get("distributed_type", "NO")
    if found == "DEEPSPEED" or content.get("deepspeed_config"):
        raise BadConfig(
            f"{file} is a file for DeepSpeed; wanted distributed_type: FSDP. The recipe loads, trains and saves with "
            "FSDP. " + TAKE_OURS
        )
    if found not in ("FSDP", "NO", "MULTI_GPU", "MULTI_CPU") or (found != "FSDP" and ranks != 1):
        raise BadConfig(
            f"{file} says distributed_type: {found} for {ranks} processes; wanted FSDP. Otherwise each rank would hold "
            f"the whole model. {TAKE_OURS}"
        )
    for key, what in {
        "parallelism_config": "other parallelism (tensor, context, sequence) than FSDP's",
        "megatron_lm_config": "Megatron-LM",
        "fp8_config": "FP8",
    }.items():
        if content.get(key):
            raise BadConfig(f"{file}: {key} asks for {what}; the recipe has none. Take it out.")
    if str((content.get("dynamo_config") or {}).get("dynamo_backend", "no")).lower() not in ("no", "false"):
        raise BadConfig(
            f"{file}: dynamo_config would compile the whole model, and the recipe compiles layer by layer. Take it "
            "out, and set compile_layers: true in the script's settings."
        )


def _refuse_other_units(file, fsdp: dict) -> None:
    classes = fsdp.get("fsdp_transformer_layer_cls_to_wrap")
    names = [name.strip() for name in classes.split(",")] if isinstance(classes, str) else classes or []
    if names and LAYER not in names:
        raise BadConfig(
            f"{file}: fsdp_transformer_layer_cls_to_wrap is {classes}, and the models of this recipe have no such "
            f"layer. Write {LAYER}, or leave the key out: the model names its layer itself."
        )
    if fsdp.get("fsdp_auto_wrap_policy") == "NO_WRAP":
        raise BadConfig(
            f"{file}: fsdp_auto_wrap_policy is NO_WRAP: the whole model would be one unit, gathered whole on each GPU. "
            "Write TRANSFORMER_BASED_WRAP."
        )


def _on(keys: dict, name: str) -> bool:
    return str(keys.get(name, False)).lower() == "true"
