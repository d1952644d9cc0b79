"""The estimate of a step, held to every recorded one: links made slow, all goals, and what others published."""

import json
from dataclasses import replace

import pytest
import yaml

from nbutils.common.paths import ROOT
from nbutils.planning.run_setup import Choices, Setup
from nbutils.planning.shapes import shape_of
from nbutils.planning.step_estimate import Links, estimate, incoming_bytes, pcie4_links, waiting_seconds
from nbutils.planning.step_time import measured_links

RESULTS = ROOT / "benchmarks/results"
SLOW = json.loads((RESULTS / "slow_links.json").read_text(encoding="utf-8"))["cases"]
H200 = Links(**measured_links(RESULTS / "links_2gpu.json"))
SEVENTY = shape_of("llama31_70b")
THROTTLED = [(name, row["link_gbs"]) for name, case in SLOW.items() for row in case["by_speed"]]


def run_of(config: dict) -> tuple:
    """Shape, setup, rows, length and choices of a record."""
    settings = dict(setting.partition("=")[::2] for setting in config["settings"])
    choices = Choices.read({name: yaml.safe_load(value) for name, value in settings.items()})
    shape = replace(SEVENTY, layers=config["num_layers"])
    setup = Setup(config["world_size"], config["fsdp_version"], config["offload"])
    return shape, setup, config["batch_size"], config["seq_len"], choices


def recorded(version: int) -> dict[str, dict]:
    """Steps of two GPUs with full rows, 2,048 tokens a rank or more: of fewer, launching on the CPU decides."""
    found = {}
    for file in RESULTS.rglob("*.json"):
        run = json.loads(file.read_text(encoding="utf-8"))
        if "earlier" in file.parts or not isinstance(run.get("measured"), dict) or "fit_one" in file.name:
            continue
        config, seconds = run["config"], run["measured"].get("step_seconds")
        full = not any(
            "dataset=" in setting and "packing" not in str(config) for setting in config["settings"]
        )
        dense = "dense_mask" in file.name  # in the way of torch's own kernel
        if (
            seconds
            and full
            and not dense
            and config["fsdp_version"] == version
            and config["num_layers"] >= 12
        ):
            found[str(file.relative_to(RESULTS))] = run
    return found


def estimated(config: dict, links: Links = H200):
    shape, setup, batch, length, choices = run_of(config)
    return estimate(shape, setup, batch, length, links, choices, config["lora_r"])


@pytest.mark.parametrize("name", SLOW)
def test_the_bytes_that_come_in_are_those_that_were_counted(name):
    config = SLOW[name]["config"]
    shape, setup, batch, length, choices = run_of(config)
    counted = sum(map(sum, incoming_bytes(shape, setup, batch * length, choices, config["lora_r"])))
    assert counted == pytest.approx(SLOW[name]["by_speed"][0]["incoming_bytes"], rel=0.005)


@pytest.mark.parametrize(("name", "gbs"), THROTTLED)
def test_a_step_over_slow_links_is_estimated_within_15_percent(name, gbs):
    (row,) = (row for row in SLOW[name]["by_speed"] if row["link_gbs"] == gbs)
    links = Links(gbs, gbs, H200.tflops) if gbs else H200
    found = estimated(SLOW[name]["config"], links)
    # The head's way to the GPU was not made slow.
    found = replace(found, beside=estimated(SLOW[name]["config"]).beside)
    assert found.step == pytest.approx(row["step_seconds"], rel=0.15)


@pytest.mark.parametrize(("version", "error"), [(2, 0.15), (1, 0.25)])
def test_every_record_of_full_rows_is_estimated(version, error):
    off = {
        name: estimated(run["config"]).step / run["measured"]["step_seconds"] - 1
        for name, run in recorded(version).items()
        if run["config"]["batch_size"] * run["config"]["seq_len"] >= (1024 if version == 2 else 4096)
    }
    assert len(off) >= 3
    assert all(abs(value) < error for value in off.values()), off


@pytest.mark.parametrize(("tflops", "published"), [(71, 178), (165, 477)])
def test_what_others_published_for_such_cards_is_met_within_30_percent(tflops, published):
    """Answer.AI, 2024: Llama 2 70B, two 3090s and two 4090s, two rows of 2,048; the slots are not told."""
    found = estimate(SEVENTY, Setup(2, 1, True), 2, 2048, pcie4_links(16, tflops))
    assert found.tokens_per_second == pytest.approx(published, rel=0.30)


def test_fsdp_1_waits_for_all_and_fsdp_2_for_what_does_not_hide():
    moving, computing = [3.0, 4.0], [1.0, 6.0]
    assert waiting_seconds(moving, computing, Setup(2, 1, True), 10) == 7.0
    # Forward 3 - 1 is left, and of the shorter time one layer's; backward all hides but one layer's.
    assert waiting_seconds(moving, computing, Setup(2, 2, True), 10) == pytest.approx(2 + 0.1 + 0.4)


def test_without_checkpoints_a_third_less_is_computed_and_more_rows_move_nothing_more():
    on_gpus = Setup(2, 2, False)
    plain = estimate(SEVENTY, on_gpus, 2, 512, H200)
    spared = estimate(SEVENTY, on_gpus, 2, 512, H200, Choices(checkpointing=False))
    assert spared.computing == pytest.approx(plain.computing * 2 / 3, rel=0.01)
    assert estimate(SEVENTY, on_gpus, 8, 512, H200).moving == plain.moving
