"""The figure of lesson 07b says what a second machine is worth."""

import pytest

from nbutils.lessons.machines_figure import TWO_BY_TWO, times_one, verdict
from nbutils.lessons.step_figures import STATED
from nbutils.planning.network_traffic import LINKS, bytes_between_machines
from nbutils.planning.run_setup import Setup
from nbutils.planning.shapes import shape_of
from nbutils.planning.step_estimate import estimate, pcie4_links


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


def test_two_3090s_with_short_rows_are_slower_over_the_link_of_the_lesson():
    """What notebook 07b says beside its estimate for 4,096 tokens."""
    llama, recipe = shape_of("llama31_70b"), Setup(world_size=2, fsdp_version=1, offload=True)
    step = estimate(llama, recipe, 1, 1024, pcie4_links(16, STATED["3090"])).step
    sent = bytes_between_machines(llama, TWO_BY_TWO, 2)
    assert round(step) == 20 and verdict(*times_one(sent, step, LINKS["10 Gbit/s"])) == "slower"
