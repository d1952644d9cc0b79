"""The figure of lesson 03: which library casts the adapter on its way, and what it trains in."""

import matplotlib.pyplot as plt

from nbutils.lessons import plots

STAGES = {
    "from PEFT": "1. PEFT\nmakes it",
    "from TRL": "2. TRL\ncasts it",
    "cast back": "3. your own line\ncasts it back",
    "trained in": "4. Accelerate wraps it,\nand it trains in",
}


def draw_casts(seen: dict[int, list[dict]]) -> None:
    """Draw the adapter's dtype at each stage, a row a setting, and print what trained and how far it came.

    Args:
        seen: FSDP version -> settings, each with the dtypes that the lesson's probe wrote down.
    """
    rows = [(version, setting) for version, settings in seen.items() for setting in settings]
    figure, axes = plt.subplots(figsize=(7.2, 0.42 * len(rows) + 1.0))
    told = []
    for y, (version, setting) in enumerate(rows):
        stages = stages_of(setting)
        for x, dtype in enumerate(stages.values()):
            known = dtype in plots.DTYPE_COLOURS
            colour = plots.DTYPE_COLOURS[dtype] if known else "white"
            hatch = plots.DTYPE_HATCHES[dtype] if known else ""
            axes.barh(y, 0.9, left=x, height=0.6, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6)
            if x:
                axes.annotate("", (x, y), (x - 0.1, y), arrowprops={"arrowstyle": "->", "linewidth": 0.8})
            axes.text(x + 0.45, y, dtype, ha="center", va="center", fontsize=8,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
        told.append(f"FSDP {version}, bf16={setting['bf16']}: {' then '.join(stages.values())}")
    axes.set_yticks(
        range(len(rows)), [f"FSDP {version}, bf16={setting['bf16']}" for version, setting in rows]
    )
    axes.set_xticks([x + 0.45 for x in range(len(STAGES))], STAGES.values())
    axes.xaxis.tick_top()
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    plots.show(figure, f"The adapter's dtype at four stages. {'; '.join(told)}.")
    columns = ["bf16", "cast back", "trained in", "Adam's averages", "last loss"]
    printed = [
        (version, *(str(setting.get(column, ""))[:42] for column in columns)) for version, setting in rows
    ]
    plots.table(["FSDP", *columns], printed)


def trained_in(seen: dict[int, list[dict]]) -> dict[tuple[int, bool, bool], str]:
    """(FSDP version, bf16, cast back) -> the dtype that trained, or what was raised.

    Args:
        seen: as above.
    """
    return {
        (version, setting["bf16"], setting["cast back"]): setting["trained in"]
        for version, settings in seen.items()
        for setting in settings
    }


def stages_of(setting: dict) -> dict[str, str]:
    """Stage -> dtype, "as it was" where nothing was cast, "fails" where no step ended well."""
    back = "float32" if setting["cast back"] else "as it was"
    trained = setting["trained in"] if setting["trained in"] in plots.DTYPE_COLOURS else "fails"
    return {
        "from PEFT": setting["from PEFT"],
        "from TRL": setting["from TRL"],
        "cast back": back,
        "trained in": trained,
    }
