"""Decoding beside the next batch's steps: the same pictures, and what fails, is cancelled or finds no memory there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.engines import Heard, same
from tests.support.tiny import Gate, generators

from limner import Cancelled, CapacityError, Pipeline
from limner.engine import EditRequest, Engine, Event, Finished, Started
from limner.engine.decoding import Decoder

SIZES = ((64, 64), (96, 64), (64, 96))
"""Of requests that do not run together."""


class Failures(list[Exception]):
    """One failure, made when it is taken."""

    def __init__(self, make: Callable[[], Exception]) -> None:
        super().__init__([Exception("not made yet")])
        self._make = make

    def pop(self, *_: Any) -> Exception:
        self.clear()
        return self._make()


class Decoding:
    """Tells where pictures are decoded, lets a test hold what is decoded beside others, or make it fail."""

    def __init__(self, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: list[str] = []
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.may_end.set()
        self.failures: list[Exception] = []
        decode = pipe.autoencoder.decode

        def watched(latents: torch.Tensor) -> torch.Tensor:
            self.threads.append(threading.current_thread().name.rsplit("_", 1)[0])
            if self.threads[-1] == "limner-decode":
                assert torch.get_num_threads() == 1
                self.begun.set()
                assert self.may_end.wait(60)
                if self.failures:
                    raise self.failures.pop()
            return decode(latents)

        monkeypatch.setattr(pipe.autoencoder, "decode", watched)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


@pytest.fixture
def decoding(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Decoding:
    return Decoding(pipe, monkeypatch)


@pytest.fixture
def engine(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(
        torch,
        "get_num_threads",
        lambda threads=torch.get_num_threads: (
            max(2, threads()) if threading.current_thread().name == "limner-engine" else threads()
        ),
    )
    engine = Engine(pipe)
    yield engine
    engine.close()


def submitted(engine: Engine, gate: Gate, num: int = 3) -> list[Heard]:
    """Requests of sizes of their own, all of which wait when the first is drawn."""
    gate.shut()
    heard = [Heard() for _ in range(num)]
    for i, (listener, (width, height)) in enumerate(zip(heard, SIZES, strict=False)):
        request = EditRequest(prompt="a dog", seeds=(i,), width=width, height=height, num_inference_steps=2)
        engine.submit(request, id=f"job{i}", listener=listener)
        assert gate.entered.wait(60)
    gate.open()
    return heard


def pixels(pipe: Pipeline, i: int) -> Any:
    width, height = SIZES[i]
    out = pipe("a dog", width=width, height=height, num_inference_steps=2, generator=generators(i))
    return np.asarray(out.images[0])


def test_pictures_are_those_of_the_pipeline(engine: Engine, pipe: Pipeline, gate: Gate, decoding: Decoding) -> None:
    """The first is decoded beside the second's steps, held until these are done; the last one with all processors."""
    decoding.may_end.clear()
    first, second, third = submitted(engine, gate)
    results = [second.result(), third.result()]
    assert not any(isinstance(event, Finished) for event in first.events)
    decoding.may_end.set()
    results.insert(0, first.result())
    assert decoding.threads == ["limner-decode", "limner-engine", "limner-engine"]
    for i, result in enumerate(results):
        assert same(result.images[0], pixels(pipe, i))
        assert result.timings.decode > 0


def test_a_request_alone_is_decoded_where_it_is_drawn(engine: Engine, gate: Gate, decoding: Decoding) -> None:
    submitted(engine, gate, 1)[0].result()
    assert decoding.threads == ["limner-engine"]


def test_it_can_be_turned_off(pipe: Pipeline, gate: Gate, decoding: Decoding) -> None:
    engine = Engine(pipe, decode_beside=False)
    for heard in submitted(engine, gate):
        heard.result()
    engine.close()
    assert decoding.threads == ["limner-engine"] * 3


def test_too_little_memory_beside_others_is_enough_alone(
    engine: Engine, pipe: Pipeline, gate: Gate, decoding: Decoding
) -> None:
    decoding.failures = [CapacityError("memory is short")]
    first, second = submitted(engine, gate, 2)
    assert same(first.result().images[0], pixels(pipe, 0))
    second.result()
    assert sum(isinstance(event, Started) for event in first.events) == 2
    assert engine.stats().failed == 0


def test_what_fails_beside_others_fails_alone(engine: Engine, gate: Gate, decoding: Decoding) -> None:
    decoding.failures = [ValueError("broken")]
    first, second = submitted(engine, gate, 2)
    assert isinstance(first.error(), ValueError)
    second.result()
    assert (engine.stats().failed, engine.stats().finished) == (1, 1)


