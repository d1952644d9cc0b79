"""Lesson 06 on seconds: the estimate of a step beside what was recorded, and for cards that were not measured."""

import json
import random
from dataclasses import replace

import matplotlib.pyplot as plt
import yaml

from nbutils.common.paths import ROOT
from nbutils.data.packs import padded
from nbutils.lessons import plots
from nbutils.planning.run_setup import Choices, Setup
from nbutils.planning.shapes import Shape, shape_of
from nbutils.planning.step_estimate import Links, StepEstimate, estimate, pcie4_links
from nbutils.planning.step_time import hours, measured_links

RESULTS = ROOT / "benchmarks/results"
# TFLOP/s in bf16 with fp32 sums, dense, as NVIDIA states them (whitepapers of GA102 and AD102).
STATED = {"3090": 71, "4090": 165}
# Answer.AI, 2024, Llama 2 70B, two rows of 2,048: tokens a second over two cards, from 1,024 rows in 11,795 and in
# 4,399 seconds. The 4090s had 16 lanes of PCIe 4.0; the 3090s an older board with "slow" ones, and a limit of 280 W.
PUBLISHED = {"3090": 178, "4090": 477}
FASTEST = Choices(embeddings_on_host=True, compile_layers=True)
RESIDENT = replace(FASTEST, offload_activations=True)
# Name: setup, rows a GPU, choices; all with rows of 2,048 tokens on two cards of 24 GB.
WAYS = {
    "recipe of 2024": (Setup(2, 1, True), 2, Choices()),
    "resident": (Setup(2, 2, False), 2, RESIDENT),
    "fastest": (Setup(2, 2, True), 4, FASTEST),
}
LENGTH = 2048


def of_record(config: dict, links: Links) -> StepEstimate:
    """The estimate of a recorded dry run.

    Args:
        config: of the record.
        links: of the machine it ran on.
    """
    settings = dict(setting.partition("=")[::2] for setting in config["settings"])
    choices = Choices.read({name: yaml.safe_load(value) for name, value in settings.items()})
    shape = replace(shape_of(config["model"]), layers=config["num_layers"])
    setup = Setup(config["world_size"], config["fsdp_version"], config["offload"])
    return estimate(shape, setup, config["batch_size"], config["seq_len"], links, choices, config["lora_r"])


def recorded_links() -> Links:
    """Of the two H200s, as `python -m nbutils links` recorded them."""
    return Links(**measured_links(RESULTS / "links_2gpu.json"))


def slow_link_rows() -> list[tuple[str, float, float, float, float]]:
    """Each step over links made slow: name, GB/s (0: as the machine is), GB in, seconds measured, seconds estimated.

    The head's way to the GPU was not made slow, so it counts at the machine's own speed.
    """
    own, rows = recorded_links(), []
    record = json.loads((RESULTS / "slow_links.json").read_text(encoding="utf-8"))
    for name, case in record["cases"].items():
        beside = of_record(case["config"], own).beside
        for row in case["by_speed"]:
            speed = row["link_gbs"]
            links = replace(own, host_gbs=speed, between_gbs=speed) if speed else own
            found = replace(of_record(case["config"], links), beside=beside)
            rows.append((name, speed, row["incoming_bytes"] / 1e9, row["step_seconds"], found.step))
    return rows


def slow_link_summary() -> list[list[str]]:
    """Those steps, one row a setting: GB in, seconds over the fastest and the slowest link, errors of the estimate."""
    steps, rows = slow_link_rows(), []
    for name in dict.fromkeys(step[0] for step in steps):
        own = [step for step in steps if step[0] == name]
        off = [guess / seen - 1 for *_, seen, guess in own]
        slowest = min((step for step in own if step[1]), key=lambda step: step[1])
        seconds = (next(step for step in own if not step[1])[3], slowest[3])
        rows.append([name.replace("_", " "), f"{own[0][2]:.1f}", *(f"{second:.2f}" for second in seconds),
                     f"{seconds[1] / seconds[0]:.1f}", f"{min(off):+z.0%} to {max(off):+z.0%}"])  # fmt: skip
    return rows


