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
    names = [
        case["case"].replace("as it is", "exact").replace("copied as on CUDA", "CUDA's copy")
        for case in cases
    ]
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    for offset, (key, text), colour, hatch in zip(
        (-0.2, 0.2), TEXTS.items(), (plots.BLUE, plots.SKY), ("", "///")
    ):
        places = [place + offset for place in range(len(cases))]
        axes.barh(places, [case[key] for case in cases], 0.38, color=colour, hatch=hatch, label=text)
    guess = record["guessing_all_tokens_alike"]
    axes.axvline(guess, color=plots.BLACK, linestyle="--", label=f"guessing, {guess:.2f}")
    axes.set_yticks(range(len(cases)), names)
    axes.invert_yaxis()
    axes.set_xlabel("loss of SmolLM2-135M, nats a token")
    title = "A cast ruins a real model; with fp16 storage the copy would, too"
    axes.set_title(title, loc="right", fontsize=10)
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper right")
    rows = [
        (name, f"{case['bytes_changed_share']:.2%}", *(f"{case[key]:.4f}" for key in TEXTS))
        for name, case in zip(names, cases)
    ]
    told = "; ".join(f"{name}: {answers} and {prose}" for name, _, answers, prose in rows)
    plots.show(figure, f"{title}. Losses on held-out answers and on prose: {told}; guessing {guess:.2f}.")
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