def test_nothing_is_drawn_beside_it_without_memory_for_both(
    engine: Engine, gate: Gate, decoding: Decoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(engine.admission), "needed", lambda *_, **__: engine.admission.memory_bytes // 2 + 1)
    decoding.may_end.clear()
    first, second = submitted(engine, gate, 2)
    assert decoding.begun.wait(60)
    assert not second.events or not any(isinstance(event, Started) for event in second.events)
    decoding.may_end.set()
    first.result()
    second.result()


def test_cancelled_while_it_is_decoded(engine: Engine, gate: Gate, decoding: Decoding) -> None:
    decoding.may_end.clear()
    first, second = submitted(engine, gate, 2)
    assert decoding.begun.wait(60)
    assert engine.cancel("job0")
    decoding.may_end.set()
    assert isinstance(first.error(), Cancelled)
    second.result()


def test_closing_waits_for_what_is_decoded(engine: Engine, gate: Gate, decoding: Decoding) -> None:
    decoding.may_end.clear()
    ended: list[Event] = []
    first, second = submitted(engine, gate, 2)
    assert decoding.begun.wait(60)
    second.result()
    threading.Timer(0.2, decoding.may_end.set).start()
    assert engine.close(timeout=60) == []
    ended = [first.end(), second.end()]
    assert all(isinstance(event, Finished) for event in ended)


def test_closing_waits_no_longer_than_for_what_fails(engine: Engine, gate: Gate, decoding: Decoding) -> None:
    decoding.may_end.clear()
    decoding.failures = [ValueError("broken")]
    first, second = submitted(engine, gate, 2)
    assert decoding.begun.wait(60)
    second.result()
    threading.Timer(0.2, decoding.may_end.set).start()
    start = time.monotonic()
    assert engine.close(timeout=50) == []
    assert time.monotonic() - start < 40
    assert isinstance(first.error(), ValueError)


def test_what_is_drawn_anew_waits_for_memory(
    engine: Engine, gate: Gate, decoding: Decoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first cannot be decoded, and is drawn anew beside the second's decoding, where memory is too little again."""
    failed, seen = threading.Event(), []
    draw = Pipeline.draw

    def short(pipe: Pipeline, requests: Any, **options: Any) -> Any:
        (seed,) = requests[0].seeds
        seen.append((seed, engine._decoder.is_free))
        if seed == 1:
            assert failed.wait(60)
            engine._decoder.wait()
            decoding.may_end.clear()
        if seed == 0 and not engine._decoder.is_free:
            decoding.may_end.set()
            raise CapacityError("memory is short")
        return draw(pipe, requests, **options)

    def fail() -> CapacityError:
        failed.set()
        return CapacityError("memory is short")

    monkeypatch.setattr(Pipeline, "draw", short)
    monkeypatch.setattr(decoding, "failures", Failures(fail))
    heard = submitted(engine, gate)
    for listener in heard:
        listener.result()
    assert [seed for seed, _ in seen] == [0, 1, 0, 0, 2]
    assert [is_free for seed, is_free in seen if seed == 0] == [True, False, True]
    assert decoding.threads[:3] == ["limner-decode", "limner-decode", "limner-engine"]
    assert engine.stats().failed == 0


def test_halves_are_not_drawn_beside_each_other(
    engine: Engine, gate: Gate, decoding: Decoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, decode = Pipeline.draw, engine.pipe.autoencoder.decode

    def short(pipe: Pipeline, requests: Any, **options: Any) -> Any:
        if len(requests) > 1 or not engine._decoder.is_free:
            raise CapacityError("memory is short")
        return draw(pipe, requests, **options)

    def slow(latents: torch.Tensor) -> torch.Tensor:
        time.sleep(0.3 if threading.current_thread().name == "limner-decode" else 0)
        return decode(latents)

    monkeypatch.setattr(Pipeline, "draw", short)
    monkeypatch.setattr(engine.pipe.autoencoder, "decode", slow)
    gate.shut()
    heard = [Heard() for _ in range(4)]
    for i, number in enumerate((0, 1, 1, 2)):
        width, height = SIZES[number]
        request = EditRequest(prompt="a dog", seeds=(i,), width=width, height=height, num_inference_steps=2)
        engine.submit(request, id=f"job{i}", listener=heard[i])
        assert gate.entered.wait(60)
    gate.open()
    for listener in heard:
        listener.result()


def test_the_thread_does_not_keep_the_process(engine: Engine, gate: Gate, decoding: Decoding) -> None:
    for listener in submitted(engine, gate):
        listener.result()
    assert [thread.daemon for thread in threading.enumerate() if thread.name == "limner-decode"] == [True]


def test_without_a_thread_it_decodes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    decoder, done = Decoder(), []
    decoder.start(lambda: done.append(1), num_bytes=1)
    assert done == [1]
    assert decoder.is_free
    decoder.close()
