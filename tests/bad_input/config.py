"""What is wrong with the config file or with the settings: a row is the file, what is changed in it, and the words."""

from pathlib import Path

from bad_input.case import settings, variables
from nbutils.launching.config_files import RECIPE, RECIPE_FSDP2

HYBRID = Path("configs/machines/two_machines_hybrid.yaml")

# Refused by `python -m nbutils launch`, before a rank starts.
CONFIGS = {
    "more processes than GPUs": (
        RECIPE,
        {},
        r"asks for 2 processes on this machine, one a GPU, and it shows 0 GPUs",
    ),
    "more processes than one GPU": (
        RECIPE,
        {},
        r"one a GPU, and it shows 1 GPU\. Set num_processes to 1, .*: CUDA_VISIBLE_DEVICES= make tutorial$",
    ),
    "hybrid, one rank a machine": (
        HYBRID,
        {"num_processes": 2},
        r"HYBRID_SHARD with 1 rank a machine, wanted at least 2: .* Take FULL_SHARD",
    ),
    "hybrid by number, one rank a machine": (
        HYBRID,
        {"num_processes": 2, "fsdp_sharding_strategy": 5},
        r"fsdp_sharding_strategy is 5 with 1 rank a machine",
    ),
    "hybrid on two of four GPUs": (
        HYBRID,
        {},
        r"HYBRID_SHARD with 2 ranks a machine, each of which sees 4 devices; .* show 2 with CUDA_VISIBLE_DEVICES",
    ),
    "misspelt key": (
        RECIPE,
        {"num_proceses": 2},
        r"knows no key num_proceses, .* Did you mean num_processes\?",
    ),
    "misspelt FSDP key": (
        RECIPE,
        {"fsdp_sharding_stratgy": "FULL_SHARD"},
        r"knows no key fsdp_sharding_stratgy below fsdp_config, .* Did you mean",
    ),
    "FSDP 1 key in an FSDP 2 file": (
        RECIPE_FSDP2,
        {"fsdp_use_orig_params": False},
        r"fsdp_use_orig_params belongs to FSDP 1",
    ),
    "FSDP 2 key in an FSDP 1 file": (
        RECIPE,
        {"fsdp_reshard_after_forward": True},
        r"fsdp_reshard_after_forward belongs to FSDP 2",
    ),
    "misspelt value": (
        RECIPE,
        {"fsdp_sharding_strategy": "FULLSHARD"},
        r"cannot make an FSDP plugin .*'FULLSHARD'",
    ),
    "no such FSDP": (RECIPE, {"fsdp_version": 3}, r"fsdp_version is 3; there is 1 and 2"),
    "mixed precision": (RECIPE, {"mixed_precision": "fp16"}, r"mixed_precision is fp16, wanted 'no'"),
    "machines of unequal size": (
        RECIPE,
        {"num_machines": 2, "num_processes": 3},
        r"3 processes cannot be shared out evenly",
    ),
    "machines without an address": (RECIPE, {"num_machines": 2}, r"2 machines, and no main_process_ip"),
    "no processes": (RECIPE, {"num_processes": 0}, r"num_processes is 0, .*wanted whole numbers from 1"),
}

GPUS = {
    "more processes than GPUs": 0,
    "more processes than one GPU": 1,
    "hybrid on two of four GPUs": 4,
}  # a rehearsal does not ask

# Refused by the script.
CASES = {
    "misspelt setting": (settings(max_stepss=5), r"max_stepss"),
    "setting of the wrong type": (
        settings(max_steps="many"),
        r"argument --max_steps.*: invalid int value: 'many'",
    ),
    "mixed precision against storage": (
        settings(fp16=True),
        r"Mixed precision is fp16 and .* stored as bfloat16; wanted 'no'",
    ),
    "rank of zero": (settings(lora_r=0), r"lora_r 0 .* must be above 0"),
    "learning rate below zero": (settings(learning_rate=-1.0), r"learning_rate -1\.0; both must be above 0"),
    "no word on reentrant checkpoints": (
        settings(activation_checkpointing_kwargs={}),
        r"use_reentrant: false",
    ),
    "a log that never comes": (settings(logging_steps=10), r"logging_steps is 10 and max_steps 2: no loss"),
    "no log at all": (
        settings(logging_strategy="no"),
        r"logging_strategy is no: no loss would ever be logged",
    ),
    "checkpoints of another kind": (
        settings(
            load_best_model_at_end=True,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
        ),
        r"Found load_best_model_at_end; these checkpoints",
    ),
    "hybrid, two machines of one rank": (
        variables(FSDP_SHARDING_STRATEGY="HYBRID_SHARD", LOCAL_WORLD_SIZE="1"),
        r"HYBRID_SHARD with 1 rank a machine, wanted at least 2: .* Take FULL_SHARD",
    ),
    "compiled under FSDP 1": (settings(compile_layers=True), r"compile_layers wants FSDP 2"),
}
