"""Amounts of memory as text."""

from __future__ import annotations

import pytest

from limner import InvalidRequest
from limner.memory import parse_bytes

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "number"), [("20GiB", 20 * GIB), ("14.5 GB", 14_500_000_000), ("512mib", 512 << 20), ("7", 7), (9, 9)]
)
def test_amounts_of_memory(text: str | int, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1 parsec", "1e9", 0, True, 1.5, "0", "inf"])
def test_what_is_no_amount_of_memory(text: object) -> None:
    with pytest.raises(InvalidRequest, match="memory_limit"):
        parse_bytes(text)  # type: ignore[arg-type]
