"""Decoding in threads of its own: what takes too long is left, and nothing else waits for it."""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import threading

import pytest

from limner.errors import InvalidRequest, QueueFull
from limner.server.jobs.decoders import Decoders
from limner.server.jobs.offload import Offload


def test_there_are_as_many_threads_as_processors_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the machine are none of ours in a cpuset."""
    monkeypatch.setattr("os.cpu_count", lambda: 128)
    for usable, threads in ((1, 2), (3, 3), (64, 8)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, usable=usable: set(range(usable)), raising=False)
        assert Decoders()._threads == threads


def test_returns_and_raises_what_the_call_does() -> None:
    def refuse() -> None:
        raise TimeoutError("of the call itself")

    async def run() -> None:
        decoders = Decoders()
        assert await decoders.run(lambda: 7, field="image 1") == 7
        assert (await decoders.run(threading.current_thread, field="image 1")).daemon  # keeps no process from ending
        with pytest.raises(TimeoutError, match="of the call itself"):
            await decoders.run(refuse, field="image 1")

    asyncio.run(run())


def test_what_takes_too_long_is_refused_and_few_of_it_may_be_left() -> None:
    released = threading.Event()

    async def run() -> None:
        decoders = Decoders(threads=4, seconds=0.05, max_left=4)
        for number in (1, 2):
            with pytest.raises(
                InvalidRequest, match=rf"image {number}: reading it took over 0.05 s, the limit; send a"
            ):
                await decoders.run(released.wait, field=f"image {number}")
        with pytest.raises(
            QueueFull,
            match=r"image 3: 2 of your pictures, 2 in all, are still being decoded after their 0.05 s; at most 2 and 4",
        ):
            await decoders.run(lambda: 7, field="image 3")
        released.set()
        while True:  # those that were left have ended
            try:
                assert await decoders.run(lambda: 7, field="image 4") == 7
                break
            except QueueFull:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_owners_share_the_places() -> None:
    """One owner has half of them at most, and who has fewest is next."""
    released, begun = threading.Event(), []

    def decode(name: str) -> None:
        begun.append(name)
        assert released.wait(60)

    async def run() -> None:
        decoders = Decoders(threads=4, seconds=60)

        def start(owner: str, number: int) -> list[asyncio.Task[None]]:
            calls = [functools.partial(decode, f"{owner} {i}") for i in range(number)]
            return [asyncio.create_task(decoders.run(call, field="image", owner=owner)) for call in calls]

        async def settle(number: int) -> list[str]:
            while len(begun) < number:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)
            return sorted(begun)

        anna = start("anna", 50)
        assert await settle(2) == ["anna 0", "anna 1"]
        bob = start("bob", 3)
        assert await settle(4) == ["anna 0", "anna 1", "bob 0", "bob 1"]
        anna[-1].cancel()  # one that waits
        carl = start("carl", 1)
        await asyncio.sleep(0.01)
        released.set()
        await asyncio.gather(*bob, *carl, *anna[:-1])
        assert begun.index("carl 0") <= 5  # not behind those of anna
        assert begun.index("bob 2") < 9
        assert len(begun) == 53
        assert (decoders._running.total(), decoders._left.total(), len(decoders._waiting)) == (0, 0, 0)

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no priorities of their own")
def test_long_work_steps_back_and_has_the_longer_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stepped_back, niceness = threading.Event(), os.getpriority(os.PRIO_PROCESS, 0)

    def own() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def long() -> int:
        assert stepped_back.wait(60)
        return own()

    def worked(thread: threading.Thread, taken: float) -> float:
        stepped_back.set()
        return 0.0  # it only waited for a processor

    async def run() -> None:
        decoders = Decoders(seconds=15)
        monkeypatch.setattr("limner.server.jobs.decoders._worked", worked)
        assert await decoders.run(long, field="image") == max(niceness, 10)
        assert await decoders.run(own, field="image") == niceness

    asyncio.run(asyncio.wait_for(run(), 60))


def test_waiting_for_a_processor_is_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    told = iter([0.0, 0.04, 0.06])

    async def run() -> None:
        decoders = Decoders(seconds=0.05)
        monkeypatch.setattr("limner.server.jobs.decoders._PATIENCE", 1e6)
        monkeypatch.setattr("limner.server.jobs.decoders._worked", lambda thread, taken: next(told))
        with pytest.raises(InvalidRequest, match=r"reading it took over 0\.05 s"):
            await decoders.run(released.wait, field="image")
        assert next(told, None) is None  # it was looked at again
        released.set()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_those_of_one_owner_that_are_left_do_not_stop_others() -> None:
    released = threading.Event()

    async def run() -> None:
        decoders = Decoders(threads=4, seconds=0.05, max_left=4)
        for _ in range(2):
            with pytest.raises(InvalidRequest):
                await decoders.run(released.wait, field="image 1", owner="anna")
        with pytest.raises(QueueFull):
            await decoders.run(released.wait, field="image 1", owner="anna")
        assert await decoders.run(lambda: 7, field="image 1", owner="bob") == 7
        released.set()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_one_whose_caller_leaves_keeps_its_place_until_it_ends() -> None:
    """So callers who leave can neither start any number of threads nor make others be refused."""
    released = threading.Event()

    async def run() -> None:
        decoders = Decoders(threads=1, seconds=60, max_left=1)
        caller = asyncio.create_task(decoders.run(released.wait, field="image 1"))
        await asyncio.sleep(0.01)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        other = asyncio.create_task(decoders.run(lambda: 7, field="image 2"))
        await asyncio.sleep(0.05)
        assert not other.done()
        released.set()
        assert await other == 7

    asyncio.run(asyncio.wait_for(run(), 60))


def test_other_work_does_not_wait_for_decoding() -> None:
    released = threading.Event()

    async def run() -> None:
        offload = Offload(Decoders(threads=4, seconds=60))
        decoding = [
            asyncio.create_task(offload.decode(released.wait, field=f"image {i}", owner="anna")) for i in range(8)
        ]
        await asyncio.sleep(0.01)
        try:
            assert await offload.run(max, 3, 7) == 7
            assert not any(task.done() for task in decoding)
        finally:
            released.set()
            await asyncio.gather(*decoding)
            offload.close()

    asyncio.run(asyncio.wait_for(run(), 60))
