"""A launch and its settings are read alike from files, from a rank's environment and from the script's dataclasses."""

from types import SimpleNamespace

import pytest
import yaml

from nbutils.common.paths import ROOT
from nbutils.launching.config_files import launch_environment
from nbutils.planning.run_setup import Choices, Setup

CONFIGS = sorted((ROOT / "configs").glob("[am]*/*.yaml"))  # accelerate/ and machines/
GOALS = sorted((ROOT / "configs/goals").glob("*.yaml"))
VARIABLES = (
    "ACCELERATE_USE_FSDP",
    "FSDP_VERSION",
    "FSDP_OFFLOAD_PARAMS",
    "FSDP_SHARDING_STRATEGY",
    "FSDP_RESHARD_AFTER_FORWARD",
)


@pytest.mark.parametrize("changes", [{}, {"fsdp_sharding_strategy": "SHARD_GRAD_OP"}, {"reshard": False}])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_rank_reads_in_its_environment_what_the_config_file_says(config, changes, monkeypatch, tmp_path):
    content = yaml.safe_load(config.read_text())
    fsdp = content["fsdp_config"]
    if "reshard" in changes and fsdp.get("fsdp_version", 1) == 2:
        fsdp["fsdp_reshard_after_forward"] = changes["reshard"]
    elif "fsdp_sharding_strategy" in changes and fsdp.get("fsdp_version", 1) == 1:
        fsdp |= changes
    file = tmp_path / config.name
    file.write_text(yaml.safe_dump(content))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in launch_environment(str(file)).items():
        monkeypatch.setenv(name, value)
    wanted = Setup.read(file)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(content["num_processes"] // content.get("num_machines", 1)))
    assert Setup.of_launch(content["num_processes"]) == wanted


@pytest.mark.parametrize("goal", GOALS, ids=lambda path: path.stem)
def test_the_script_s_dataclasses_give_the_choices_of_the_goal_s_file(goal):
    settings = yaml.safe_load(goal.read_text())
    recipe = {"embeddings_on_host": False, "compile_layers": False}
    training = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "learning_rate": 1e-4,
    }
    recipe, training = (
        SimpleNamespace(**{k: settings.get(k, v) for k, v in fields.items()}) for fields in (recipe, training)
    )
    assert Choices.of_script(recipe, training) == Choices.read(settings)


def test_no_choice_is_forgotten():
    """The host memory of a run was once planned without the checkpoints of every second layer, and without reshard."""
    how = {"use_reentrant": False, "every_n_layers": 2, "offload": True}
    told = {"activation_checkpointing": True, "activation_checkpointing_kwargs": how}
    found = Choices.of_script(
        SimpleNamespace(embeddings_on_host=True, compile_layers=True), SimpleNamespace(**told)
    )
    assert found == Choices(True, True, True, 2, True)
