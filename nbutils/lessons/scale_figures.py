"""The pictures and tables of lesson 06: the memory plan beside the cards, and predictions beside records."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import yaml

from nbutils.lessons import plots
from nbutils.planning.memory_items import GIB
from nbutils.planning.memory_plan import CARDS, Plan, left_gib, plan
from nbutils.planning.run_setup import Choices, Setup
from nbutils.planning.shapes import SHAPES

COLOURS = [plots.BLUE, plots.ORANGE, plots.SKY, plots.GREEN, plots.PURPLE, "#999999"]
HATCHES = ["", "///", "...", "xxx", "\\\\\\"]
SMALL = "items below 0.5 GiB"


def recorded_runs(folder: str | Path = "benchmarks/results") -> dict[str, dict]:
    """The recorded dry runs by name, those that the plan was fitted on first.

    Args:
        folder: of the records.
    """
    files = sorted(Path(folder).glob("*.json"))
    runs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
    dry = {name: run for name, run in runs.items() if run.get("outcome") in ("ok", "oom")}
    return dict(sorted(dry.items(), key=lambda item: (not item[0].startswith("fit_"), item[0])))


def plan_of(run: dict) -> Plan:
    """The plan for a recorded configuration, worked out now.

    Args:
        run: one of `recorded_runs`.
    """
    config = run["config"]
    return plan(
        replace(SHAPES[config["model"]], layers=config["num_layers"]),
        Setup(config["world_size"], config["fsdp_version"], config["offload"]),
        config["batch_size"],
        config["seq_len"],
        config["lora_r"],
        spare_host=config["spare_host_memory"],
        choices=choices_of(run),
    )


def choices_of(run: dict) -> Choices:
    """What the settings of a recorded run decided about memory; a dry run evaluates one row and keeps no checkpoint."""
    pairs = (setting.split("=", 1) for setting in run["config"].get("settings", []))
    of_dry_runs = {"per_device_eval_batch_size": 1, "save_strategy": "no"}
    passes = {"gradient_accumulation_steps": run["config"].get("gradient_accumulation_steps", 1)}
    return Choices.read(of_dry_runs | passes | {name: yaml.safe_load(value) for name, value in pairs})


def compare_with_records(runs: dict[str, dict]) -> None:
    """Print predicted beside recorded, one line a run.

    Args:
        runs: from `recorded_runs`.
    """
    rows = []
    for name, run in runs.items():
        expected, measured = plan_of(run), run["measured"]
        peak = measured["gpu_peak_bytes"]
        seen = f"{peak / GIB:.2f}" if run["outcome"] == "ok" else "out of memory"
        off = f"{expected.gpu_peak_bytes / peak - 1:+.2%}" if run["outcome"] == "ok" else ""
        host = expected.host_bytes * run["config"]["world_size"]
        rows.append([name, f"{expected.gpu_peak_bytes / GIB:.2f}", seen, off, f"{host / GIB:.0f}",
                     f"{measured['host_bytes'] / GIB:.0f}"])  # fmt: skip
    plots.table(["run", "GPU planned", "GPU recorded", "off by", "host planned", "host recorded"], rows)


def peak_gib(run: dict) -> float | None:
    """GPU memory at the peak of a recorded run, in GiB a rank; None where it did not end well."""
    return run["measured"]["gpu_peak_bytes"] / GIB if run["outcome"] == "ok" else None


def draw_plans(
    plans: dict[str, Plan], recorded: dict[str, float | None], cards: Sequence[int] = (24, 48)
) -> None:
    """Draw each plan as a stacked bar, with what was recorded and what cards of some sizes show.

    Args:
        plans: by label.
        recorded: GiB by label; None where nothing was recorded.
        cards: nominal sizes in GB.
    """
    parts = {label: _thick_parts(item) for label, item in plans.items()}
    names = list(dict.fromkeys(name for part in parts.values() for name in part if name != SMALL))
    figure, axes = plt.subplots(figsize=(7.2, 0.75 * len(plans) + 2.4))
    for row, part in enumerate(parts.values()):
        left = 0.0
        for number, name in enumerate([*names, SMALL]):
            gib = part.get(name, 0) / GIB
            style = {"color": COLOURS[number % 6], "hatch": HATCHES[number // 6], "edgecolor": "white"}
            if name == SMALL:
                style = {"color": "lightgrey", "edgecolor": "white"}
            axes.barh(row, gib, 0.6, left, linewidth=0.4, label=name, **style)
            left += gib
    for row, label in enumerate(plans):
        if recorded.get(label):
            axes.plot(recorded[label], row, marker="D", color=plots.BLACK, linestyle="", markersize=6)
    room = {card: left_gib(CARDS[card]) for card in cards}
    for card in cards:
        axes.axvline(room[card], color=plots.VERMILION, linestyle="--", linewidth=1, marker="")
        axes.text(room[card], -0.4, f" {card} GB card", color=plots.VERMILION, fontsize=8)
    axes.set_yticks(range(len(plans)), plans)
    axes.set_ylim(len(plans) - 0.5, -0.6)
    axes.set_xlabel("GiB on each GPU at the highest moment; diamond: recorded")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    figure.legend(unique.values(), unique.keys(), fontsize=8, ncols=2, loc="outside lower center")
    text = "; ".join(
        f"{label}: planned {item.gpu_peak_bytes / GIB:.1f} GiB"
        + (f", recorded {recorded[label]:.1f}" if recorded.get(label) else "")
        for label, item in plans.items()
    )
    lines = ", ".join(f"{card} GB card {gib:.1f} GiB" for card, gib in room.items())
    plots.show(figure, f"Stacked bars of the memory plan. {text}. Dashed lines, room for PyTorch: {lines}.")


def _thick_parts(item: Plan) -> dict[str, int]:
    """The items of a plan in bytes; those that would be a hairline are put together."""
    thick = {name: size for name, size in item.gpu.items() if size >= 0.5 * GIB}
    return thick | {SMALL: sum(item.gpu.values()) - sum(thick.values())}


def draw_speeds(runs: dict[str, dict]) -> None:
    """Draw tokens a second of recorded runs, the first as the baseline, with memory and ratio beside each bar.

    Args:
        runs: by label.
    """
    speeds = [run["measured"]["tokens_per_second"] for run in runs.values()]
    figure, axes = plt.subplots(figsize=(7.2, 0.55 * len(runs) + 1.2))
    rows = []
    for row, (label, run) in enumerate(runs.items()):
        config, peak = run["config"], run["measured"]["gpu_peak_bytes"] / GIB
        colour = plots.ORANGE if config["cap_gib"] else plots.BLUE
        axes.barh(
            row, speeds[row], 0.6, color=colour, hatch="" if config["cap_gib"] else "///", edgecolor="white"
        )
        ratio = speeds[row] / speeds[0]
        axes.text(speeds[row], row, f" {speeds[row]:,.0f} tokens/s, {ratio:.2f} x", va="center", fontsize=8)
        shape = f"{config['batch_size']} x {config['seq_len']:,}"
        cap = f"{config['cap_gib']} GiB" if config["cap_gib"] else "none"
        rows.append([label, shape, cap, f"{peak:.1f}", f"{speeds[row]:,.0f}", f"{ratio:.2f}"])
    axes.set_yticks(range(len(runs)), runs)
    axes.set_ylim(len(runs) - 0.5, -0.6)
    axes.set_xlim(0, 1.45 * max(speeds))
    axes.set_xlabel("tokens a second over both GPUs; hatched: no cap")
    text = "; ".join(f"{label} {speed:,.0f}" for label, speed in zip(runs, speeds))
    plots.show(figure, f"Bars of tokens a second over two H200s: {text}.")
    plots.table(["", "rows a GPU", "cap", "GiB at the peak", "tokens/s", "ratio"], rows)