def errors(fsdp_version: int) -> dict[str, float]:
    """Estimated beside recorded step, less one, of every record with full rows on two GPUs and enough of them.

    Enough are 12 layers, and 1,024 tokens a rank with FSDP 2, 4,096 with FSDP 1: with fewer, the CPU that launches
    decides, and not the GPU.

    Args:
        fsdp_version: 1 or 2.

    Returns:
        By file below `benchmarks/results`.
    """
    links, found = recorded_links(), {}
    for file in sorted(RESULTS.rglob("*.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        measured = run.get("measured") if isinstance(run, dict) else None
        if "earlier" in file.parts or not isinstance(measured, dict) or not measured.get("step_seconds"):
            continue
        config = run["config"]
        ours = config.get("fsdp_version") == fsdp_version and config["world_size"] == 2
        if ours and _full(file.stem, config):
            found[str(file.relative_to(RESULTS))] = (
                of_record(config, links).step / measured["step_seconds"] - 1
            )
    return found


def _full(name: str, config: dict) -> bool:
    own_rows = any("dataset=" in setting for setting in config["settings"])
    packed = any("packing=true" in setting for setting in config["settings"])
    if (own_rows and not packed) or "dense_mask" in name or config["num_layers"] < 12:
        return False
    return config["batch_size"] * config["seq_len"] >= (1024 if config["fsdp_version"] == 2 else 4096)


def largest_error(fsdp_version: int) -> float:
    """Of `errors`, without its sign."""
    return max(map(abs, errors(fsdp_version).values()))


def speed_range(speed: float, fsdp_version: int) -> tuple[float, float]:
    """The lowest and the highest speed, if an estimate is off by as much as the worst recorded one.

    The errors are those of a step's seconds: a step estimated at three quarters of what it took means three quarters
    of the estimated speed.

    Args:
        speed: estimated, tokens a second.
        fsdp_version: 1 or 2.
    """
    off = largest_error(fsdp_version)
    return speed * (1 - off), speed * (1 + off)


def pcie_rows(shape: Shape) -> list[list[str]]:
    """Tokens a second that two cards can expect, each way, as low, estimate and high; and what was published.

    Args:
        shape: of the model.
    """
    rows = []
    for card, tflops in STATED.items():
        for lanes in (16, 8, 4):
            links, cells = pcie4_links(lanes, tflops), []
            for setup, batch, choices in WAYS.values():
                speed = estimate(shape, setup, batch, LENGTH, links, choices).tokens_per_second
                slow, fast = speed_range(speed, setup.fsdp_version)
                cells.append(f"{speed:.0f} ({slow:.0f} to {fast:.0f})")
            published = str(PUBLISHED[card]) if lanes == 16 else ""
            rows.append([f"two {card}s, x{lanes}", f"{links.host_gbs:.0f}", *cells, published])
    return rows


def own_rows(shape: Shape, tokens: float) -> list[list[str]]:
    """The same for this machine: way, tokens a second, and hours; no row where no links of GPUs were measured.

    Args:
        shape: of the model.
        tokens: to learn from.
    """
    try:
        links = Links(**measured_links())
    except (FileNotFoundError, ValueError):
        return []
    rows = []
    for way, (setup, batch, choices) in WAYS.items():
        speed = estimate(shape, setup, batch, LENGTH, links, choices).tokens_per_second
        rows.append([way, f"{speed:.0f}", f"{hours(tokens, speed):.1f}"])
    return rows


def chat_lengths(count: int = 3000, mean: float = 183, sigma: float = 0.55) -> list[int]:
    """Lengths of chats as in the records of `chats/`: lognormal."""
    draw = random.Random(0)
    return [max(8, round(mean * draw.lognormvariate(-(sigma**2) / 2, sigma))) for _ in range(count)]


def seconds_of_a_step(shape: Shape, lanes: int, card: str) -> dict[str, dict[str, float]]:
    """Where the seconds go in which two cards learn from 16,384 tokens of text.

    Args:
        shape: of the model.
        lanes: of PCIe 4.0.
        card: in `STATED`.

    Returns:
        For each way: seconds `text`, `padding`, `waiting` and `beside`.
    """
    links, found = pcie4_links(lanes, STATED[card]), {}
    for name, (setup, batch, choices) in WAYS.items():
        found[f"{name}, full rows"] = _parts(estimate(shape, setup, batch, LENGTH, links, choices), 1.0)
    setup, batch, choices = WAYS["fastest"]
    chats = padded(chat_lengths(), batch, setup.world_size)
    length = round(chats.tokens / chats.rows)
    found["fastest, chats as they come"] = _parts(
        estimate(shape, setup, batch, length, links, choices), chats.fill
    )
    return found


def _parts(step: StepEstimate, fill: float) -> dict[str, float]:
    steps = 16384 / (step.tokens * fill)
    text = step.computing * fill
    return {
        "text": steps * text,
        "padding": steps * (step.computing - text),
        "waiting": steps * step.waiting,
        "beside": steps * step.beside,
    }


def draw_seconds(shape: Shape, lanes: int = 4) -> None:
    """Draw `seconds_of_a_step` of both cards, bars on top of each other.

    Args:
        shape: of the model.
        lanes: of PCIe 4.0.
    """
    bars = {
        f"{card}: {way}": parts
        for card in STATED
        for way, parts in seconds_of_a_step(shape, lanes, card).items()
    }
    names = {
        "text": "computing text",
        "padding": "computing padding",
        "waiting": "waiting for weights",
        "beside": "the rest",
    }
    styles = [(plots.BLUE, ""), (plots.SKY, "///"), (plots.VERMILION, "xx"), ("lightgrey", "")]
    figure, axes = plt.subplots(figsize=(7.2, 3.9))
    group = len(bars) // len(STATED)
    places = [place + 0.5 * (place // group) for place in range(len(bars))]
    left = [0.0] * len(bars)
    for (key, name), (colour, hatch) in zip(names.items(), styles, strict=True):
        widths = [parts[key] for parts in bars.values()]
        axes.barh(places, widths, 0.7, left, color=colour, hatch=hatch, edgecolor="white", label=name)
        left = [start + width for start, width in zip(left, widths)]
    for place, total in zip(places, left):
        axes.text(total, place, f" {total:.0f} s", va="center", fontsize=8)
    axes.set_yticks(places, bars)
    axes.invert_yaxis()
    axes.set(
        xlim=(0, 1.1 * max(left)), xlabel=f"ESTIMATE: seconds for 16,384 tokens of text, PCIe 4.0 x{lanes}"
    )
    title = "Who waits for weights: the recipe of 2024, and chats that are not packed"
    axes.set_title(title, loc="right", fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), ncols=4, fontsize=8, loc="outside lower center")
    told = "; ".join(
        f"{bar} " + ", ".join(f"{names[key]} {parts[key]:.1f}" for key in names)
        for bar, parts in bars.items()
    )
    plots.show(figure, f"{title}. Estimated seconds for 16,384 tokens of text: {told}.")
    rows = [[bar, *(f"{parts[key]:.0f}" for key in names)] for bar, parts in bars.items()]
    plots.table(["ESTIMATE, seconds", *names.values()], rows)
