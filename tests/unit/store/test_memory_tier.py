"""Budget, order of eviction and pins in memory."""

from __future__ import annotations

import pytest
from tests.support.references import ONE, never, references

from limner import InvalidRequest, ReferenceStore


def test_least_recently_used_goes_first() -> None:
    store, some = ReferenceStore(memory_bytes=2 * ONE), [references(i) for i in range(3)]
    for one in some[:2]:
        assert store.get(one.key, lambda one=one: one) == (one, "miss")
    assert store.get(some[0].key, never) == (some[0], "memory")  # now the most recently used
    store.get(some[2].key, lambda: some[2])
    assert [one.key in store for one in some] == [True, False, True]
    assert (store.nbytes, len(store)) == (2 * ONE, 2)
    stats = store.stats()
    assert (stats.misses, stats.hits["memory"], stats.evictions["memory"]) == (3, 1, 1)
    assert stats.prefill_seconds == 300
    assert 99 < stats.prefill_seconds_saved <= 100
    store.check_integrity()


def test_pinned_entries_stay() -> None:
    store, some = ReferenceStore(memory_bytes=2 * ONE), [references(i) for i in range(4)]
    for one in some[:2]:
        store.get(one.key, lambda one=one: one)
    store.pin(some[0].key)
    for one in some[2:]:
        store.get(one.key, lambda one=one: one)
        store.check_integrity()
    assert [one.key in store for one in some] == [True, False, False, True]
    store.unpin(some[0].key)
    store.get(some[2].key, lambda: some[2])
    assert some[0].key not in store
    with pytest.raises(InvalidRequest, match="is not in the store"):
        store.pin(some[0].key)


def test_what_does_not_fit_is_served_and_not_kept() -> None:
    store = ReferenceStore(memory_bytes=ONE - 1)
    for _ in range(2):
        assert store.get(references().key, references)[1] == "miss"
    assert (len(store), store.nbytes) == (0, 0)


def test_pins_do_not_raise_a_budget() -> None:
    store = ReferenceStore(device_bytes=ONE, memory_bytes=4 * ONE)
    for number in range(3):
        store.get(references(number).key, lambda number=number: references(number))
        store.pin(references(number).key)
    for number in range(3):
        store.get(references(number).key, never, device="meta")
    assert store.stats().nbytes["device"] == ONE
    assert len(store) == 3
    store.check_integrity()
