"""A model that cannot be trained is refused before a weight is read; one that looks bad and is not, trains."""

import pytest
from bad_input.case import assert_refused
from bad_input.model import CASES

pytestmark = pytest.mark.launch


@pytest.mark.parametrize("cause", CASES)
def test_bad_model_is_refused_before_a_weight_is_read(answered, cause):
    cases, seen = answered
    assert_refused(cases[cause], seen[cause], CASES[cause][1])


def test_nf4_stored_as_uint8_with_a_tokenizer_that_lacks_template_and_padding_trains(accepted):
    assert accepted["uint8"]["status"] == [0, 0], accepted["uint8"]["output"]
