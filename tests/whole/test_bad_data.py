"""Rows that cannot be learned are refused before a weight is read, or counted."""

import json
import re

import pytest
from bad_input.case import assert_refused
from bad_input.data import CASES

pytestmark = pytest.mark.launch


@pytest.mark.parametrize("cause", CASES)
def test_bad_data_is_refused_before_a_weight_is_read(answered, cause):
    cases, seen = answered
    assert_refused(cases[cause], seen[cause], CASES[cause][1])


def test_rows_without_room_for_an_answer_are_counted(accepted):
    assert re.search(
        r"\d+ of 316 rows keep no token of their answer within max_length 64", accepted["uint8"]["output"][0]
    )


def test_an_epoch_shorter_than_the_first_line_of_the_log_ends_without_a_training_loss(accepted):
    assert accepted["short"]["status"] == [0], accepted["short"]["output"]
    training = json.loads((accepted["folder"] / "short/run.json").read_text())["training"]
    assert training["loss_first"] is None and training["loss_last"] is None
    assert training["held_out_loss_after"] > 0
