"""The figure of lesson 03: which library casts the adapter on its way, and what it trains in."""

import textwrap

import matplotlib.pyplot as plt

from nbutils.lessons import plots

STAGES = {
    "from PEFT": "1. PEFT\nmakes it",
    "from TRL": "2. TRL\ncasts it",
    "cast back": "3. your own line\ncasts it back",
    "trained in": "4. after wrapping,\nit trains in",
}


def draw_casts(seen: dict[int, list[dict]]) -> None:
    """Draw the adapter's dtype at each stage, a row a setting, and print in full what was raised.

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
        told.append(f"{_name(version, setting)}: {' then '.join(stages.values())}")
    axes.set_yticks(range(len(rows)), [_name(version, setting) for version, setting in rows])
    axes.set_xticks([x + 0.45 for x in range(len(STAGES))], STAGES.values())
    axes.xaxis.tick_top()
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    full = sum(setting["trained in"] == "float32" for _, setting in rows)
    axes.set_title(f"In {full} of {len(rows)} settings the adapter trains in fp32")
    plots.show(figure, f"In {full} of {len(rows)} settings the adapter trains in fp32. {'; '.join(told)}.")
    ends = [(_name(version, setting), stages_of(setting)["trained in"]) for version, setting in rows]
    plots.table(["setting", "trains in"], ends)
    for version, setting in rows:
        if setting["trained in"] not in plots.DTYPE_COLOURS:
            print(textwrap.fill(f"{_name(version, setting)}: {setting['trained in']}", 110))


def _name(version: int, setting: dict) -> str:
    return f"FSDP {version}, bf16={setting['bf16']}{', cast back' if setting['cast back'] else ''}"


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
    """Stage -> dtype, "not cast" where nothing was cast, "fails" where no step ended well."""
    back = "float32" if setting["cast back"] else "not cast"
    trained = setting["trained in"] if setting["trained in"] in plots.DTYPE_COLOURS else "fails"
    return {
        "from PEFT": setting["from PEFT"],
        "from TRL": setting["from TRL"],
        "cast back": back,
        "trained in": trained,
    }
