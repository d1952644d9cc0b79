"""Config files of other examples: refused in a second, in our words, before a process is started."""

import subprocess
import sys

import pytest
import yaml

from nbutils.common.paths import ROOT
from nbutils.launching.config_faults import BadConfig
from nbutils.launching.recipe_faults import refuse_for_recipe
from nbutils.launching.script_file import is_recipe, write_script

FSDP1 = {
    "distributed_type": "FSDP",
    "num_processes": 2,
    "fsdp_config": {
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_sharding_strategy": "FULL_SHARD",
    },
}


def with_fsdp(**keys) -> dict:
    return FSDP1 | {"fsdp_config": FSDP1["fsdp_config"] | keys}


# (content, GPUs, what is said); after the examples of PEFT, TRL and LLaMA-Factory
PEERS = {
    "offload on CPUs": (
        with_fsdp(fsdp_offload_params=True),
        None,
        r"fsdp_offload_params is true, and this run is on CPUs.*rehearsal_fsdp1",
    ),
    "sync on CPUs": (
        with_fsdp(fsdp_sync_module_states=True),
        None,
        r"fsdp_sync_module_states is true.*no GPU to send",
    ),
    "efficient loading on CPUs": (
        with_fsdp(fsdp_version=2, fsdp_cpu_ram_efficient_loading=True),
        None,
        r"fsdp_cpu_ram_eff.*rehearsal_fsdp2",
    ),
    "use_cpu beside GPUs": (
        with_fsdp(fsdp_offload_params=True) | {"use_cpu": True},
        2,
        r"this run is on CPUs",
    ),
    "DDP": (
        {"distributed_type": "MULTI_GPU", "num_processes": 2},
        2,
        r"MULTI_GPU for 2 processes; wanted FSDP",
    ),
    "nothing said": ({"num_processes": 2}, 2, r"distributed_type: NO for 2 processes; wanted FSDP"),
    "DeepSpeed": (
        {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}},
        2,
        r"a file for DeepSpeed; wanted",
    ),
    "Megatron": (
        {"distributed_type": "MEGATRON_LM", "num_processes": 1},
        2,
        r"MEGATRON_LM for 1 processes; wanted FSDP",
    ),
    "context parallel": (
        FSDP1 | {"parallelism_config": {"parallelism_config_cp_size": 2}},
        2,
        r"parallelism_config asks for",
    ),
    "FP8": (FSDP1 | {"fp8_config": {"backend": "TE"}}, 2, r"fp8_config asks for FP8"),
    "torch.compile": (FSDP1 | {"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, 2, r"compile_layers: true"),
    "checkpoints of FSDP": (
        with_fsdp(fsdp_activation_checkpointing=True),
        2,
        r"the script makes its checkpoints itself",
    ),
    "another layer": (
        with_fsdp(fsdp_transformer_layer_cls_to_wrap="MistralDecoderLayer"),
        2,
        r"no such layer. Write LlamaDecoderLayer",
    ),
    "one unit": (with_fsdp(fsdp_auto_wrap_policy="NO_WRAP"), 2, r"one unit, gathered whole"),
}


def written(tmp_path, content):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.parametrize("cause", PEERS)
def test_a_config_of_another_example_is_refused(cause, tmp_path):
    content, gpus, said = PEERS[cause]
    with pytest.raises(BadConfig, match=said) as refused:
        refuse_for_recipe(written(tmp_path, content), gpus=gpus)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content, gpus", [(FSDP1, 2), (FSDP1 | {"dynamo_config": {"dynamo_backend": "NO"}}, 2),
    (with_fsdp(fsdp_offload_params=True), 2), (with_fsdp(fsdp_transformer_layer_cls_to_wrap="LlamaDecoderLayer"), 2),
    ({"distributed_type": "NO", "num_processes": 1}, 1)])  # fmt: skip
def test_a_config_for_the_recipe_is_taken(content, gpus, tmp_path):
    refuse_for_recipe(written(tmp_path, content), gpus=gpus)


@pytest.mark.parametrize(
    "file", [*(ROOT / "configs/accelerate").glob("*.yaml"), *(ROOT / "configs/machines").glob("*.yaml")]
)
def test_our_own_files_are_taken(file):
    refuse_for_recipe(file, gpus=None if "rehearsal" in file.name else 8)


def test_it_is_said_before_accelerate_is_imported(tmp_path):
    """A bad config is no reason to wait; torch alone is asked for the GPUs."""
    script, file = write_script(tmp_path), written(tmp_path, PEERS["DeepSpeed"][0])
    code = (
        "import sys\nfrom nbutils.launching.launch import launch\n"
        f"try: launch({str(script)!r}, [], {str(file)!r}, log={str(tmp_path / 'log')!r})\n"
        "except ValueError as refused: print('DeepSpeed' in str(refused))\n"
        "print({'transformers', 'accelerate'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("True\nset()\n", "")
    assert not (tmp_path / "log").exists()


def test_a_script_of_ones_own_is_not_held_to_the_recipe(tmp_path):
    recipe = write_script(tmp_path)
    assert is_recipe(recipe) and not is_recipe(tmp_path / "nothing.py")
    (tmp_path / "own.py").write_text("print('mine')")
    assert not is_recipe(tmp_path / "own.py")
