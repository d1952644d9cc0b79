"""The pictures and tables of lesson 06: the memory plan beside the cards, and predictions beside records."""

from dataclasses import replace

import matplotlib.pyplot as plt
import yaml

from nbutils.lessons import plots, records
from nbutils.planning.memory_items import GIB
from nbutils.planning.memory_plan import CARDS, Plan, left_gib, plan
from nbutils.planning.run_setup import Choices, Setup
from nbutils.planning.shapes import SHAPES

# Names of the recorded runs of 70B as the lesson says them, in its order.
SEVENTY = {
    "70b_fsdp1_cap_b1_l1024": "FSDP 1 without offload",
    "70b_fsdp1_offload_cap_b1_l1024": "recipe of 2024, unpatched",
    "70b_fsdp1_offload_cap_b1_l2048": "recipe of 2024",
    "70b_fsdp1_offload_cap_b2_l2048": "recipe of 2024",
    "cap_21_gib/70b_resident_cap_b2_l2048": "resident",
    "cap_21_gib/70b_fast_cap_b4_l2048": "fastest",
    "cap_21_gib/70b_host_inputs_cap_b8_l2048": "fastest, inputs on the host",
    "cap_21_gib/70b_host_inputs_cap_b12_l2048": "fastest, inputs on the host",
    "cap_21_gib/70b_long_cap_b1_l32768": "longest rows",
    "70b_fewest_bytes_cap_b1_l1024": "fewest bytes",
    "70b_big_cards_b2_l2048": "big cards",
}
# Twelve layers of it, one run after the other on one machine.
TWELVE = {
    "peer_b2_l2048": "PEFT's example",
    "70b_fsdp1_offload_cap_b2_l2048": "recipe of 2024",
    "70b_resident_cap_b2_l2048": "resident",
    "70b_fast_cap_b4_l2048": "fastest",
    "70b_big_cards_b2_l2048": "big cards",
}
# What a bar of the plan shows, and the items of the plan in it; all other items are the rest.
PARTS = {
    "scales of the 4-bit weights": {"quantisation state"},
    "4-bit weights, this GPU's share": {"4-bit shards"},
    "embedding and head, with copies": {
        "embedding and head", "their flat copy", "shard of embedding and head", "head"
    },
    "inputs of all layers, kept": {"checkpointed layer inputs", "layers that keep everything"},
    "the layer at work, and the next": {
        "one layer computed again", "its gradients", "weights in bf16", "gathered layers", "next layer on its way"
    },
}  # fmt: skip
REST = "the rest"
STYLES = [
    (plots.BLUE, ""), (plots.GREEN, "///"), (plots.ORANGE, "..."), (plots.SKY, ""), (plots.PURPLE, "xx"),
    ("lightgrey", ""),
]  # fmt: skip


def recorded_70b() -> dict[str, dict]:
    """The recorded runs of 70B by the name that the lesson gives them, with rows a GPU and tokens a row."""
    return _by_name(SEVENTY)


def recorded_beside_peer() -> dict[str, dict]:
    """The same for 12 layers: PEFT's own example first, then ours."""
    return _by_name({f"compare_12/{file}": name for file, name in TWELVE.items()})


def _by_name(names: dict[str, str]) -> dict[str, dict]:
    runs = {file: records.load(file) for file in names}
    return {f"{name}, {rows_of(runs[file])}": runs[file] for file, name in names.items()}


def rows_of(run: dict) -> str:
    """Rows a GPU and tokens a row, as `2 x 2,048`."""
    config = run["config"]
    rows, length = (
        config.get(name) or config[other] for name, other in (("batch_size", "batch"), ("seq_len", "length"))
    )
    return f"{rows} x {length:,}"


def where_from(runs: dict[str, dict]) -> str:
    """A line for the records of one machine and day: where they were made, with all their commits.

    Args:
        runs: by any name.
    """
    commits = {}
    for run in runs.values():
        place = records.label(run | {"commit": "COMMITS", "date": run["date"][:10]})
        commits.setdefault(place, set()).add(run["commit"])
    return "\n".join(place.replace("COMMITS", ", ".join(sorted(made))) for place, made in commits.items())


