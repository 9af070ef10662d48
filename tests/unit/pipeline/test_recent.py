"""The values that were used last."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from limner.pipeline.recent import Recent


def test_what_was_not_used_for_longest_goes_first() -> None:
    values: Recent[str, int] = Recent(2)
    assert [values.keep("a", 1), values.keep("b", 2), values.find("a"), values.keep("c", 3)] == [1, 2, 1, 3]
    assert list(values) == ["a", "c"]
    assert values.find("b") is None


def test_several_threads_may_use_it() -> None:
    values: Recent[int, int] = Recent(2)

    def use(thread: int) -> None:
        for i in range(3000):
            key = (thread + i) % 5
            found = values.find(key)
            assert (values.keep(key, key) if found is None else found) == key

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(use, thread) for thread in range(4)]:
            done.result()
    assert len(values) == 2
