"""A 70B parameter file, dry, with somebody's own chats: every number that notebook 04 prints, by other means."""

import contextlib
import io
import json
import math
import random
import re
from pathlib import Path

import chats
import pytest
import yaml

from nbutils.common.paths import ROOT
from nbutils.models.loading import load_tokenizer
from nbutils.models.tiny import tiny_base
from nbutils.planning.shapes import SHAPES, config_of

PARAMS = "configs/params/llama31_70b_2x24gb_fastest.yaml"
CELLS = ("3dc6f266", "d47a0002", "135ab827", "c04set2", "d47a0012")  # folder, rows, settings, the whole run
SPEED, ROWS, LENGTH, EPOCHS = 40.0, 960, 640, 10
# By hand, for rank 16: q and o 16 x (8,192 + 8,192), k and v 16 x (8,192 + 1,024), gate, up and down 16 x (8,192 +
# 28,672); times 80 layers, times 2 bytes.
ADAPTER = 2 * 80 * (2 * 262_144 + 2 * 147_456 + 3 * 589_824)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """960 chats, of which one is too long, and one stands there twice."""
    made = chats.share_gpt(ROWS - 2)
    talk = [{"from": "human", "value": "Count."}, {"from": "gpt", "value": ", ".join(map(str, range(600)))}]
    return [*made, {"conversations": talk}, made[0]]


@pytest.fixture(scope="module")
def said(tmp_path_factory, rows) -> dict[str, str]:
    """What each cell printed. The model is a config of 70B and a tokenizer; no weight of it is looked at."""
    folder = tmp_path_factory.mktemp("night")
    config_of(SHAPES["llama31_70b"]).save_pretrained(folder / "model")
    load_tokenizer(str(tiny_base())).save_pretrained(folder / "model")
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = {
        "run_dir": str(folder / "run"), "model": str(folder / "model"), "dataset": str(file), "epochs": EPOCHS,
        "max_length": LENGTH, "tokens_per_second": SPEED, "time_limit": 3600,
    }  # fmt: skip
    cells = json.loads((ROOT / "notebooks/04_write_and_launch.ipynb").read_text())["cells"]
    (parameters,) = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    names, out = {}, {}
    exec("".join(parameters["source"]), names)
    names |= yaml.safe_load((ROOT / PARAMS).read_text()) | mine
    exec("from nbutils.common.paths import new_run_dir", names)
    for cell in cells:
        if cell["id"] in CELLS:
            with contextlib.redirect_stdout(io.StringIO()) as told:
                exec("".join(cell["source"]), names)
            out[cell["id"]] = told.getvalue()
    return out


def number(label: str, text: str) -> float:
    """The number behind a label at the beginning of a line."""
    (found,) = re.findall(rf"^ *{re.escape(label)} +([\d,.]+)", text, re.MULTILINE)
    return float(found.replace(",", ""))


@pytest.fixture(scope="module")
def lengths(rows) -> list[int]:
    """Tokens of each chat, whole, as the tokenizer alone renders it."""
    tokenizer, roles = load_tokenizer(str(tiny_base())), {"human": "user", "gpt": "assistant"}
    talks = [
        [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        for row in rows
    ]
    return [len(tokenizer.apply_chat_template(talk, return_dict=False)) for talk in talks]


def best_fit(lengths: list[int], room: int) -> list[int]:
    """Packs by the textbook: the longest row first, each into the fullest pack that has room for it."""
    packs: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [place for place, held in enumerate(packs) if held + length <= room]
        if fitting:
            packs[max(fitting, key=lambda place: packs[place])] += length
        else:
            packs.append(length)
    return packs


def test_the_counts_of_the_report(said, rows, lengths):
    report = said["d47a0002"]
    tokenizer = load_tokenizer(str(tiny_base()))
    answers = [turn["value"] for row in rows for turn in row["conversations"] if turn["from"] == "gpt"]
    cut = [min(length, LENGTH) for length in lengths]
    over = [length for length in lengths if length > LENGTH]
    assert number("rows", report) == number("conversations that can be trained on", report) == ROWS
    assert number("of them equal to an earlier one", report) == 1
    assert number("rows for the trainer", report) == ROWS
    assert number("tokens in them after the cut", report) == sum(cut)
    assert number("answers", report) == len(answers)
    assert number(f"answers cut by max_length {LENGTH}", report) == len(over) == 1
    assert f"({1 / len(answers):.1%})" in report
    assert number("rows that keep nothing to learn, left out", report) == number("rows refused", report) == 0
    # Each answer with the token that ends it; of the one that is cut, what is left lies at the end of its row.
    learned = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in answers) - (
        over[0] - LENGTH
    )
    assert number("tokens learned", report) == learned
    assert f"{learned:,} ({learned / sum(cut):.0%})" in report


