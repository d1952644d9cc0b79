"""The config files: what they hold, what accelerate makes of them, and the questionnaire that writes one like them."""

import subprocess
import sys

import psutil
import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType
from torch.distributed.fsdp import BackwardPrefetch, ShardingStrategy, StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from nbutils.common.paths import ROOT
from nbutils.launching import config_files as configs
from nbutils.lessons import accelerate_questionnaire as questionnaire
from nbutils.planning.hybrid_shard import SPELLINGS, is_hybrid
from nbutils.planning.model_needs import MODELS, gpu_gib

FOLDER = ROOT / "configs" / "accelerate"
RECIPE, RECIPE_FSDP2 = ROOT / configs.RECIPE, ROOT / configs.RECIPE_FSDP2
REHEARSALS = {RECIPE: FOLDER / "rehearsal_fsdp1.yaml", RECIPE_FSDP2: FOLDER / "rehearsal_fsdp2.yaml"}

# The settings of 2024, key for key. config_fsdp.yaml stays as it is for ever; gains go into new files.
RECIPE_OF_2024 = {
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "distributed_type": "FSDP",
    "downcast_bf16": "no",
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_backward_prefetch": "BACKWARD_PRE",
    "fsdp_cpu_ram_efficient_loading": True,
    "fsdp_forward_prefetch": False,
    "fsdp_offload_params": True,
    "fsdp_sharding_strategy": "FULL_SHARD",
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    "fsdp_sync_module_states": True,
    "fsdp_use_orig_params": False,
    "machine_rank": 0,
    "main_training_function": "main",
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 2,
    "rdzv_backend": "static",
    "same_network": True,
    "tpu_env": [],
    "tpu_use_cluster": False,
    "tpu_use_sudo": False,
    "use_cpu": False,
}
# What a CPU cannot do, and why. Nothing else may differ between a config and its rehearsal.
ONLY_ON_GPUS = {
    RECIPE: {
        "use_cpu": "there is no GPU",
        "fsdp_offload_params": "FSDP 1 does not offload from a CPU to a CPU",
        "fsdp_sync_module_states": "accelerate and FSDP 1 refuse it without an accelerator",
        "fsdp_cpu_ram_efficient_loading": "it needs sync_module_states",
    },
    RECIPE_FSDP2: {"use_cpu": "there is no GPU"},
}


def text_of(plugin) -> dict[str, str]:
    """The plugin's settings as text, so that two plugins can be compared."""
    return {key: str(value) for key, value in vars(plugin).items()}


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.name)
def test_accelerate_loads_each_file_as_fsdp(file):
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == DistributedType.FSDP
    assert config.num_processes == 2


def test_the_recipe_is_that_of_2024_key_for_key():
    assert configs.flat_keys(RECIPE) == RECIPE_OF_2024


def test_every_key_of_the_recipe_has_a_comment_of_its_own_or_speaks_for_itself():
    plain = {"num_machines", "same_network", "use_cpu", "fsdp_config", "fsdp_auto_wrap_policy"}
    for line in RECIPE.read_text(encoding="utf-8").splitlines():
        key = line.split(":")[0].strip()
        if key and not key.startswith("#") and key not in plain:
            assert "#" in line, f"{key} has no comment in {RECIPE.name}"


def test_the_recipe_resolves_to_the_plugin_it_means():
    plugin = configs.resolve(RECIPE)
    assert plugin.fsdp_version == 1
    assert plugin.sharding_strategy == ShardingStrategy.FULL_SHARD
    assert plugin.backward_prefetch == BackwardPrefetch.BACKWARD_PRE
    assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.cpu_offload.offload_params is True
    assert plugin.use_orig_params is False
    assert plugin.sync_module_states is True
    assert plugin.cpu_ram_efficient_loading is True
    assert plugin.forward_prefetch is False


@pytest.mark.parametrize(
    "spelling", [*SPELLINGS, "hybrid_shard", 4, "FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", 1, 3]
)
def test_hybrid_strategies_are_known_by_every_spelling_that_accelerate_reads(spelling, tmp_path):
    plugin = configs.resolve(configs.variant(RECIPE, tmp_path, fsdp_sharding_strategy=spelling))
    hybrid = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)
    assert is_hybrid(spelling) == (plugin.sharding_strategy in hybrid)


def test_the_fsdp2_twin_resolves_to_the_plugin_it_means():
    plugin = configs.resolve(RECIPE_FSDP2)
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert type(plugin.cpu_offload).__name__ == "OffloadPolicy"
    assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
    assert plugin.use_orig_params is None
    assert plugin.sync_module_states is None


@pytest.mark.parametrize("real", REHEARSALS, ids=lambda file: file.name)
def test_a_rehearsal_differs_only_in_what_a_cpu_cannot_do(real):
    on_gpus, on_cpus = configs.flat_keys(real), configs.flat_keys(REHEARSALS[real])
    assert on_gpus.keys() == on_cpus.keys()
    assert {key for key in on_gpus if on_gpus[key] != on_cpus[key]} == ONLY_ON_GPUS[real].keys()


