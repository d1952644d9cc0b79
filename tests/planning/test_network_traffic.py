"""Several machines by counting: from which link on a second machine pays, and that one more never sends less."""

import pytest

from nbutils.lessons.step_figures import STATED
from nbutils.planning.network_traffic import (
    LINKS,
    bytes_between_machines,
    inside_a_machine,
    link_that_pays,
    tokens_per_second,
)
from nbutils.planning.run_setup import Setup
from nbutils.planning.shapes import SHAPES
from nbutils.planning.step_estimate import estimate, pcie4_links

SEVENTY = SHAPES["llama31_70b"]


@pytest.mark.parametrize("machines", [2, 4])
def test_over_the_link_that_pays_the_machines_are_as_fast_as_one(machines):
    step, tokens = 20.0, 4096
    sent = bytes_between_machines(SEVENTY, Setup(world_size=2 * machines), machines)
    one = 2 * tokens / step
    for hides in (False, True):
        link = link_that_pays(sent, step, hides, machines)
        speeds = tokens_per_second(tokens, 2 * machines, step, sent, link)
        assert speeds[hides] == pytest.approx(one)
        faster = tokens_per_second(tokens, 2 * machines, step, sent, 1.1 * link)
        assert faster[hides] > one


def test_two_3090s_gain_from_a_second_machine_over_10_gigabits_and_h200s_do_not():
    """What lesson 07b says, by the record of the one and the estimate of the other."""
    sent = bytes_between_machines(SEVENTY, Setup(world_size=4), 2)
    recipe = Setup(world_size=2, fsdp_version=1, offload=True)
    slow = estimate(SEVENTY, recipe, 2, 2048, pcie4_links(16, STATED["3090"])).step
    assert link_that_pays(sent, slow) < LINKS["10 Gbit/s"] < link_that_pays(sent, 7.09, hides=True)


def test_ranks_that_cannot_be_shared_out_are_refused():
    with pytest.raises(ValueError, match="3 ranks cannot be shared out evenly among 2 machines"):
        inside_a_machine(Setup(world_size=3), 2)
    assert bytes_between_machines(SEVENTY, Setup(world_size=2), 1) == 0
