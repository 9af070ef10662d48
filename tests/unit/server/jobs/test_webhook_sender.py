"""Webhooks whose receivers hang keep only webhooks of the same owner to the same receiver waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.jobs import Clock, job, sqlite

from limner.errors import OutputError
from limner.outbound.policy import OutboundPolicy
from limner.server.jobs.offload import Offload
from limner.server.jobs.places import Places
from limner.server.jobs.records import Job, Webhook
from limner.server.jobs.store import JobStore
from limner.server.jobs.webhook_sender import WebhookSender
from limner.server.jobs.webhooks import Delivery


class Receivers:
    """In place of the outbound client: hosts named hang*.example.org do not answer until they are released."""

    policy = OutboundPolicy()

    def __init__(self) -> None:
        self.called: list[str] = []
        self.hanging = 0
        self.released = asyncio.Event()
        self.status = 200

    async def request(self, method: str, url: str, **_: Any) -> Any:
        self.called.append(url)
        if "//hang" in url:
            self.hanging += 1
            await self.released.wait()
            self.hanging -= 1
        return SimpleNamespace(status=self.status)


@pytest.fixture(autouse=True)
def _fast(on_disk: JobStore) -> None:
    sqlite(on_disk).execute("PRAGMA synchronous = OFF")


def end_jobs(store: JobStore, *urls: str, owner: str = "alice") -> list[Job]:
    ended = []
    for url in urls:
        new, _ = store.add(job(owner=owner, webhook=Webhook(url=url)))
        ended.append(store.end(new.id, "ready", result={}, keep_seconds=60))
    return [one for one in ended if one is not None]


def send(store: JobStore, script: Callable[[WebhookSender, Receivers], Awaitable[None]]) -> None:
    async def run() -> None:
        receivers, offload = Receivers(), Offload()
        sender = WebhookSender(
            jobs=store,
            offload=offload,
            client=receivers,  # type: ignore[arg-type]
            policy=Delivery(),
            describe=lambda job: {"id": job.id},
        )
        sender.start()
        try:
            async with asyncio.timeout(60):
                await script(sender, receivers)
        finally:
            await sender.stop()
            offload.close()

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("number", [64, 130])
def test_another_owner_does_not_wait_for_receivers_that_hang(on_disk: JobStore, clock: Clock, number: int) -> None:
    end_jobs(on_disk, *[f"https://hang{i % 20}.example.org/" for i in range(number)])
    clock.now += 1

    async def script(sender: WebhookSender, receivers: Receivers) -> None:
        await until(lambda: receivers.hanging == 8)
        end_jobs(on_disk, "https://good.example.org/bob", owner="bob")
        sender.wake()
        await until(lambda: "https://good.example.org/bob" in receivers.called)
        assert receivers.hanging == 8  # none of them had to end first

    send(on_disk, script)


def test_another_receiver_of_the_same_owner_does_not_wait(on_disk: JobStore, clock: Clock) -> None:
    end_jobs(on_disk, *["https://hang.example.org/"] * 30)
    clock.now += 1
    end_jobs(on_disk, "https://good.example.org/")

    async def script(sender: WebhookSender, receivers: Receivers) -> None:
        await until(lambda: "https://good.example.org/" in receivers.called)
        assert receivers.hanging == 4

    send(on_disk, script)


def test_all_are_delivered_once_receivers_answer(on_disk: JobStore, clock: Clock) -> None:
    for owner in ("alice", "bob"):
        end_jobs(on_disk, *[f"https://hang.example.org/{owner}{i}" for i in range(30)], owner=owner)

    async def script(sender: WebhookSender, receivers: Receivers) -> None:
        await until(lambda: receivers.hanging == 8)
        assert {url.split("/")[-1].rstrip("0123456789") for url in receivers.called} == {
            "alice",
            "bob",
        }  # neither can take all of a receiver
        receivers.released.set()
        await until(lambda: not on_disk.due_webhooks())
        assert len(receivers.called) == len(set(receivers.called)) == 60

    send(on_disk, script)


def test_a_retry_holds_no_place(on_disk: JobStore, clock: Clock) -> None:
    """Receivers that fail wait for their next attempt in the store, and those of a store that fails in memory."""
    failing = end_jobs(on_disk, *[f"https://bad.example.org/{i}" for i in range(20)])

    async def script(sender: WebhookSender, receivers: Receivers) -> None:
        receivers.status = 500
        await until(lambda: not on_disk.due_webhooks())
        assert len(receivers.called) == len(failing)
        await until(lambda: len(sender._places) == 0)
        receivers.status = 200

        def fails(id: str, *, again: float | None) -> None:
            raise OutputError("full")

        on_disk.webhook_attempted, kept = fails, on_disk.webhook_attempted  # type: ignore[assignment,method-assign]
        end_jobs(on_disk, *[f"https://one.example.org/{i}" for i in range(20)])
        sender.wake()
        await until(lambda: len(receivers.called) == 40)
        await until(lambda: len(sender._places) == 0)
        on_disk.webhook_attempted = kept  # type: ignore[method-assign]
        end_jobs(on_disk, "https://two.example.org/")
        sender.wake()
        await until(lambda: "https://two.example.org/" in receivers.called)
        assert len(receivers.called) == 41  # what could not be noted is not sent again and again

    send(on_disk, script)


def test_places_go_to_those_who_have_fewest() -> None:
    places = Places(total=64)
    waiting = [("alice", f"host{i}") for i in range(100)] + [(f"owner{i}", "x") for i in range(9)]
    taken = [waiting[index] for index in places.take(waiting)]
    assert sum(owner == "alice" for owner, _ in taken) == 8
    assert sum(receiver == "x" for _, receiver in taken) == 8
    assert len(places) == len(taken) == 16
    for one in taken:
        places.give_back(*one)
    assert len(places) == 0
    assert not places._owners
    assert not places._receivers
    assert not places._pairs
    many = [(f"owner{i % 50}", f"host{i}") for i in range(1000)]
    assert len({many[index][0] for index in places.take(many)}) == 50
    assert len(places) == 64


def test_stopping_is_not_lost_where_something_is_due_at_that_moment(on_disk: JobStore) -> None:
    """`asyncio.wait_for` of Python 3.11 forgets a cancellation that meets the end of what it waits for."""

    async def run(turns: int) -> None:
        offload = Offload()
        sender = WebhookSender(
            jobs=on_disk,
            offload=offload,
            client=Receivers(),  # type: ignore[arg-type]
            policy=Delivery(),
            describe=lambda job: {"id": job.id},
        )
        sender.start()
        await asyncio.sleep(0.05)  # it waits for the next webhook
        sender.wake()
        for _ in range(turns):
            await asyncio.sleep(0)
        stopping = asyncio.ensure_future(sender.stop())
        done, _ = await asyncio.wait([stopping], timeout=10)
        assert done, f"{turns} turns of the loop after it was woken"
        offload.close()

    for turns in range(6):
        asyncio.run(run(turns))
