"""Peaks of memory that `limner bench` and the benchmarks report."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from limner.bench.measure import grown

MIB = 1 << 20


def take() -> None:
    """32 MiB, for a moment."""
    with mmap.mmap(-1, 32 * MIB) as memory:
        for at in range(0, 32 * MIB, mmap.PAGESIZE):
            memory[at] = 1


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not count")
def test_what_a_call_takes_for_a_moment() -> None:
    take()
    assert 31 * MIB < grown(take) < 48 * MIB
    assert grown(lambda: None) < 8 * MIB  # the highest before is forgotten


def test_a_system_that_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call is made, once."""

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    made: list[int] = []
    assert grown(lambda: made.append(1)) == 0
    assert made == [1]


def test_errors_of_a_call_are_raised() -> None:
    """Also those that the system's files raise."""

    def fail() -> None:
        raise FileNotFoundError("x")

    with pytest.raises(FileNotFoundError, match="x"):
        grown(fail)
