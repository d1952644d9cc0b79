"""What a whole run takes, worked out by hand once and compared; and a disk that is too small for it."""

from types import SimpleNamespace

import pytest
import yaml

from nbutils.common.paths import ROOT
from nbutils.common.refused import Refused
from nbutils.planning.shapes import SHAPES
from nbutils.planning.whole_run import checkpoints_on_disk, whole_run

SEVENTY = SHAPES["llama31_70b"]
# By hand, for rank 16: q and o 16 x (8,192 + 8,192), k and v 16 x (8,192 + 1,024), gate, up and down 16 x (8,192 +
# 28,672); times 80 layers, times 2 bytes.
ADAPTER = 2 * 80 * (2 * 262_144 + 2 * 147_456 + 3 * 589_824)


def settings_of(params: str, **more) -> dict:
    """As notebook 04 makes them of a file of parameters."""
    given = yaml.safe_load((ROOT / "configs/params" / params).read_text()) | more
    return {
        "max_steps": given["max_steps"],
        "num_train_epochs": given["epochs"],
        "per_device_train_batch_size": given["batch_size"],
        "gradient_accumulation_steps": given["gradient_accumulation_steps"],
        "save_strategy": "steps" if given["save_steps"] else "no",
        "save_steps": given["save_steps"] or 500,
        "save_total_limit": given["save_total_limit"],
        "lora_r": given["lora_r"],
    }


def test_a_night_of_70b_by_hand():
    """20,000 chats of 182 tokens on average, twice, at 400 tokens a second."""
    ahead = whole_run(
        settings_of("llama31_70b_2x24gb_fastest.yaml", epochs=2), 20_000, 3_640_000, 2, SEVENTY, 400.0
    )
    assert ahead.rows_a_step == 4 * 2 * 2 == 16
    assert ahead.steps_an_epoch == 20_000 / 16 == 1_250
    assert (ahead.steps, ahead.epochs) == (2_500, 2.0)
    assert ahead.tokens_a_step == 3_640_000 / 1_250 == 2_912
    assert ahead.seconds == 2 * 3_640_000 / 400 == 18_200
    assert ahead.checkpoints == 3  # two are kept while the third is written
    assert ahead.disk_bytes == 3 * 3 * ADAPTER + 2 * ADAPTER == 4_556_062_720
    said = ahead.in_words(time_limit=7200)
    for words in (
        " 16\n",
        " 2,912\n",
        " 1,250\n",
        "2,500, which are 2.00 epochs",
        "hours                          5.1, so",
    ):
        assert words in said, said
    assert "stops it 2 time(s)" in said and "4.56 GB" in said


def test_steps_that_do_not_divide():
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "lora_r": 16,
        "save_strategy": "no",
    }
    ahead = whole_run(settings | {"max_steps": 10}, 101, 1_000, 2, SEVENTY)
    # 101 rows are 13 batches of 8, and these are 4 steps: the last of one batch.
    assert (ahead.steps_an_epoch, ahead.steps, ahead.epochs) == (4, 10, 2.5)
    assert "not known" in ahead.in_words()
    assert (
        ahead.disk_bytes == 5 * ADAPTER
    )  # the checkpoint of a run that is asked to stop, and the adapter twice


@pytest.mark.parametrize(
    ("settings", "steps", "wanted"),
    [
        ({"save_strategy": "no"}, 100, 1),
        ({"save_steps": 50}, 100, 2),
        ({"save_steps": 60}, 100, 2),  # the last step saves as well
        ({"save_steps": 0.1}, 100, 10),
        ({"save_steps": 10, "save_total_limit": 2}, 100, 3),
        ({"save_steps": 10}, -1, 2),  # epochs, before the rows are read
        ({"save_strategy": "epoch"}, 100, 2),
    ],
)
def test_checkpoints_at_once(settings, steps, wanted):
    assert checkpoints_on_disk(settings, steps) == wanted


def test_a_disk_that_is_too_small_is_refused_before_the_launch(tmp_path, monkeypatch):
    ahead = whole_run(settings_of("llama31_70b_2x24gb.yaml"), 1_000, 100_000, 2, SEVENTY)
    ahead.refuse_small_disk(tmp_path / "train")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=ahead.disk_bytes - 1))
    with pytest.raises(Refused, match=r"need 3\.3 GB and 3\.3 GB are free\. Set save_total_limit"):
        ahead.refuse_small_disk(tmp_path / "train")


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs/params").glob("llama3*_70b_*.yaml")), ids=lambda f: f.stem
)
def test_every_70b_file_saves_and_goes_on(file):
    given = yaml.safe_load(file.read_text())
    assert given["save_steps"] > 0 and given["save_total_limit"] == 2 and given["resume"] is True
    assert given["max_steps"] == -1 and given["epochs"] > 0 and given["eval_rows"] > 0
