"""The figure of lesson 07b says what a second machine is worth."""

import pytest

from nbutils.lessons.machines_figure import verdict


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.26, 0.30, "slower"),
        (0.55, 1.20, "faster only if the sending hides"),
        (1.03, 2.00, "about the same or faster"),
        (1.20, 2.00, "faster"),
    ],
)
def test_a_few_percent_are_not_called_faster(low, high, said):
    assert verdict(low, high) == said