def test_an_unknown_key_is_refused(tmp_path):
    file = configs.variant(RECIPE, tmp_path, nonsense=1)
    with pytest.raises(ValueError, match="nonsense"):
        configs.resolve(file)


def test_resolving_leaves_the_environment_as_it_was(monkeypatch):
    monkeypatch.setenv("FSDP_VERSION", "2")  # a stray variable must neither be read nor be lost
    assert configs.resolve(RECIPE).fsdp_version == 1
    import os

    assert os.environ["FSDP_VERSION"] == "2"
    assert "FSDP_OFFLOAD_PARAMS" not in os.environ


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.launch
def test_the_questionnaire_answered_through_a_terminal_gives_the_same_plugin(tmp_path):
    file = tmp_path / "answered.yaml"
    asked = questionnaire.answer(file)
    assert len(asked) == len(questionnaire.ANSWERS)
    assert text_of(configs.resolve(file)) == text_of(configs.resolve(RECIPE))
    ours, theirs = configs.flat_keys(RECIPE), configs.flat_keys(file)
    assert {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)} == set(
        questionnaire.DIFFERENCES
    )
    # What the lesson says about today's spelling: under FSDP 1 the answer to the strategy question is not read.
    other = configs.variant(file, tmp_path, fsdp_reshard_after_forward="SHARD_GRAD_OP")
    assert configs.resolve(other).sharding_strategy == ShardingStrategy.FULL_SHARD


def test_accelerates_own_conversion_reads_our_file(tmp_path):
    converted = tmp_path / "converted.yaml"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "to-fsdp2"]
    subprocess.run(
        [*command, "--config_file", str(RECIPE), "--output_file", str(converted)], check=True, timeout=120
    )
    plugin, keys = configs.resolve(converted), configs.flat_keys(converted)
    assert plugin.fsdp_version == 2
    assert keys["fsdp_reshard_after_forward"] is True
    gone = {
        "fsdp_backward_prefetch",
        "fsdp_forward_prefetch",
        "fsdp_sync_module_states",
        "fsdp_use_orig_params",
    }
    assert not gone & keys.keys()
    # It keeps the two keys that our twin sets to false.
    twin = configs.flat_keys(RECIPE_FSDP2)
    changed = {key for key in keys.keys() | twin.keys() if keys.get(key) != twin.get(key)}
    assert changed == {"fsdp_offload_params", "fsdp_cpu_ram_efficient_loading"}


@pytest.mark.parametrize(
    ("gpus", "vram", "offload"),
    # Three cards of 24 GB need 23.2 GiB without offload, 20.9 of it PyTorch's. A card leaves 21.3, which is no room.
    [
        (2, 23.6, True),
        (2, 47.4, False),
        (3, 23.6, True),
        (3, 24.3, False),
        (4, 23.6, False),
        (8, 79.1, False),
    ],
)
def test_a_config_for_a_machine_is_loaded_back_by_accelerate(tmp_path, gpus, vram, offload):
    file = tmp_path / "mine.yaml"
    configs.for_machine(gpus, vram).to_yaml_file(str(file))
    loaded = load_config_from_file(str(file))
    assert loaded.num_processes == gpus
    assert loaded.fsdp_config["fsdp_offload_params"] is offload
    assert configs.resolve(file).cpu_offload.offload_params is offload
    untouched = RECIPE_OF_2024.keys() - {"num_processes", "fsdp_offload_params"}
    mine = configs.flat_keys(file)
    assert {key: mine[key] for key in untouched} == {key: RECIPE_OF_2024[key] for key in untouched}


@pytest.mark.parametrize(
    ("gpus", "vram", "message"), [(1, 80.0, "at least 2"), (2, 8.0, "GiB a GPU even with offload")]
)
def test_a_machine_that_cannot_is_told_so(gpus, vram, message):
    with pytest.raises(ValueError, match=message):
        configs.for_machine(gpus, vram)


def test_the_sizes_are_those_of_the_published_models():
    big = MODELS["llama31_70b"]
    assert big.linear + big.kept == pytest.approx(70.55e9, rel=0.001)
    assert big.copy_gib == pytest.approx(36.8, abs=0.1)  # measured with random weights of the same shapes
    assert gpu_gib(big, 2, offload=True) < 22.5 < gpu_gib(big, 2, offload=False)


def test_the_configs_are_plain_yaml_without_null():
    for file in FOLDER.glob("*.yaml"):
        assert None not in configs.flat_keys(file).values()
        assert yaml.safe_load(file.read_text(encoding="utf-8"))


def test_reading_a_config_prints_no_advice_on_a_machine_with_many_cores(monkeypatch, caplog):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 16)
    assert configs.launch_environment(REHEARSALS[RECIPE])["FSDP_VERSION"] == "1"
    assert "num_cpu_threads_per_process" not in caplog.text
