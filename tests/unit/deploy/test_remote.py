"""An engine whose replicas are elsewhere: here they are lists of events that a test writes."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.support.tiny import picture

from limner import Pipeline
from limner.deploy.remote import LostReplica, RemoteEngine
from limner.engine import EditRequest, Engine, Event, Failed, Finished, ModelCard, Prefilled, PrefillRequest, Started
from limner.errors import (
    AccessDenied,
    Cancelled,
    CapacityError,
    DeadlineExceeded,
    InvalidRequest,
    LimnerError,
    MissingExtra,
    QueueFull,
    RateLimited,
    RemoteError,
)
from limner.images import prepare_reference, prepare_references
from limner.store import StoreStats

REQUEST = EditRequest(prompt="a red ball", seeds=(1,), width=64, height=64)


class Scripted:
    """Replicas that do, attempt by attempt, what a script says: events to give, or errors to raise."""

    def __init__(self, *attempts: list[Event | Exception | None]) -> None:
        self.attempts = list(attempts)
        self.asked: list[tuple[EditRequest | PrefillRequest, dict[str, Any]]] = []
        self.left = 0

    @contextlib.asynccontextmanager
    async def run(self, request: EditRequest | PrefillRequest, **options: Any) -> AsyncIterator[AsyncIterator[Event]]:
        self.asked.append((request, options))
        script = self.attempts.pop(0)

        async def events() -> AsyncIterator[Event]:
            for item in script:
                if item is None:
                    await asyncio.sleep(60)
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item

        try:
            yield events()
        finally:
            self.left += 1

    async def forget(self, key: str) -> bool:
        return True

    async def store_stats(self) -> list[StoreStats]:
        return [StoreStats(nbytes={"device": 0, "memory": 3, "disk": 0}) for _ in range(2)]


@pytest.fixture(scope="module")
def card(tiny_folder: Any) -> ModelCard:
    return ModelCard.of(Pipeline.from_pretrained(tiny_folder), memory_bytes=1 << 30)


@pytest.fixture(scope="module")
def finished(tiny_folder: Any) -> Finished:
    engine, heard = Engine(Pipeline.from_pretrained(tiny_folder), memory_bytes=1 << 30), []
    engine.submit(REQUEST, id="a", listener=heard.append)
    engine.close(timeout=60)
    assert isinstance(heard[-1], Finished)
    return heard[-1]


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(bounded())


async def until(done: Callable[[], bool]) -> None:
    while not done():
        await asyncio.sleep(0.005)


def engine_of(card: ModelCard, *attempts: list[Event | Exception | None], **options: Any) -> RemoteEngine:
    return RemoteEngine(Scripted(*attempts), card, **{"max_waiting": 2, "max_batch": 4, **options})


def test_a_request_whose_replica_died_is_sent_again_as_it_was(card: ModelCard, finished: Finished) -> None:
    async def test() -> None:
        engine = engine_of(card, [Started(), LostReplica("killed")], [Started()], [Started(), finished])
        heard: list[Event] = []
        engine.submit(REQUEST, id="a", listener=heard.append, owner="anna", priority=3)
        await until(lambda: isinstance(heard[-1], Finished) if heard else False)
        assert [type(event) for event in heard] == [Started, Started, Started, Finished]
        replicas: Any = engine.replicas
        assert [request for request, _ in replicas.asked] == [REQUEST] * 3
        assert [options["id"] for _, options in replicas.asked] == ["a/1", "a/2", "a/3"]  # never two of one name
        assert {(o["owner"], o["priority"]) for _, o in replicas.asked} == {("anna", 3)}
        assert (engine.stats().finished, engine.stats().failed, engine.stats().running) == (1, 0, 0)

    run(test)


def test_batches_are_counted_as_results_tell_of_them(card: ModelCard, finished: Finished) -> None:
    """Of three images, two requests were one batch of the replica, and one ran alone."""

    async def test() -> None:
        result = replace(finished.result, seeds=(1,), images=finished.result.images[:1], ran=2.0, batch=2)
        pair, alone = Finished(result), Finished(replace(result, ran=1.0, batch=1))
        engine = engine_of(card, [pair], [pair], [alone], max_waiting=3)
        for id_ in "abc":
            engine.submit(REQUEST, id=id_, listener=lambda event: None)
        await until(lambda: engine.stats().finished == 3)
        assert (engine.stats().batches, engine.stats().images, engine.stats().busy_seconds) == (2, 3, 3.0)

    run(test)


def test_a_request_that_kills_replicas_is_given_up(card: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limner.deploy.remote._LONGEST_PAUSE", 0.0)

    async def test() -> None:
        stopped = [LostReplica("stopped", counts=False)]
        engine = engine_of(
            card, *[stopped] * 9, [LostReplica("of another")], *[[Started(), LostReplica("out of memory")]] * 5
        )
        heard: list[Event] = []
        engine.submit(REQUEST, id="a", listener=heard.append)
        await until(lambda: any(isinstance(event, Failed) for event in heard))
        *begun, end = heard
        assert all(isinstance(event, Started) for event in begun)
        assert isinstance(end, Failed)
        assert isinstance(end.error, RemoteError)
        assert "5 replicas ended while they drew this, 1 while it waited there, the last one so: out of memory" in str(
            end.error
        )
        assert len(engine.replicas.asked) == 9 + 1 + 5  # type: ignore[attr-defined]

    run(test)


def test_cancelling_leaves_the_replica(card: ModelCard) -> None:
    async def test() -> None:
        engine = engine_of(card, [Started(), None])
        heard: list[Event] = []
        engine.submit(REQUEST, id="a", listener=heard.append)
        await until(lambda: bool(heard))
        assert engine.cancel("a")
        assert isinstance(heard[-1], Failed)
        assert isinstance(heard[-1].error, Cancelled)
        replicas: Any = engine.replicas
        await until(lambda: replicas.left == 1)
        assert not engine.cancel("a")
        assert (engine.stats().cancelled, len(heard)) == (1, 2)

    run(test)


def test_a_deadline_holds_while_no_replica_answers(card: ModelCard) -> None:
    async def test() -> None:
        engine = engine_of(card, [None])
        heard: list[Event] = []
        engine.submit(REQUEST, id="a", listener=heard.append, timeout=0.05)
        await until(lambda: bool(heard))
        assert isinstance(heard[0], Failed)
        assert isinstance(heard[0].error, DeadlineExceeded)
        replicas: Any = engine.replicas
        assert 0 < replicas.asked[0][1]["timeout"] <= 0.05

    run(test)


def test_the_queue_is_bounded_and_closing_names_what_is_left(card: ModelCard) -> None:
    async def test() -> None:
        engine = engine_of(card, [None], [None], [None])
        heard: list[Event] = []
        for id_ in "ab":
            engine.submit(REQUEST, id=id_, listener=heard.append)
        with pytest.raises(QueueFull, match="2 requests wait"):
            engine.submit(REQUEST, id="c", listener=heard.append)
        engine.submit(REQUEST, id="d", listener=heard.append, accepted=True)
        with pytest.raises(InvalidRequest, match="'d' is in the queue already"):
            engine.submit(REQUEST, id="d", listener=heard.append, accepted=True)
        await asyncio.sleep(0)
        assert await asyncio.to_thread(engine.close, timeout=0.01) == ["a", "b", "d"]
        assert heard == []
        assert not engine.is_alive
        with pytest.raises(QueueFull, match="shutting down"):
            engine.submit(REQUEST, id="e", listener=heard.append, accepted=True)

    run(test)


def test_refuses_and_answers_as_the_pipeline_would(card: ModelCard, tiny_folder: Any) -> None:
    pipe = Pipeline.from_pretrained(tiny_folder)
    references = [prepare_reference(picture(80, 64, seed=i), policy=pipe.reference_policy) for i in range(2)]

    async def test() -> None:
        engine = engine_of(card, [Prefilled("k", 5, 0.5, "miss")])
        local = Engine(pipe, memory_bytes=1 << 30)
        for bad in (EditRequest(prompt="", seeds=(1,)), EditRequest(prompt="a", seeds=(1,), width=65)):
            with pytest.raises(InvalidRequest) as theirs:
                engine.check(bad)
            with pytest.raises(InvalidRequest) as ours:
                local.check(bad)
            assert str(theirs.value) == str(ours.value)
        request = EditRequest(prompt="a", seeds=(1,), references=tuple(references))
        assert engine.check(request) == local.check(request) == (80, 64)
        local.close()
        assert engine.key_of(references) == pipe.key_of(references)
        heard: list[Event] = []
        prefill = PrefillRequest(references=tuple(references))
        engine.submit(prefill, id="p", listener=heard.append)
        await until(lambda: bool(heard))
        assert engine.replicas.asked[0][0] == prefill  # type: ignore[attr-defined]
        assert engine.holds("k")
        counts = await asyncio.to_thread(engine.store_stats)
        assert (counts.misses, counts.prefill_seconds, counts.nbytes["memory"]) == (1, 0.5, 6)
        assert await asyncio.to_thread(engine.forget, "k")
        assert not engine.holds("k")

    run(test)


def test_replicas_get_pixels_and_no_names_of_files(card: ModelCard, finished: Finished, tmp_path: Path) -> None:
    """A mask is read, and refused, where it is sent; what a replica is chosen by is the picture that is really drawn."""
    Image.new("L", (96, 64), 255).save(tmp_path / "mask.png")
    canvas = picture(96, 64)
    references = prepare_references([canvas], policy=card.reference_policy)
    masked = EditRequest(
        prompt="a", seeds=(1,), references=references, canvas=canvas, control={"mask_image": str(tmp_path / "mask.png")}
    )

    async def test() -> None:
        engine = engine_of(card, [finished], [finished])
        heard: list[Event] = []
        engine.submit(masked, id="a", listener=heard.append)
        engine.submit(replace(masked, control={"expand": (32, 0, 0, 0)}), id="b", listener=heard.append)
        with pytest.raises(InvalidRequest, match="mask_image: it is 64x64 and the canvas 96x64"):
            engine.submit(
                replace(masked, control={"mask_image": Image.new("L", (64, 64))}), id="c", listener=heard.append
            )
        await until(lambda: len(heard) == 2)
        sent = [request for request, _ in engine.replicas.asked]  # type: ignore[attr-defined]
        whole, expanded = ([r.report.digest for r in request.references] for request in sent)
        assert whole == [references[0].report.digest] != expanded
        assert b"mask.png" not in pickle.dumps(sent)
        assert engine.opened(sent[0]) is sent[0]

    run(test)


def test_too_much_for_the_replicas(card: ModelCard) -> None:
    from dataclasses import replace

    async def test() -> None:
        with pytest.raises(CapacityError, match=r"need .* GiB, 0.00 GiB are free"):
            engine_of(replace(card, memory_bytes=1000)).check(REQUEST)

    run(test)


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("seeds", "there are none"),
        RateLimited("too much", retry_after=3),
        AccessDenied("no key", missing=True),
        MissingExtra("x", package="ray", extra="ray"),
        Cancelled("a was cancelled"),
    ],
)
def test_errors_reach_other_processes(error: LimnerError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.__dict__) == (type(error), str(error), error.__dict__)
