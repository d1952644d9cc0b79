"""A config file or settings that would not start what was meant are refused, in a sentence."""

from types import SimpleNamespace

import pytest
from bad_input.case import assert_refused
from bad_input.config import CASES, CONFIGS, GPUS
from trl import SFTConfig

from nbutils.common.paths import ROOT
from nbutils.common.refused import Refused
from nbutils.launching.config_faults import BadConfig, refuse_bad_config
from nbutils.launching.config_files import RECIPE, variant
from nbutils.planning.hybrid_shard import SPELLINGS
from nbutils.training import before_loading as refusing

pytestmark = pytest.mark.launch


@pytest.mark.parametrize("cause", CONFIGS)
def test_a_bad_config_is_refused(cause, tmp_path):
    file, changes, words = CONFIGS[cause]
    with pytest.raises(BadConfig, match=words) as refused:
        refuse_bad_config(variant(ROOT / file, tmp_path, **changes), gpus=GPUS.get(cause))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("asked", [0, -1])
def test_a_number_of_processes_that_cannot_be_is_refused_whatever_the_file_says(asked):
    with pytest.raises(BadConfig, match=f"num_processes is {asked}, .*wanted whole numbers from 1"):
        refuse_bad_config(ROOT / RECIPE, num_processes=asked)


def test_a_file_that_is_no_config(tmp_path):
    for text, words in {
        "a: [": "cannot be read as YAML",
        "- a": "must hold lines `key: value`",
        "distributed_type: FSDP": "distributed_type: FSDP and has no fsdp_config",
    }.items():
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(BadConfig, match=words):
            refuse_bad_config(tmp_path / "c.yaml")
    with pytest.raises(BadConfig, match=r"Did you mean .*config_fsdp\.yaml\?"):
        refuse_bad_config(ROOT / "configs/accelerate/config_fdsp.yaml")


OURS = [*ROOT.glob("configs/accelerate/*.yaml"), *ROOT.glob("configs/machines/*.yaml")]


@pytest.mark.parametrize("file", sorted(OURS), ids=lambda file: file.name)
def test_every_config_of_ours_is_accepted(file):
    refuse_bad_config(file)


@pytest.mark.parametrize("cause", CASES)
def test_bad_settings_are_refused_before_a_weight_is_read(answered, cause):
    cases, seen = answered
    assert_refused(cases[cause], seen[cause], CASES[cause][1])


@pytest.mark.parametrize(
    "logs", [{"logging_strategy": "epoch"}, {"logging_first_step": True}, {"max_steps": -1}]
)
def test_what_logs_a_loss_in_another_way_is_not_refused_for_its_logging_steps(logs, tmp_path):
    recipe = SimpleNamespace(
        lora_r=4, lora_dropout=0.0, compile_layers=False, mlp_tiles=0, embeddings_on_host=False
    )
    told = {"output_dir": str(tmp_path), "max_steps": 5, "logging_steps": 500, "bf16": False, "use_cpu": True}
    kwargs = {"gradient_checkpointing": None, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    refusing._refuse_settings(recipe, SFTConfig(**told | kwargs | logs))


def test_hybrid_where_each_rank_sees_one_of_the_gpus_is_refused(monkeypatch):
    """As a scheduler shows them that binds a GPU to each task; FSDP 1 would take each rank for a machine."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for name, value in {"ACCELERATE_USE_FSDP": "true", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_SHARDING_STRATEGY", "FULL_SHARD")
    refusing._refuse_hybrid_of_other_groups()
    for spelling in SPELLINGS:
        monkeypatch.setenv("FSDP_SHARDING_STRATEGY", spelling)
        with pytest.raises(
            Refused, match=rf"is {spelling} with 2 ranks a machine, each of which sees 1 device; "
        ):
            refusing._refuse_hybrid_of_other_groups()
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        refusing._refuse_hybrid_of_other_groups()
        monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("FSDP_VERSION", "2")  # which reads no strategy
    refusing._refuse_hybrid_of_other_groups()
