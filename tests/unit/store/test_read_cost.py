"""What reading costs, as measured."""

from __future__ import annotations

import pytest
from tests.support.references import references

from limner.store.read_cost import ReadCost


def test_cost_of_reading_tells_small_from_large() -> None:
    """An overhead of 5 ms and 1 GB/s: what 10 KB took says nothing of what 1 GB takes."""
    cost = ReadCost()
    cost.measure(0.005, 10_000)
    assert cost.expected(1 << 30) < 0.01
    cost.measure(0.105, 100_000_000)
    assert cost.expected(1_000_000_000) == pytest.approx(1.005)
    assert cost.expected(10_000) == pytest.approx(0.00501)


def test_what_was_refused_is_tried_again_now_and_then() -> None:
    cost, one = ReadCost(), references(seconds=1.0)
    cost.measure(10.0, 10_000)  # a moment when the disk was busy
    tried = [number for number in range(1000) if cost.is_worth_a_write(one)]
    assert tried[:3] == [8, 25, 58]
    cost.measure(0.01, 10_000)
    assert all(cost.is_worth_a_write(one) for _ in range(10))
