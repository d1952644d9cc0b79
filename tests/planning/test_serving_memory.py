"""The memory of an answer, counted: beside the sizes of files that others publish, and by hand."""

import pytest

from nbutils.planning.memory_items import GIB
from nbutils.planning.memory_plan import CARDS
from nbutils.planning.serving_memory import q4_k_m_bytes, serving_bytes
from nbutils.planning.shapes import SHAPES


@pytest.mark.parametrize("name, published_gb", [("llama31_70b", 42.52), ("llama31_8b", 4.92)])
def test_q4_k_m_has_the_size_of_the_published_files(name, published_gb):
    assert q4_k_m_bytes(SHAPES[name]) / 1e9 == pytest.approx(published_gb, rel=2e-3)


def test_the_items_by_hand_and_two_cards_are_enough():
    items = serving_bytes(SHAPES["llama31_70b"], context=8192, rank=16)
    assert items["keys and values in fp16"] == 2 * 80 * 8 * 128 * 8192 * 2
    per_layer = 16 * (2 * (8192 + 8192) + 2 * (1024 + 8192) + 3 * (28672 + 8192))
    assert items["adapter in fp32"] == 80 * per_layer * 4
    assert 42 < sum(items.values()) / GIB < 2 * CARDS[24]
