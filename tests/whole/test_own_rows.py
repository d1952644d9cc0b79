"""A user's job end to end on a laptop: a file of chats, the report on it, packed training, kill -9, and on it goes."""

import json
import random
import subprocess
import sys

import pytest
from training_runs import run, train

from nbutils.common.paths import ROOT
from nbutils.models.tiny import tiny_base

ROWS, LENGTH, STEPS = 2_000, 128, 8
WORDS = "the a of to bread river stone lamp winter cat sings opens under every small green ünder 水"


def chats(seed: int = 0) -> list[dict]:
    """ShareGPT rows of one to four answers, of lengths as people write them."""
    chance = random.Random(seed)

    def text(middle: float) -> str:
        return " ".join(chance.choices(WORDS.split(), k=1 + round(chance.lognormvariate(0, 0.6) * middle)))

    rows = []
    for number in range(ROWS):
        turns = [{"from": "system", "value": "Be brief."}] if number % 5 == 0 else []
        for turn in range(chance.randrange(1, 5)):
            turns.append({"from": "human", "value": f"{number}.{turn}: {text(4)}?"})
            turns.append({"from": "gpt", "value": f"{text(8)}."})
        rows.append({"id": f"chat-{number}", "conversations": turns})
    return rows


@pytest.mark.matrix
@pytest.mark.timeout(1200)
def test_two_thousand_chats_are_packed_killed_and_resumed_to_the_same_adapter(tmp_path):
    file = tmp_path / "chats.jsonl"
    rows = chats()
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    words = ["data", str(file), "--model", str(tiny_base()), "--max-length", str(LENGTH), "--json"]
    said = subprocess.run([sys.executable, "-m", "nbutils", *words], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    report = json.loads(said.stdout)
    assert report["rows"] == report["conversations"] == ROWS and report["refused"] == {}
    assert report["answers"] == sum(turn["from"] == "gpt" for row in rows for turn in row["conversations"])
    assert report["packs"] < ROWS and report["packed_fill"] > 0.9

    more = {
        "dataset": file, "max_length": LENGTH, "packing": "true", "max_cut_share": 1.0, "max_steps": STEPS,
        "save_steps": 2, "gradient_accumulation_steps": 2, "eval_rows": 20, "eval_on_start": "false",
    }  # fmt: skip
    settings = run(tmp_path, "whole", "whole", **more)["args"]
    at = settings.index("--heldout_dataset")
    del settings[at : at + 2]  # five percent of the chats are held out
    plan = [
        run(tmp_path, "whole", "whole") | {"args": settings},
        run(tmp_path, "killed", "killed", kill={"rank": 1, "step": 11}),  # in the sixth optimizer step
        run(tmp_path, "resumed", "killed"),
    ]
    for one in plan[1:]:
        one["args"] = [word.replace(str(tmp_path / "whole"), str(tmp_path / "killed")) for word in settings]
    seen = train(tmp_path, plan)
    assert seen["whole"]["status"] == [0, 0], seen["whole"]["output"]
    assert -9 in seen["killed"]["status"]
    assert seen["resumed"]["status"] == [0, 0], seen["resumed"]["output"]
    assert "killed/checkpoint-4." in seen["resumed"]["output"][0]
    ends = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "killed")]
    assert ends[0]["adapter"]["sha256"] == ends[1]["adapter"]["sha256"]
    assert ends[0]["training"]["held_out_loss_after"] == ends[1]["training"]["held_out_loss_after"]
    assert ends[0]["training"]["loss_last"] == ends[1]["training"]["loss_last"]
