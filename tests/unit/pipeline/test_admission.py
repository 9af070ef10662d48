"""Admission by memory: what is refused, and with which numbers."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from tests.support.tiny import picture

from limner import CapacityError, Pipeline, ReferenceStore


def test_kept_references_are_not_admitted_again(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their K/V are in memory already, and no activations of theirs are to come."""
    pictures = [picture(256, 256, seed=i) for i in range(4)]
    refs = pipe.prefill(pictures)
    free = 12 << 20
    monkeypatch.setattr("limner.memory.free.psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    assert pipe("a dog", references=refs, width=64, height=64).reference_cache == "given"
    assert pipe("a dog", image=pictures, width=64, height=64).reference_cache == "memory"
    pipe.store = ReferenceStore(memory_bytes=0)
    with pytest.raises(CapacityError, match=re.escape("1024 reference tokens")):
        pipe("a dog", image=pictures, width=64, height=64)


def test_refuses_what_does_not_fit_in_memory(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 1 << 19

    monkeypatch.setattr("limner.memory.free.psutil.virtual_memory", lambda: Memory)
    with pytest.raises(CapacityError, match=re.escape("0.00 GiB are free; use fewer or smaller references")):
        pipe.prefill([picture(1024, 1024)] * 3)
    assert len(pipe.store) == 0
    assert pipe.prefill(picture(64, 64)).num_tokens == 16
    with pytest.raises(CapacityError, match=r"^size: 1 x \d+ own tokens need .* use a smaller output"):
        pipe("a dog", image=picture(64, 64), width=1024, height=1024)
