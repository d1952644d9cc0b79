"""The sweep of learning rates: what it says of where the lowest loss was found."""

import pytest

from nbutils.lessons.rate_sweep import draw_rates

BEFORE = {0: 5.0}
MIDDLE = {1e-3: BEFORE | {30: 4.7}, 3e-3: BEFORE | {30: 4.5}, 9e-3: BEFORE | {30: 4.6}}
HIGH = MIDDLE | {9e-3: BEFORE | {30: 4.4}}
LOW = MIDDLE | {1e-3: BEFORE | {30: 4.4}}


@pytest.mark.parametrize(
    "sweep, said",
    [
        (MIDDLE, "lowest at 3.0e-03\n"),
        (HIGH, "lowest at 9.0e-03, an end of what was tried: try 2.7e-02 next\n"),
        (LOW, "lowest at 1.0e-03, an end of what was tried: try 3.3e-04 next\n"),
    ],
    ids=["in the middle", "at the high end", "at the low end"],
)
def test_a_lowest_loss_at_an_end_is_no_answer(capsys, sweep, said):
    draw_rates(sweep)
    told = capsys.readouterr().out
    assert told.endswith(said)
    assert all(f"{losses[30]:.3f}" in told for losses in sweep.values())
