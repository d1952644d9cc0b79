"""The figures of lessons 02 and 03: a layer as FSDP 1 reads it, positions under bf16, the losses of two adapters."""

import statistics
from collections import Counter
from collections.abc import Sequence

import matplotlib.pyplot as plt
import torch

from nbutils.lessons import plots

SHORT = {"input_layernorm": "norm 1", "post_attention_layernorm": "norm 2"}


def draw_flat_parameters(layers: dict[str, list[tuple[str, torch.dtype]]], said: dict[str, str]) -> None:
    """Draw a decoder layer's parameters in the order in which FSDP 1 concatenates them, and where it stops.

    Args:
        layers: by variant, (name, dtype) of each parameter of one layer.
        said: by variant, "wraps" or what FSDP 1 said.
    """
    figure, axes = plt.subplots(figsize=(7.6, 3.7))
    rows = []
    for y, (name, parameters) in zip(reversed(range(len(layers))), layers.items()):
        dtypes = [dtype for _, dtype in parameters]
        for x, dtype in enumerate(dtypes):
            axes.barh(y, 0.94, left=x, height=0.6, linewidth=0.5, **_style(dtype))
        verdict = "wraps"
        if said[name] != "wraps":
            stop = stops_at(dtypes, said[name])
            axes.plot(stop + 0.47, y, "X", color="white", markeredgecolor="black", markersize=11)
            verdict = f"refused at {_short(parameters[stop][0])}"
        axes.text(-0.15, y, name.replace(", ", ",\n"), ha="right", va="center")
        axes.text(len(dtypes) + 0.1, y, verdict.replace(" at", "\nat"), va="center", fontweight="bold")
        counts = ", ".join(f"{count} {str(dtype)[6:]}" for dtype, count in Counter(dtypes).items())
        rows.append((name, counts, verdict))
    for x, (full, _) in enumerate(next(iter(layers.values()))):
        axes.text(x + 0.47, len(layers) - 0.55, _short(full), ha="center", va="center")
    for dtype in (torch.bfloat16, torch.float32, torch.uint8):
        axes.barh(0, 0, label=str(dtype)[6:], **_style(dtype))
    axes.plot([], [], "X", color="white", markeredgecolor="black", linestyle="", label="FSDP 1 stops here")
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, 0.02), ncols=4)
    axes.set(xlim=(-1.9, 10.4), ylim=(-0.5, len(layers) - 0.3))
    axes.set_title(
        "FSDP 1 wraps a layer if its nine parameters have one dtype, and it is a float", fontsize=10
    )
    axes.axis("off")
    told = "; ".join(f"{name}: {counts}, {verdict}" for name, counts, verdict in rows)
    plots.show(figure, f"The nine parameters of a decoder layer, in order. {told}.")
    plots.table(["variant", "parameters of a layer", "FSDP 1"], rows)


def _short(full: str) -> str:
    """`q` of `self_attn.q_proj.base_layer.weight`, `norm 1` of `input_layernorm.weight`."""
    part = full.split(".")[-2] if "proj" not in full else full.split(".")[1]
    return SHORT.get(part, part.replace("_proj", ""))


def stops_at(dtypes: Sequence[torch.dtype], said: str) -> int:
    """The place of the parameter at which FSDP 1 gives up: the first integer, or the first of another dtype."""
    return 0 if "integer" in said else next(x for x, dtype in enumerate(dtypes) if dtype != dtypes[0])


def _style(dtype: torch.dtype) -> dict:
    kind = str(dtype)[6:]
    return {"color": plots.DTYPE_COLOURS[kind], "hatch": plots.DTYPE_HATCHES[kind], "edgecolor": "white"}


def draw_angle_errors(frequencies: torch.Tensor, distances: Sequence[int]) -> None:
    """Draw how wrong the angle between two tokens is, by their distance, if rotary frequencies are rounded to bf16.

    Args:
        frequencies: exact, (half of the head's width,).
        distances: in tokens.
    """
    off = (frequencies.bfloat16().double() - frequencies).abs()
    worst, tenth = off.max().item(), off.sort(descending=True).values[9].item()
    figure, axes = plt.subplots()
    axes.plot(distances, [d * worst for d in distances], label=f"worst of the {len(off)} frequencies")
    axes.plot(distances, [d * tenth for d in distances], label="tenth worst")
    axes.axhline(
        torch.pi, color=plots.BLACK, marker="", linestyle="--", label="half a turn: as wrong as can be"
    )
    axes.set(
        xscale="log", yscale="log", xlabel="distance between two tokens", ylabel="error of the angle, radians"
    )
    axes.set_xticks(distances, [f"{d:,}" for d in distances])
    axes.minorticks_off()
    axes.legend()
    axes.set_title("With rounded frequencies, far tokens are seen at wrong angles")
    rows = [(f"{d:,}", f"{d * worst:.3f}", int((d * off > 0.5).sum())) for d in distances]
    told = "; ".join(f"{d} tokens: {error} radians" for d, error, _ in rows)
    plots.show(
        figure, f"The worst angle's error grows in proportion to the distance. {told}. Half a turn is 3.14."
    )
    head = ["distance in tokens", "worst error, radians", f"of {len(off)} angles, off by over 0.5 radians"]
    plots.table(head, rows)


def draw_adapter_dtypes(record: dict) -> None:
    """Draw the recorded training loss of bf16 adapters minus that of fp32 adapters, and print held-out losses.

    Args:
        record: `benchmarks/results/adapter_dtype.json`.
    """
    rates = sorted({run["learning_rate"] for run in record["runs"]})
    figure, axes = plt.subplots()
    rows = []
    for rate in rates:
        runs = {dtype: _runs(record, dtype, rate) for dtype in ("bfloat16", "float32")}
        low, full = (_mean_by_step([run["training_loss"] for run in each]) for each in runs.values())
        axes.plot(record["steps_logged"], [b - f for b, f in zip(low, full)], label=f"learning rate {rate:g}")
        held = [statistics.mean(run["heldout_loss"] for run in each) for each in runs.values()]
        rows.append((f"{rate:g}", *(f"{loss:.4f}" for loss in held), f"{held[0] - held[1]:+.4f}"))
    axes.axhline(0, color=plots.BLACK, marker="", linewidth=0.8)
    axes.set(xlabel="optimizer step", ylabel="training loss,\nbf16 adapter minus fp32 adapter")
    axes.set_title("Above zero, the bf16 adapter is the worse one")
    axes.legend()
    told = "; ".join(f"rate {rate}, bf16 {low}, fp32 {full}" for rate, low, full, _ in rows)
    plots.show(
        figure,
        f"The bf16 adapter's recorded loss minus the fp32 adapter's. Held-out loss at the end: {told}.",
    )
    plots.table(["learning rate", "held-out loss, bf16", "held-out loss, fp32", "bf16 behind by"], rows)


def _runs(record: dict, dtype: str, rate: float) -> list[dict]:
    """The recorded runs of one setting, one a seed."""
    return [run for run in record["runs"] if (run["adapter"], run["learning_rate"]) == (dtype, rate)]


def _mean_by_step(runs: list[list[float]]) -> list[float]:
    return [statistics.mean(losses) for losses in zip(*runs)]
