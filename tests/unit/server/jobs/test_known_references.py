"""What owners are told of K/V: nothing that only another owner's use explains."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from tests.support.jobs import job

from limner.server.jobs.known_references import KnownReferences, Told
from limner.server.jobs.offload import Offload
from limner.server.jobs.records import Handle
from limner.server.jobs.store import JobStore


def run(store: JobStore, work: Callable[[KnownReferences], Awaitable[None]], *, is_shared: bool = False) -> None:
    async def with_parts() -> None:
        offload = Offload()
        try:
            await work(KnownReferences(store, offload=offload, is_shared=is_shared))
        finally:
            offload.close()

    asyncio.run(with_parts())


def test_a_first_hit_is_told_as_a_miss_and_later_ones_as_they_are(on_disk: JobStore) -> None:
    async def work(known: KnownReferences) -> None:
        first = await known.tell("anna", "k", source="miss", seconds=4.0)
        assert first == Told(source="miss", seconds=4.0)
        assert await known.tell("anna", "k", source="memory", seconds=3.9) == Told(source="memory", seconds=3.9)
        other = await known.tell("bob", "k", source="memory", seconds=4.0)
        assert (other.source, other.saved, other.is_changed) == ("miss", 0.0, True)
        assert 3.6 <= other.seconds <= 4.4
        assert other.seconds != 4.0  # which would tell whose prefill it was
        later = await known.tell("bob", "k", source="disk", seconds=4.0)
        assert later == Told(source="disk", seconds=other.seconds)
        assert later.saved == other.seconds
        assert await known.has("anna", "k")
        assert not await known.has("carl", "k")
        await known.forget("bob", "k")
        assert not await known.has("bob", "k")

    run(on_disk, work)


def test_what_is_shared_is_told_to_everybody(on_disk: JobStore) -> None:
    async def work(known: KnownReferences) -> None:
        assert await known.has("bob", "k")
        assert await known.tell("bob", "k", source="memory", seconds=4.0) == Told(source="memory", seconds=4.0)

    run(on_disk, work, is_shared=True)


def test_jobs_and_handles_of_earlier_processes_count(on_disk: JobStore) -> None:
    for key, saved in (("of a job", 0.0), ("of a job", 3.0), ("of one job", 0.0)):
        drawn, _ = on_disk.add(job())
        on_disk.end(drawn.id, "ready", result={"reference_key": key, "seconds_saved": saved}, keep_seconds=60)
    for key, seconds in (("of an upload", 5.0), ("not computed", None)):
        handle = Handle(owner="anna", key=key, references=(), num_tokens=24, nbytes=1, prefill_seconds=seconds)
        on_disk.add_handle(handle, (), max_handles=9)

    async def work(known: KnownReferences) -> None:
        assert [await known.has("anna", key) for key in ("of a job", "of an upload", "not computed")] == [
            True,
            True,
            False,
        ]
        for key, seconds in (("of a job", 3.0), ("of one job", 9.0), ("of an upload", 5.0)):
            assert (await known.tell("anna", key, source="memory", seconds=9.0)).seconds == seconds
        assert not await known.has("bob", "of a job")

    run(on_disk, work)