def test_the_histogram_and_the_table_of_an_epoch(said, lengths):
    report = said["d47a0002"]
    bars = re.findall(r"^ +([\d,]+)-([\d,]+) +([\d,]+)", report, re.MULTILINE)
    assert len(bars) == 10 and number(f"over {LENGTH}", report) == sum(length > LENGTH for length in lengths)
    for first, last, count in bars:
        assert int(count.replace(",", "")) == sum(int(first) <= length <= int(last) for length in lengths)
    cut = [min(length, LENGTH) for length in lengths]
    packs = best_fit(cut, LENGTH)

    def line(name: str) -> list[str]:
        (found,) = re.findall(rf"^ +{name} +(.+)$", report, re.MULTILINE)
        return found.split()

    packed_steps = -(-len(packs) // 16)
    assert line("packed") == [
        f"{len(packs):,}", f"{sum(cut) / (len(packs) * LENGTH):.0%}", f"{packed_steps:,}",
        f"{sum(cut) / packed_steps:,.0f}",
    ]  # fmt: skip
    order = list(cut)
    random.Random(0).shuffle(order)
    # A forward pass of two ranks: eight rows as long as the longest of them.
    computed = sum(max(order[i : i + 8]) * len(order[i : i + 8]) for i in range(0, ROWS, 8))
    steps = -(-ROWS // 16)
    assert line("as they come") == [
        f"{ROWS:,}", f"{sum(cut) / computed:.0%}", f"{steps:,}", f"{sum(cut) / steps:,.0f}"
    ]  # fmt: skip
    assert "one epoch with 4 rows or packs a rank, 2 ranks, 2 passes a step" in report


def test_the_settings_are_those_of_the_file(said):
    count, path = said["c04set2"].split(" settings in ")
    printed, given = (
        yaml.safe_load(Path(path.strip()).read_text()),
        yaml.safe_load((ROOT / PARAMS).read_text()),
    )
    assert int(count) == len(printed)
    goal = yaml.safe_load((ROOT / given["goal"]).read_text())
    assert {name: printed[name] for name in goal} == goal
    same = {
        "per_device_train_batch_size": "batch_size", "per_device_eval_batch_size": "batch_size", "lora_r": "lora_r",
        "gradient_accumulation_steps": "gradient_accumulation_steps", "packing": "packing", "seed": "seed",
        "learning_rate": "learning_rate", "save_steps": "save_steps", "save_total_limit": "save_total_limit",
        "eval_steps": "eval_steps", "eval_rows": "eval_rows", "max_steps": "max_steps",
        "max_cut_share": None, "warmup_steps": None, "lora_alpha": None,
    }  # fmt: skip
    for name, parameter in same.items():
        if parameter:
            assert printed[name] == given[parameter], name
    assert (printed["max_length"], printed["num_train_epochs"]) == (LENGTH, EPOCHS)
    assert (printed["warmup_steps"], printed["lora_alpha"], printed["max_cut_share"]) == (0.1, 32, 0.5)
    assert (printed["save_strategy"], printed["logging_steps"]) == ("steps", 1)


def test_the_whole_run(said, rows, lengths):
    """5 % of the conversations are held out: 48, whole families, by a shuffle of the families."""
    whole = said["d47a0012"]
    families = {}
    for place, row in enumerate(rows):
        families.setdefault(json.dumps(row["conversations"][:2]), []).append(place)
    groups, out = list(families.values()), set()
    random.Random(0).shuffle(groups)
    for group in groups:
        if len(out) + len(group) <= 48:
            out.update(group)
    cut = [min(length, LENGTH) for place, length in enumerate(lengths) if place not in out]
    packs, tokens = len(best_fit(cut, LENGTH)), sum(cut)
    steps = math.ceil(
        math.ceil(packs / 8) / 2
    )  # a pass takes 4 packs on each of 2 ranks, a step takes two passes
    assert len(cut) == 912
    assert number("rows a step (effective batch)", whole) == 4 * 2 * 2
    assert number("tokens a step, about", whole) == round(tokens / steps)
    assert number("steps an epoch", whole) == steps
    assert f"{EPOCHS * steps:,}, which are 10.00 epochs" in whole
    seconds = EPOCHS * tokens / SPEED
    assert number("hours", whole) == round(seconds / 3600, 1)
    assert f"time_limit stops it {math.ceil(seconds / 3600) - 1} time(s)" in whole
    kept = EPOCHS * steps // 50 + (
        EPOCHS * steps % 50 > 0
    )  # a checkpoint after every 50 steps, and after the last
    assert number("checkpoints kept, at most", whole) == min(kept, 3)
    disk = (
        min(kept, 3) * 3 * ADAPTER + 2 * ADAPTER
    )  # weights and two moments each; the adapter, and the one it replaces
    assert f"{disk / 1e9:,.2f} GB" in whole
