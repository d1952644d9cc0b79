"""The memory plan against everything that was recorded, and the formulas against numbers worked out by hand."""

import json
import os
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from nbutils.common.paths import ROOT
from nbutils.launching.out_of_memory import advice, settings_of
from nbutils.lessons.scale_figures import choices_of, plan_of
from nbutils.planning.memory_items import (
    GIB,
    pinned_bytes,
    quantisation_state_bytes,
    saved_bytes_per_token,
)
from nbutils.planning.memory_plan import _changes, _Run, fits, plan, what_to_change
from nbutils.planning.model_needs import MODELS, gpu_gib
from nbutils.planning.run_setup import Choices, Setup
from nbutils.planning.shapes import SHAPES, config_of, shape_of

RESULTS = ROOT / "benchmarks" / "results"
RUNS = {
    path.relative_to(RESULTS).with_suffix("").as_posix(): json.loads(path.read_text())
    for folder in ("", "each_change", "cap_21_gib", "compare_12", "one_gpu")
    for path in sorted((RESULTS / folder).glob("*.json"))
    if path.stem.startswith(("fit_", "70b_", "held_out_"))
}
KEYS = {
    "": {"machine", "versions", "commit", "date", "command", "config", "outcome", "predicted", "measured"},
    "config": {
        "model", "num_layers", "fsdp_version", "offload", "cap_gib", "world_size", "seq_len", "batch_size", "lora_r",
    },
    "predicted": {"gpu_peak_bytes", "host_bytes"},
    "measured": {
        "gpu_peak_bytes", "host_bytes", "gpu_reserved_bytes", "step_seconds", "tokens_per_second", "losses",
    },
}  # fmt: skip


@pytest.fixture(params=RUNS)
def run(request):
    return RUNS[request.param]


def test_some_runs_are_recorded_and_some_were_not_used_for_the_fit():
    assert len([name for name in RUNS if name.startswith("fit_")]) == 5
    trained = [name for name, run in RUNS.items() if run["outcome"] == "ok"]
    assert len([name for name in trained if not name.startswith("fit_")]) >= 5 and len(trained) >= 10


def test_each_result_says_what_ran_where(run):
    for part, keys in KEYS.items():
        assert not keys - set(run[part] if part else run), part
    assert run["outcome"] in ("ok", "oom")
    assert run["machine"]["gpus"] and run["machine"]["driver"] and run["commit"]
    assert {"torch", "transformers", "accelerate", "peft", "trl", "bitsandbytes", "python"} <= set(
        run["versions"]
    )
    assert "accelerate launch" in run["command"]
    assert "/tmp/" not in json.dumps(run["config"]) + run["command"]


def test_the_plan_is_within_five_percent_of_the_peak(run):
    if run["outcome"] == "oom":
        assert plan_of(run).gpu_peak_bytes > run["config"]["cap_gib"] * GIB
    else:
        assert plan_of(run).gpu_peak_bytes == pytest.approx(run["measured"]["gpu_peak_bytes"], rel=0.05)


def test_each_moment_that_was_seen_is_predicted_and_not_the_highest_alone(run):
    if run["outcome"] == "oom":
        return
    moments, phases = plan_of(run).moments, run["measured"]["phases"]
    wrapping = sum(moments["wrapping"].values())
    training = max(
        sum(items.values())
        for name, items in moments.items()
        if name not in ("wrapping", "first layer of an evaluation")
    )
    assert wrapping == pytest.approx(phases["wrapped"][0], rel=0.01)
    # With few layers what does not grow with them weighs more. Under offload the loss is planned with all that may be
    # on its way to the next layer: half a percent more.
    few = run["config"]["num_layers"] == 12
    loss = plan_of(run).peak_moment == "loss" and run["config"]["offload"]
    assert training == pytest.approx(phases["trained"][0], rel=0.035 if few else 0.025 if loss else 0.02)


def test_host_memory_is_within_twelve_percent(run):
    if run["outcome"] == "ok":
        host = plan_of(run).host_bytes * run["config"]["world_size"]
        config = run["config"]
        # FSDP 1 with few layers is highest in its first step, a moment that the plan has not (benchmarks/README.md).
        first_step = config["fsdp_version"] == 1 and config["offload"] and config["num_layers"] == 12
        assert host == pytest.approx(run["measured"]["host_bytes"], rel=0.18 if first_step else 0.12)