def plan_of(run: dict) -> Plan:
    """The plan for a recorded configuration, worked out now.

    Args:
        run: one of `recorded_70b`.
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
    """Print predicted beside recorded, one line a run: GiB of a GPU, and of the host for all ranks together.

    Args:
        runs: records by label.
    """
    rows = []
    for name, run in runs.items():
        expected, measured, ended = plan_of(run), run["measured"], run["outcome"] == "ok"
        peak = measured["gpu_peak_bytes"]
        seen = f"{peak / GIB:.2f}" if ended else "out of memory"
        off = f"{expected.gpu_peak_bytes / peak - 1:+z.2%}" if ended else ""
        reserved = f"{measured['gpu_reserved_bytes'] / GIB:.1f}" if ended else ""
        host = expected.host_bytes * run["config"]["world_size"]
        rows.append([name, f"{expected.gpu_peak_bytes / GIB:.2f}", seen, off, reserved, f"{host / GIB:.0f}",
                     f"{measured['host_bytes'] / GIB:.0f}"])  # fmt: skip
    head = ["GiB", "GPU planned", "recorded", "off by", "reserved", "host planned", "recorded"]
    plots.table(head, rows)


def draw_plans(runs: dict[str, dict], card: int = 24) -> None:
    """Draw the plan of each run as a stacked bar, with what was recorded and the room on a card.

    Args:
        runs: records by label.
        card: nominal size in GB.
    """
    plans = {label: plan_of(run) for label, run in runs.items()}
    room, errors = left_gib(CARDS[card]), []
    figure, axes = plt.subplots(figsize=(7.2, 0.55 * len(plans) + 2))
    for row, (label, planned) in enumerate(plans.items()):
        left = 0.0
        for (part, size), (colour, hatch) in zip(parts_of(planned).items(), STYLES, strict=True):
            axes.barh(row, size / GIB, 0.6, left, color=colour, hatch=hatch, edgecolor="white", label=part)
            left += size / GIB
        run = runs[label]
        if run["outcome"] == "ok":
            seen = run["measured"]["gpu_peak_bytes"] / GIB
            errors.append(abs(left / seen - 1))
            axes.plot(seen, row, marker="D", color=plots.BLACK, linestyle="", markersize=6, label="recorded")
        else:
            axes.text(left, row, " ran out of memory", va="center", fontsize=8)
    axes.axvline(room, color=plots.VERMILION, linestyle="--", linewidth=1, marker="")
    axes.text(room, -0.45, f" room on a {card} GB card", color=plots.VERMILION, fontsize=8)
    axes.set_yticks(range(len(plans)), [f"{label}\n{item.peak_moment}" for label, item in plans.items()])
    axes.set(ylim=(len(plans) - 0.5, -0.7), xlabel="GiB on each GPU at the highest moment, planned")
    axes.set_xlim(0, 1.25 * max(item.gpu_peak_bytes / GIB for item in plans.values()))
    title = f"The recorded peaks (diamonds) lie within {max(errors):.1%} of the plan"
    axes.set_title(title, loc="left", fontsize=10)
    unique = dict(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(unique.values(), unique.keys(), fontsize=8, ncols=2, loc="outside lower center")
    text = "; ".join(
        f"{label}: {item.peak_moment}, planned {item.gpu_peak_bytes / GIB:.1f} GiB, {_seen(runs[label])}"
        for label, item in plans.items()
    )
    plots.show(figure, f"{title}. {text}. A {card} GB card leaves {room:.1f} GiB.")


def parts_of(planned: Plan) -> dict[str, int]:
    """The items of a plan at its highest moment in bytes, put together as `PARTS` and the rest."""
    found = {part: sum(planned.gpu.get(item, 0) for item in sorted(items)) for part, items in PARTS.items()}
    return found | {REST: sum(planned.gpu.values()) - sum(found.values())}


def _seen(run: dict) -> str:
    return f"recorded {run['measured']['gpu_peak_bytes'] / GIB:.1f}" if run["outcome"] == "ok" else "no room"


def draw_speeds(runs: dict[str, dict]) -> None:
    """Draw tokens a second of recorded runs, the first as the baseline, with memory and ratio beside each bar.

    Args:
        runs: by label, under a cap or without one.
    """
    speeds = {label: run["measured"]["tokens_per_second"] for label, run in runs.items()}
    caps = {label: run["config"].get("cap_gib") for label, run in runs.items()}
    first = next(iter(speeds))
    figure, axes = plt.subplots(figsize=(7.2, 0.5 * len(runs) + 1.2))
    rows = []
    for row, (label, run) in enumerate(runs.items()):
        capped, ratio = caps[label], speeds[label] / speeds[first]
        style = {"color": plots.ORANGE} if capped else {"color": plots.BLUE, "hatch": "///"}
        axes.barh(row, speeds[label], 0.6, edgecolor="white", **style)
        axes.text(speeds[label], row, f" {speeds[label]:,.0f} (x {ratio:.2f})", va="center", fontsize=8)
        peak = f"{run['measured']['gpu_peak_bytes'] / GIB:.1f}"
        rows.append(
            [label, f"{capped} GiB" if capped else "none", peak, f"{speeds[label]:,.0f}", f"{ratio:.2f}"]
        )
    axes.set_yticks(range(len(runs)), runs)
    axes.set(ylim=(len(runs) - 0.5, -0.6), xlim=(0, 1.3 * max(speeds.values())))
    axes.set_xlabel("tokens a second over both H200s; hatched: no cap")
    way = {label: label.split(",")[0] for label in runs}.get
    best = max((label for label in runs if caps[label]), key=speeds.get)
    title = f"Under the cap, {way(best)} is {speeds[best] / speeds[first]:.2f} times as fast as {way(first)}"
    axes.set_title(title, loc="left", fontsize=10)
    text = "; ".join(f"{label} {speed:,.0f}" for label, speed in speeds.items())
    plots.show(figure, f"{title}. Tokens a second over two H200s: {text}.")
    plots.table(["", "cap", "GiB at the peak", "tokens/s", "ratio"], rows)
