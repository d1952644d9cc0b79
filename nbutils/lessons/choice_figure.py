"""The figure at the end of lesson 01: three questions that lead to a config for Llama 3.1 70B on two cards."""

import matplotlib.pyplot as plt

from nbutils.lessons import plots

# question -> (what it leads to with the first answer, with the second); each answer with its words
QUESTIONS = {
    "Does the recipe fit\nwithout offload?": (
        ("yes", "config_fsdp.yaml\nwith offload: false"),
        ("no", "Has the machine\n64 GiB of host memory?"),
    ),
    "Has the machine\n64 GiB of host memory?": (
        ("no", "config_fsdp2.yaml\nwith resident_2x24gb.yaml"),
        ("yes", "Fewest surprises,\nor speed?"),
    ),
    "Fewest surprises,\nor speed?": (
        ("fewest\nsurprises", "config_fsdp.yaml,\nthe recipe of 2024"),
        ("speed", "config_fsdp2_offload.yaml\nwith fastest_2x24gb.yaml"),
    ),
}


def draw_choice() -> None:
    """Draw the questions from left to right with the config that each leads to, and print them as a table."""
    figure, axes = plt.subplots(figsize=(7.6, 2.5))
    places = {question: (2.7 * step, 1.0) for step, question in enumerate(QUESTIONS)}
    for (x, _), ((_, first), (_, second)) in zip(list(places.values()), QUESTIONS.values()):
        places.setdefault(first, (x, -0.4))
        places.setdefault(second, (x + 2.7, 1.0))
    boxes = {}
    for text, place in places.items():
        colour = plots.SKY if text in QUESTIONS else "white"
        box = {"boxstyle": "round,pad=0.4", "facecolor": colour, "edgecolor": "black"}
        boxes[text] = axes.text(*place, text, ha="center", va="center", fontsize=8, bbox=box).get_bbox_patch()
    for question, answers in QUESTIONS.items():
        for words, target in answers:
            arrow = {"arrowstyle": "->", "patchA": boxes[question], "patchB": boxes[target], "shrinkB": 1}
            (x, y), (to_x, to_y) = places[question], places[target]
            axes.annotate("", (to_x, to_y), (x, y), arrowprops=arrow)
            beside = (x + 0.08, 0.3) if to_x == x else ((x + to_x) / 2, 1.08)
            axes.text(*beside, words, fontsize=8, ha="left" if to_x == x else "center")
    axes.set(xlim=(-1.1, 9.3), ylim=(-0.8, 1.4))
    axes.axis("off")
    title = "Which config for Llama 3.1 70B? Three questions"
    axes.set_title(title, fontsize=10)
    rows = [
        [_line(question), _line(words), _line(target)]
        for question, answers in QUESTIONS.items()
        for words, target in answers
    ]
    told = "; ".join(f"{question} {words}: {target}" for question, words, target in rows)
    plots.show(figure, f"{title}. {told}.")
    plots.table(["question", "answer", "then"], rows)


def _line(text: str) -> str:
    return text.replace("\n", " ")