def test_no_run_that_trained_was_predicted_not_to_fit(run):
    cap = run["config"]["cap_gib"]
    if run["outcome"] == "ok" and cap:
        assert plan_of(run).gpu_peak_bytes < cap * GIB


def test_the_shapes_have_the_parameters_of_the_model_cards():
    assert SHAPES["llama32_1b"].parameters == 1_235_814_400
    assert SHAPES["llama31_8b"].parameters == 8_030_261_248
    assert SHAPES["llama31_70b"].parameters == 70_553_706_496
    assert SHAPES["llama31_405b"].parameters == 405_853_388_800
    assert SHAPES["llama31_70b"].adapter_parameters(16) == 207_093_760  # as the recorded adapter has


def test_a_config_json_gives_the_shape(tmp_path):
    shape = SHAPES["llama31_8b"]
    config = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert replace(shape_of(tmp_path), name=shape.name) == shape
    del config["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="vocab_size"):
        shape_of(tmp_path)
    with pytest.raises(ValueError, match="neither one of tiny"):
        shape_of("llama9")


@pytest.mark.parametrize("name", SHAPES)
def test_a_config_made_of_a_shape_gives_the_shape_back(name, tmp_path):
    """Benchmarks and dry runs make their random models so."""
    config_of(SHAPES[name]).save_pretrained(tmp_path)
    assert replace(shape_of(tmp_path), name=name) == SHAPES[name]


def test_formulas_by_hand():
    assert quantisation_state_bytes(64 * 256) == 256 + 4
    assert pinned_bytes(213_925_888) == 256 * 2**20
    assert pinned_bytes(2**20) == 2**20
    resident = Choices(offload_activations=True)
    waiting = [
        plan(SHAPES["llama31_70b"], Setup(2, 2, False), rows, 2048, choices=resident) for rows in (12, 16)
    ]
    assert [item.host["layer inputs, pinned"] for item in waiting] == [
        80 * 2**29
    ] * 2  # blocks of powers of two
    assert saved_bytes_per_token(SHAPES["llama31_70b"]) == 364_544


@pytest.mark.parametrize("config", ["config_fsdp.yaml", "config_fsdp2.yaml"])
def test_the_setup_comes_from_the_config_files(config):
    folder = ROOT / "configs" / "accelerate"
    setup = Setup.read(folder / config)
    assert (setup.fsdp_version, setup.offload) == ((1, True) if config == "config_fsdp.yaml" else (2, False))
    assert setup.world_size == 2 and setup.reshard


def test_hybrid_sharding_frees_what_it_gathered_as_full_sharding_does():
    folder = ROOT / "configs" / "machines"
    hybrid, full = (Setup.read(folder / f"two_machines_{name}.yaml") for name in ("hybrid", "fsdp1"))
    assert hybrid.reshard and hybrid == replace(full, world_size=2)  # shared by the ranks of one machine


def test_cards_and_advice():
    shape = SHAPES["llama31_70b"]
    tight = plan(shape, Setup(2, 1, False), 1, 1024)
    assert fits(tight)[24] < 0 < fits(tight)[48]
    advice = what_to_change(shape, Setup(2, 1, False), 1, 1024, 16, int(22.5 * GIB))
    assert any("host memory" in line and line.endswith("fits") for line in advice)
    assert what_to_change(shape, Setup(2, 1, True), 1, 1024, 16, int(22.5 * GIB)) == []


@pytest.mark.parametrize("version", [1, 2])
def test_what_it_says_to_change_can_be_done(version):
    """The script refuses compiled layers under FSDP 1, and FSDP 2 with an output head that is offloaded."""
    run = _Run(Setup(2, version, False), 4, 4096, Choices(compile_layers=version == 2))
    for name, change in _changes(run).items():
        after = change(run)
        assert after != run and after.setup.fsdp_version == version, name
        assert not (version == 2 and after.setup.offload) or after.choices.embeddings_on_host, name
    shape, budget = SHAPES["llama31_70b"], 8 * GIB
    said = what_to_change(shape, run.setup, run.batch, run.length, 16, budget, run.choices)
    alone = [line for line in said if not line.startswith(("all of these", "twice"))]
    assert len(alone) == len(_changes(run)) and not any(line.endswith("fits") for line in alone)
    (together,) = [line for line in said if line.startswith("all of these")]
    assert together.endswith("fits")
    more = [line.split(":")[0] for line in said if line.startswith("twice")]
    assert more == [f"twice as many GPUs, FSDP {newer}" for newer in (1, 2) if newer >= version]


@pytest.mark.parametrize("name", ["llama32_1b", "llama31_8b", "llama31_70b"])
def test_one_rank_of_fsdp1_has_all_of_the_model_on_its_gpu_with_offload_too(name):
    """tests/patches/test_fsdp1_pinned_memory.py shows why; FSDP 2 shards among one as well, and leaves the GPU."""
    shape = SHAPES[name]
    offloaded, plain = (plan(shape, Setup(1, 1, offload), 1, 1024) for offload in (True, False))
    assert offloaded.moments == plain.moments
    whole = shape.layers * shape.linear_parameters // 2 + 2 * shape.vocab * shape.hidden
    assert all(sum(items.values()) > whole for items in offloaded.moments.values())
    assert offloaded.host_bytes > plain.host_bytes + whole  # and once more in host memory
    assert plan(shape, Setup(1, 2, True), 1, 1024).gpu_peak_bytes < plain.gpu_peak_bytes
    assert plan(shape, Setup(2, 1, True), 1, 1024).moments != plan(shape, Setup(2, 1, False), 1, 1024).moments


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("reshard", [True, False])
def test_one_rank_of_fsdp1_is_told_of_fsdp2_and_not_of_a_switch_that_does_nothing(offload, reshard):
    shape, run = SHAPES["llama31_70b"], _Run(Setup(1, 1, offload, reshard), 1, 1024, Choices())
    changes = _changes(run)
    assert [name for name in changes if "fsdp_offload_params" in name or "FULL_SHARD" in name] == []
    (name,) = [name for name in changes if "parameters in host memory" in name]
    after = changes[name](run)
    assert after.setup == Setup(1, 2, True) and after.choices.embeddings_on_host
    said = what_to_change(shape, run.setup, run.batch, run.length, 16, int(22.5 * GIB))
    assert next(line for line in said if line.endswith("fits")).startswith(name)
    assert "config_fsdp2_offload.yaml and embeddings_on_host: true" in name


def test_the_least_that_one_gpu_needs_is_not_less_for_offload():
    big = MODELS["llama31_70b"]
    assert gpu_gib(big, 1, offload=True) == gpu_gib(big, 1, offload=False) > 40
    assert gpu_gib(big, 2, offload=True) < 24


EVIDENCE = ROOT / "docs" / "evidence.md"


def test_the_evidence_shows_what_was_recorded():
    lines = EVIDENCE.read_text().splitlines()
    shown = [line for line in lines if line.startswith("| ") and "GiB" in line]
    capped = ("fast_cap_b4_l2048", "host_inputs_cap_b8_l2048", "host_inputs_cap_b12_l2048")
    capped += ("resident_cap_b2_l2048", "long_cap_b1_l32768")
    earlier = (
        "fsdp1_offload_cap_b2_l2048",
        "fast_cap_b4_l2048",
        "resident_cap_b2_l2048",
        "big_cards_b2_l2048",
    )
    files = [*(f"cap_21_gib/70b_{name}" for name in capped), *(f"70b_{name}" for name in earlier)]
    for line, name in zip(shown, files, strict=True):
        run = json.loads((RESULTS / f"{name}.json").read_text())
        config, measured = run["config"], run["measured"]
        rows = f"{config['batch_size']} x {config['seq_len']:,}"
        peak, speed = measured["gpu_peak_bytes"] / GIB, measured["tokens_per_second"]
        reserved = measured["gpu_reserved_bytes"] / GIB
        host = measured["host_bytes"] / GIB
        held = f"| {reserved:.1f} GiB | {host:.0f} GiB " if name.startswith("cap_21_gib") else ""
        assert line.endswith(f"| {rows} | {peak:.1f} GiB {held}| {speed:,.0f} |"), line


def test_the_evidence_and_the_readme_say_what_was_recorded_beside_peft():
    files = (
        "peer_b2_l2048",
        *(f"70b_{name}" for name in ("fsdp1_offload_cap_b2_l2048", "resident_cap_b2_l2048")),
    )
    files += ("70b_fast_cap_b4_l2048", "70b_big_cards_b2_l2048")
    speeds = [recorded(f"compare_12/{name}")["tokens_per_second"] for name in files]
    said = re.search(
        r"example made ([\d,]+) tokens/s and saved a file of (\d+) bytes without a tensor\. The recipe of 2024 made "
        r"([\d,]+), `resident_2x24gb` ([\d,]+), `fastest_2x24gb` ([\d,]+), .*? `fastest_big_cards` ([\d,]+)",
        " ".join(EVIDENCE.read_text().split()),
    ).groups()
    adapter = json.loads((RESULTS / "compare_12/peer_b2_l2048.json").read_text())["adapter"]
    assert adapter == {"bytes": int(said[1]), "tensors": 0}
    assert [said[0], *said[2:]] == [f"{speed:,.0f}" for speed in speeds]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"`fastest_2x24gb` is {speeds[3] / speeds[0]:.2f} times as fast" in readme
    for goal, name in (("fastest", "fast_cap_b4"), ("resident", "resident_cap_b2")):
        run = recorded(f"cap_21_gib/70b_{name}_l2048")
        used, reserved, host = (run[f"{what}_bytes"] / GIB for what in ("gpu_peak", "gpu_reserved", "host"))
        shown = f"{used:.1f} GiB | {reserved:.1f} GiB | {host:.0f} GiB | {run['tokens_per_second']:,.0f} |"
        assert re.search(rf"\| `{goal}_2x24gb`: [^|]* \| {re.escape(shown)}", readme), goal


def test_the_records_of_long_rows_on_one_gpu_are_told_as_they_are():
    log = (ROOT / "docs" / "speed_log.md").read_text()
    for name in (
        "long_cap_b1_l32768_12",
        "tiled_cap_b1_l32768_12",
        "tiled_cap_b1_l65536_12",
        "tiled_cap_b1_l65536_72",
    ):
        run = json.loads((RESULTS / f"one_gpu/70b_{name}_layers.json").read_text())
        config, found = run["config"], run["measured"]
        used, reserved, planned = (
            f"{size / GIB:.1f} GiB"
            for size in (
                found["gpu_peak_bytes"],
                found["gpu_reserved_bytes"],
                run["predicted"]["gpu_peak_bytes"],
            )
        )
        assert found["run"]["adapter"]["verified"] and found["gpu_reserved_bytes"] < 21.3 * GIB
        tiles = 8 if "mlp_tiles=8" in config["settings"] else "none"
        line = (
            f"| {config['num_layers']} | {config['seq_len']:,} | {tiles} | {used} | {planned} | {reserved} "
        )
        assert f"{line}| {found['host_bytes'] / GIB:.0f} GiB | {found['tokens_per_second']:,.0f} |" in log
    text = " ".join(EVIDENCE.read_text().split())
    assert f"{used} in use, {reserved} reserved, {found['tokens_per_second']:.0f} tokens/s" in text
    whole = recorded("one_gpu/70b_big_cards_b2_l2048")
    assert f"{whole['tokens_per_second']:,.0f} tokens/s in {whole['gpu_peak_bytes'] / GIB:.1f} GiB." in text
    assert f"It took {found['host_bytes'] / GIB:.0f} GiB of host memory" in text
    one, two = (
        plan(SHAPES["llama31_70b"], Setup(ranks, 2, True), 1, 65536, choices=choices_of(run)).gpu_peak_bytes
        for ranks in (1, 2)
    )
    assert f"adds {(two - one) / GIB:.1f} GiB to its GPU, by the plan" in text
    plain, tiled = (recorded(f"one_gpu/70b_{name}_cap_b1_l32768_12_layers") for name in ("long", "tiled"))
    used = [f"{run['gpu_peak_bytes'] / GIB:.1f}" for run in (tiled, plain)]
    ratio = tiled["tokens_per_second"] / plain["tokens_per_second"]
    assert f"take {used[0]} GiB where the whole MLP takes {used[1]}, at {ratio:.2f} times its speed" in text
    for name, words in (
        ("", "{first:.0f} s to the end of the first step, {wrap:.0f} of them"),
        ("_registered", "{first:.0f} s, {wrap:.0f} of them"),
    ):
        seconds = recorded(f"one_gpu/70b_fast_cap_b4_l2048{name}")["seconds"]
        said = words.format(first=seconds["to_first_step"], wrap=seconds["wrap"])
        assert f"{said} for wrapping" in " ".join(log.split())


def test_the_log_tells_what_bf16_loses_of_a_young_adapter():
    record = json.loads((RESULTS / "adapter_rounding.json").read_text())
    log = (ROOT / "docs" / "speed_log.md").read_text()
    rows = re.findall(r"^\| (\de-\d) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", log, re.M)
    found = {
        (f"{run['learning_rate']:.0e}".replace("e-0", "e-"), str(seen["steps"])): seen["loss"]
        for run in record["smollm2"]
        for seen in run["held_out"]
    }
    assert len(rows) == 7
    for rate, steps, *losses in rows:
        assert losses == [f"{found[rate, steps][way]:.4f}" for way in ("bf16", "fp32")]
    gained = {
        steps: [found["2e-4", "0"][way] - found["2e-4", steps][way] for way in ("bf16", "fp32")]
        for steps in ("1", "39")
    }
    assert 0.2 < gained["1"][0] / gained["1"][1] < 0.3 and 0.99 < gained["39"][0] / gained["39"][1] < 1.01
    whole, tiled = (recorded(f"one_gpu/70b_{name}_cap_b1_l32768_12_layers") for name in ("long", "tiled"))
    said = [f"{run['losses'][1]:.2f}" for run in (whole, tiled)]
    said += [f"{run['run']['training']['held_out_loss_after']:.3f}" for run in (whole, tiled)]
    text = " ".join(log.split())
    assert f"{said[0]} with the whole MLP and {said[1]} in tiles" in text
    assert f"after three steps {said[2]} and {said[3]} (" in text


@pytest.mark.parametrize(
    ("length", "dropout", "told"), [(65536, 0, True), (65536, 0.1, False), (8192, 0, False)]
)
def test_long_rows_are_told_of_a_tiled_mlp(length, dropout, told):
    settings = {"compile_layers": True, "embeddings_on_host": True, "lora_dropout": dropout}
    run = _Run(Setup(2, 2, True), 1, length, Choices.read(settings))
    assert ("mlp_tiles: 8" in _changes(run)) == told


def test_a_real_small_model_ends_with_the_same_bits_however_it_is_shared():
    cases = json.loads((RESULTS / "smollm2_on_gpus.json").read_text())["cases"]
    shared = [cases[name] for name in ("FSDP 1", "FSDP 2", "DDP")]
    assert (
        len({case["adapter_sha256"] for case in shared}) == 1 and shared[0]["losses"] == shared[2]["losses"]
    )
    before, after = (
        {name: f"{case[f'held_out_loss_{when}']:.4f}" for name, case in cases.items()}
        for when in ("before", "after")
    )
    assert before["one GPU"] == before["FSDP 2"]
    text = " ".join(EVIDENCE.read_text().split())
    assert f"falls from {before['FSDP 2']} to {after['FSDP 2']}." in text
    assert f"ends at {after['one GPU']}. " in text
    altered = "FSDP 2, gather not fixed"
    assert f"FSDP 2 begins at {before[altered]} and ends at {after[altered]}." in text


def recorded(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())["measured"]


def test_the_evidence_names_the_other_machines():
    text = " ".join(EVIDENCE.read_text().split())
    said = re.search(
        r"first two lines made ([\d,]+) and ([\d,]+) tokens/s .*? ([\d,]+) and ([\d,]+) \(`earlier/each_change/`\): "
        r"so the second is ([\d.]+) to ([\d.]+) times",
        text,
    ).groups()
    speeds = {
        folder: [
            recorded(f"{folder}70b_{name}")["tokens_per_second"]
            for name in ("fsdp1_offload_cap_b2_l2048", "fast_cap_b4_l2048")
        ]
        for folder in ("", "each_change/", "earlier/each_change/")
    }
    ratios = sorted(fast / recipe for recipe, fast in speeds.values())
    assert said == tuple(
        [f"{speed:,.0f}" for folder in ("each_change/", "earlier/each_change/") for speed in speeds[folder]]
        + [f"{ratio:.1f}" for ratio in (ratios[0], ratios[-1])]
    )
    fewest = RUNS["70b_fewest_bytes_cap_b1_l1024"]["measured"]["gpu_peak_bytes"] / GIB
    assert f"70B trained in {fewest:.1f} GiB a GPU" in text


def test_fsdp2_begins_with_the_loss_of_fsdp1_and_the_evidence_says_what_it_was_before():
    def before(name):
        return recorded(name)["run"]["training"]["held_out_loss_before"]

    exact = {
        before(f"each_change/70b_{name}")
        for name in ("fsdp1_offload_cap_b2_l2048", "fsdp2_offload_host_cap_b2_l2048", "fsdp2_b2_l2048")
    }
    assert len(exact) == 1
    altered = before("earlier/each_change/70b_fsdp2_offload_host_cap_b2_l2048")
    text = " ".join(EVIDENCE.read_text().split())
    assert f"to the last digit, {exact.pop():.5f}; without it {altered:.5f}" in text


def test_the_goals_fit_where_they_say():
    goals = ROOT / "configs" / "goals"
    cases = {
        "fewest_bytes": (True, 1, 1024, 22.5), "fastest_2x24gb": (True, 4, 2048, 22.5),
        "resident_2x24gb": (False, 2, 2048, 22.5), "longest_context": (True, 1, 32768, 22.5),
        "fastest_big_cards": (False, 2, 2048, 139.8), "packed_2x24gb": (True, 4, 2048, 21.3),
    }  # fmt: skip
    assert {path.stem for path in goals.glob("*.yaml")} == set(cases)
    peaks = {}
    for name, (offload, batch, length, card) in cases.items():
        choices = Choices.read(yaml.safe_load((goals / f"{name}.yaml").read_text()))
        planned = plan(SHAPES["llama31_70b"], Setup(2, 2, offload), batch, length, choices=choices)
        peaks[name] = planned.gpu_peak_bytes / GIB
        assert peaks[name] < card, name
    assert min(peaks, key=peaks.get) == "fewest_bytes"


def settings_of_70b(folder: Path) -> tuple[list[str], Path]:
    """The words of a launch that a plan can be made for, and its config file."""
    (folder / "config.json").write_text(json.dumps({
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256,
    }))  # fmt: skip
    words = ["--model", str(folder), "--per_device_train_batch_size", "2", "--max_length", "2048"]
    return words, ROOT / "configs" / "accelerate" / "config_fsdp2.yaml"


def test_what_to_change_after_running_out_of_memory_knows_the_settings(tmp_path):
    """What stands on the command line is text, and counts as what it means."""
    words, config = settings_of_70b(tmp_path)
    plain = advice([*words, "--embeddings_on_host", "false"], config)
    host = advice([*words, "--embeddings_on_host", "true"], config)
    gib = [float(re.search(r"([\d.]+) GiB a rank", text)[1]) for text in (plain, host)]
    assert gib[0] - gib[1] > 0.9  # half of embedding and head, at the least
    # The first change that helps, and not one row a rank: that would still be too much.
    assert "Change first: activations in host memory" in host and host.endswith(" GiB, fits.")


def test_advice_takes_no_harm_from_a_card_of_unknown_size(tmp_path, monkeypatch):
    """It is given while a launch fails, and must not replace the launch's own error by one of its own."""
    words, config = settings_of_70b(tmp_path)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA GB10, [N/A], 12.1, GPU-aa00'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert "Change first: " in advice(words, config)
    # A table that is no text; nothing that nvidia-smi does may end in a traceback here.
    (tmp_path / "nvidia-smi").write_bytes(b"#!/bin/sh\nprintf '\\377, 1, 2, 3'\n")
    assert advice(words, config) == ""


@pytest.mark.parametrize(
    "words, settings",
    [
        (["--max_length", "64", "--seed", "-1"], {"max_length": "64", "seed": "-1"}),
        (["--max_length=64", "--output_dir=x"], {"max_length": "64", "output_dir": "x"}),
        (["--model=a=b", "--output_dir", "x"], {"model": "a=b", "output_dir": "x"}),
        (["--compile_layers", "--output-dir", "x"], {"compile_layers": "true", "output_dir": "x"}),
        (["--output_dir", "x", "--compile_layers"], {"output_dir": "x", "compile_layers": "true"}),
        ([], {}),
    ],
)
def test_the_words_of_a_script_are_read_as_it_reads_them(words, settings):
    assert settings_of(words) == settings


def test_a_file_of_settings_may_stand_behind_an_equals_sign(tmp_path):
    (tmp_path / "train.yaml").write_text("max_length: 64\noutput_dir: runs/x\n")
    settings = settings_of([f"--config={tmp_path}/train.yaml", "--output_dir=y"])
    assert (settings["max_length"], settings["output_dir"]) == (64, "y")


@pytest.mark.parametrize("layers", [12, 80])
@pytest.mark.parametrize(("name", "batch"), [("as_they_come", 4), ("grouped", 16)])
def test_padded_rows_are_planned_at_the_longest_of_them(name, batch, layers, tmp_path):
    """Recorded chats on two GPUs. A few steps of rows in any order need not meet the longest; grouped, it is first."""
    rows = runpy.run_path(str(ROOT / "benchmarks/matrix.py"))["write_chats"](tmp_path / "chats.jsonl")
    longest = max(len(json.loads(line)["text"].split()) for line in rows.open())  # a letter is a token
    run = json.loads((RESULTS / f"chats/chats_{layers}_{name}.json").read_text())
    shape = replace(SHAPES["llama31_70b"], layers=layers)
    then = replace(choices_of(run), stacked_adapters=False)  # they ran before gate and up shared a product
    planned = plan(shape, Setup(2, 2, True), batch, longest, choices=then).gpu_peak_bytes
    if run["outcome"] == "oom":
        assert planned > run["config"]["cap_gib"] * GIB
    else:
        near = 0.03 if name == "grouped" else 0.15
        assert (1 - near) * planned < run["measured"]["gpu_peak_bytes"] < 1.03 * planned
    assert run["predicted"]["gpu_peak_bytes"] > 1.7 * planned, "every row taken for full"


@pytest.mark.parametrize("name", ["70b_long_cap_b1_l32768", "fit_one_gpu_fast_offload_b1_l32768"])
def test_without_the_shared_product_as_with_dropout_a_layer_holds_more(name):
    """Records of before, of long rows; and a setting of the script that leaves each adapter to PEFT."""
    assert Choices.read({"lora_dropout": 0.05}) == Choices(stacked_adapters=False)
    assert Choices.read({"mlp_tiles": 8}) == Choices(mlp_tiles=8)
    run = json.loads((RESULTS / "earlier" / f"{name}.json").read_text())
    config, then = run["config"], replace(choices_of(run), stacked_adapters=False)
    shape = replace(SHAPES[config["model"]], layers=config["num_layers"])
    setup = Setup(config["world_size"], config["fsdp_version"], config["offload"])
    planned = plan(shape, setup, config["batch_size"], config["seq_len"], choices=then).gpu_peak_bytes
    assert planned == pytest.approx(run["measured"]["gpu_peak_bytes"], rel=0.02)


def test_accumulation_keeps_the_gradients_of_the_whole_adapter_on_each_gpu():
    """0.39 GiB for 70B and rank 16, by hand: 207,093,760 parameters in two bytes."""
    for setup in (Setup(2, 1, True), Setup(2, 2, True), Setup(8, 2, False)):
        once, twice = (
            plan(SHAPES["llama31_70b"], setup, 1, 1024, choices=Choices(accumulation=passes))
            for passes in (1, 2)
        )
        share = 0 if setup.offload else 2 * 207_093_760 // setup.world_size
        moment = "backward of a layer"
        more = sum(twice.moments[moment].values()) - sum(once.moments[moment].values())
        assert more == pytest.approx(2 * 207_093_760 - share, abs=100)
        assert once.host_bytes == twice.host_bytes
        assert sum(twice.moments["evaluation"].values()) == sum(once.moments["evaluation"].values())


def test_more_rows_in_an_evaluation_than_in_training_are_advised_against():
    settings = Choices(embeddings_on_host=True, compile_layers=True, eval_batch=8)
    said = what_to_change(SHAPES["llama31_70b"], Setup(2, 2, True), 1, 2048, 16, int(6.5 * GIB), settings)
    assert said[0].startswith("per_device_eval_batch_size: 1: 6.4 GiB, fits")
