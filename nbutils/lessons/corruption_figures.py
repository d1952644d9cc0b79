"""The figure of lesson 02b: what changed bytes cost a real language model, as recorded."""

import matplotlib.pyplot as plt

from nbutils.lessons import plots

TEXTS = {"held_out_answers": "held-out answers", "prose": "prose"}


def draw_damage(record: dict) -> None:
    """Draw the recorded losses of a real model with exact and with changed packed weights, and print them.

    Args:
        record: `benchmarks/results/smollm2_quantisation.json`.
    """
    cases = [{"case": "bf16, not quantised", "bytes_changed_share": 0.0, **record["bf16"]}, *record["nf4"]]
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    for offset, (key, text), colour, hatch in zip(
        (-0.2, 0.2), TEXTS.items(), (plots.BLUE, plots.SKY), ("", "///")
    ):
        places = [place + offset for place in range(len(cases))]
        axes.barh(places, [case[key] for case in cases], 0.38, color=colour, hatch=hatch, label=text)
    axes.axvline(
        record["guessing_all_tokens_alike"], color=plots.BLACK, linestyle="--", label="guessing all alike"
    )
    axes.set_yticks(range(len(cases)), [case["case"] for case in cases])
    axes.invert_yaxis()
    axes.set_xlabel("loss, nats a token")
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper right")
    rows = [
        (c["case"], f"{c['bytes_changed_share']:.2%}", *(f"{c[key]:.4f}" for key in TEXTS)) for c in cases
    ]
    told = "; ".join(f"{case}: {answers} and {prose}" for case, _, answers, prose in rows)
    plots.show(figure, f"Losses of a real model on held-out answers and on prose. {told}.")
    plots.table(["SmolLM2-135M", "bytes changed", *(f"loss on {text}" for text in TEXTS.values())], rows)


def cost_of_copy(record: dict, storage: str) -> float:
    """What CUDA's copy costs on held-out answers, as a share of what NF4 itself costs.

    Args:
        record: as above.
        storage: `bf16` or `fp16`.
    """
    key = "held_out_answers"
    losses = {row["case"]: row[key] for row in record["nf4"]}
    exact = losses[f"{storage} storage, as it is"]
    return (losses[f"{storage} storage, copied as on CUDA"] - exact) / (exact - record["bf16"][key])
