"""The engine: order, batches, cancellation, deadlines, failures; on the tiny pipeline."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tests.support.engines import Heard, same
from tests.support.tiny import Gate, generators, picture

from limner import Cancelled, CapacityError, InvalidRequest, Pipeline
from limner.config import ReferencePolicy
from limner.engine import EditRequest, Engine, Event, Failed, Finished, Prefilled, PrefillRequest, Progress, Started
from limner.errors import DeadlineExceeded, QueueFull
from limner.images import PreparedReference, prepare_reference
from limner.pipeline.prefill import Prefiller


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Shut, so that a test fills the queue first."""
    gate = Gate(monkeypatch)
    gate.shut()
    return gate


@pytest.fixture
def engine(pipe: Pipeline) -> Iterator[Engine]:
    engine = Engine(pipe, max_waiting=8, max_batch=4)
    yield engine
    engine.close()


_ids = itertools.count()


def reference(seed: int = 0) -> PreparedReference:
    return prepare_reference(picture(64, 64, seed=seed), policy=ReferencePolicy())


def request(
    prompt: str = "a dog", *seeds: int, references: tuple[PreparedReference, ...] = (), **more: Any
) -> EditRequest:
    size = {} if references else {"width": 64, "height": 64}
    return EditRequest(prompt=prompt, seeds=seeds or (0,), references=references, **{**size, **more})


def submit(engine: Engine, what: EditRequest, **more: Any) -> Heard:
    heard = Heard()
    engine.submit(what, id=more.pop("id", f"job{next(_ids)}"), listener=heard, **more)
    return heard


def hold(engine: Engine, gate: Gate) -> Heard:
    """A request of its own kind that is on the device until the gate opens."""
    first = submit(engine, request("first", num_inference_steps=1))
    assert gate.entered.wait(60)
    return first


def test_pictures_are_those_of_the_pipeline(engine: Engine, pipe: Pipeline) -> None:
    refs = (reference(1), reference(2))
    heard = submit(engine, request("a dog", 5, 6, references=refs))
    result = heard.result()
    alone = pipe("a dog", image=list(refs), num_images_per_prompt=2, generator=generators(5, 6))
    assert [np.array_equal(a, b) for a, b in zip(result.images, alone.images, strict=True)] == [True, True]
    assert (result.seeds, result.reference_cache, result.seconds_saved, result.batch) == ((5, 6), "miss", 0.0, 2)
    assert result.reference_key == pipe.prefill(list(refs)).key
    again = submit(engine, request("a cat", references=refs)).result()
    assert (again.reference_cache, again.reference_key) == ("memory", result.reference_key)
    assert again.seconds_saved > 0
    assert [type(event) for event in heard.events] == [Started, *[Progress] * 4, Finished]
    assert [event.step for event in heard.events if isinstance(event, Progress)] == [1, 2, 3, 4]


def test_equal_references_and_sizes_run_together(engine: Engine, pipe: Pipeline, gate: Gate) -> None:
    first = hold(engine, gate)
    refs, other = (reference(1),), (reference(2),)
    heard = {
        "one": submit(engine, request("one", 1, references=refs), owner="a"),
        "two": submit(engine, request("two", 2, references=other), owner="b"),
        "three": submit(engine, request("three", 3, 4, references=refs), owner="b"),
        "four": submit(engine, request("four", 5, references=refs, width=128, height=64), owner="c"),
        "five": submit(engine, request("five", 6, 7, references=refs), owner="c"),
    }
    gate.open()
    results = {name: listener.result() for name, listener in heard.items()}
    first.result()
    assert ["one", "three", "three"] in gate.calls  # five would be a fifth and sixth image, four has another size
    assert results["one"].batch == results["three"].batch == 3
    for name, seeds in (("one", (1,)), ("three", (3, 4)), ("five", (6, 7))):
        alone = pipe([name], image=list(refs), num_images_per_prompt=len(seeds), generator=generators(*seeds))
        assert all(same(a, b) for a, b in zip(results[name].images, alone.images, strict=True))
    assert engine.stats().prefills == 2
    assert engine.stats().batch_sizes == {1: 3, 3: 1, 2: 1}


def test_priority_then_the_owner_served_less(engine: Engine, gate: Gate) -> None:
    first = hold(engine, gate)
    refs = [(reference(i),) for i in range(6)]  # nothing runs together
    waiting = [
        submit(engine, request("a1", references=refs[0]), owner="a"),
        submit(engine, request("a2", references=refs[1]), owner="a"),
        submit(engine, request("a3", references=refs[2]), owner="a"),
        submit(engine, request("b1", references=refs[3]), owner="b"),
        submit(engine, request("b2", references=refs[4]), owner="b"),
        submit(engine, request("urgent", references=refs[5]), owner="a", priority=1),
    ]
    gate.open()
    for heard in (first, *waiting):
        heard.result()
    assert [prompts[0] for prompts in gate.calls] == ["first", "urgent", "b1", "b2", "a1", "a2", "a3"] or [
        prompts[0] for prompts in gate.calls
    ] == ["first", "urgent", "b1", "a1", "b2", "a2", "a3"]


def test_cancelled_requests_leave_the_queue_and_the_batch(engine: Engine, pipe: Pipeline, gate: Gate) -> None:
    first = hold(engine, gate)
    refs = (reference(),)
    waits = submit(engine, request("waits", references=(reference(9),)), id="waits")
    assert engine.position("waits") == 0
    assert engine.cancel("waits")
    assert isinstance(waits.error(), Cancelled)
    assert not engine.cancel("waits")
    assert not engine.cancel("nobody")

    stayed = submit(engine, request("stayed", 1, references=refs), id="stayed")
    left = Heard()

    def leave(event: Event) -> None:
        left(event)
        if isinstance(event, Progress) and event.step == 1:
            assert engine.cancel("left")

    engine.submit(request("left", 2, 3, references=refs), id="left", listener=leave)
    gate.open()
    first.result()
    assert isinstance(left.error(), Cancelled)
    assert [e.step for e in left.events if isinstance(e, Progress)] == [1]  # within one step
    alone = pipe("stayed", image=list(refs), generator=generators(1))
    assert same(stayed.result().images[0], alone.images[0])
    assert stayed.result().batch == 1
    assert engine.stats().cancelled == 2


def test_a_long_request_lets_short_ones_of_others_through(engine: Engine, pipe: Pipeline) -> None:
    refs = (reference(),)
    short: list[Heard] = []
    long, told = Heard(), []

    def listen(event: Event) -> None:
        long(event)
        told.append(sum(isinstance(one.events[-1], Finished) for one in short if one.events))
        if isinstance(event, Progress) and event.step == 1:
            short.append(submit(engine, request("short", 2), owner="b"))
            short.append(submit(engine, request("mine", 2), owner="a"))

    engine.submit(request("long", 1, references=refs, num_inference_steps=30), id="long", listener=listen, owner="a")
    result = long.result()
    assert told[2] == 1  # by its second step
    assert told[-1] == 1  # one's own waits
    assert short[1].result().waited >= short[0].result().waited
    steps = [event.step for event in long.events if isinstance(event, Progress)]
    assert steps == list(range(1, 31))
    assert result.ran + result.waited >= result.timings.total
    alone = pipe("long", image=list(refs), num_inference_steps=30, generator=generators(1))
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(alone.images[0]))
    alone = pipe("short", width=64, height=64, generator=generators(2))
    assert same(short[0].result().images[0], alone.images[0])
    assert engine._runs == []


def test_what_has_no_memory_beside_others_waits_for_their_end(
    engine: Engine, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, drawn = pipe.draw, []

    def refuse_beside(requests: Any, **more: Any) -> Any:
        drawn.append(requests[0].prompt)
        if len(engine._runs) > 1:
            raise CapacityError("memory is short")
        return draw(requests, **more)

    monkeypatch.setattr(pipe, "draw", refuse_beside)
    long, short, before = Heard(), [], []

    def listen(event: Event) -> None:
        long(event)
        if isinstance(event, Progress) and event.step == 1:
            before.append(engine.stats().waited_seconds)
            short.extend(submit(engine, request("short", i), owner=owner) for i, owner in enumerate("bc"))

    engine.submit(request("long", 1, num_inference_steps=12), id="long", listener=listen, owner="a")
    long.result()
    for heard in short:
        assert len(heard.result().images) == 1
    assert drawn[:2] == ["long", "short"]
    assert len(drawn) <= 4  # one attempt beside the other, then both once it has ended, together or not
    starts = sorted(sum(isinstance(event, Started) for event in heard.events) for heard in short)
    assert starts == [1, 2]
    waited = sum(heard.result().waited for heard in short)
    assert engine.stats().waited_seconds - before[0] == pytest.approx(waited, abs=1e-9)  # each counts once


def test_halves_of_a_batch_count_their_wait_once(
    engine: Engine, pipe: Pipeline, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = pipe.draw

    def refuse_two(requests: Any, **more: Any) -> Any:
        if len(requests) > 1:
            raise CapacityError("memory is short")
        return draw(requests, **more)

    monkeypatch.setattr(pipe, "draw", refuse_two)
    heard = [hold(engine, gate), *(submit(engine, request("half", i)) for i in range(2))]
    gate.open()
    waited = sum(one.result().waited for one in heard)
    assert [sum(isinstance(event, Started) for event in one.events) for one in heard] == [1, 2, 2]
    assert engine.stats().waited_seconds == pytest.approx(waited, abs=1e-9)


def test_a_lone_cancelled_request_frees_the_device(engine: Engine) -> None:
    steps = []

    def stop(event: Event) -> None:
        if isinstance(event, Progress):
            steps.append(event.step)
            engine.cancel("lone")

    engine.submit(request(num_inference_steps=50), id="lone", listener=stop)
    submit(engine, request()).result()
    assert steps == [1]


def test_deadlines(pipe: Pipeline, gate: Gate) -> None:
    now = [0.0]
    engine = Engine(pipe, clock=lambda: now[0])
    first = hold(engine, gate)
    waits = submit(engine, request(), timeout=5)
    in_time = submit(engine, request(num_inference_steps=2), timeout=20)
    late = Heard()

    def listener(event: Event) -> None:
        late(event)
        if isinstance(event, Progress) and event.step == 2:
            now[0] = 30

    engine.submit(request(num_inference_steps=9), id="late", listener=listener, timeout=20)
    now[0] = 10
    gate.open()
    first.result()
    assert isinstance(waits.error(), DeadlineExceeded)
    assert [type(event) for event in waits.events] == [Failed]
    in_time.result()
    assert isinstance(late.error(), DeadlineExceeded)
    assert max(e.step for e in late.events if isinstance(e, Progress)) == 2
    engine.close()


def test_one_failure_takes_no_other_with_it(
    engine: Engine, gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = hold(engine, gate)
    held = Pipeline.__call__

    def break_one(own: Pipeline, prompt: Any, **options: Any) -> Any:
        if "bad" in prompt:
            raise RuntimeError("broken")
        return held(own, prompt, **options)

    monkeypatch.setattr(Pipeline, "__call__", break_one)
    good, bad = submit(engine, request("good")), submit(engine, request("bad"))
    gate.open()
    first.result()
    with caplog.at_level(logging.ERROR, "limner"):
        assert good.result().batch == 1
        assert str(bad.error()) == "broken"
    assert "failed" in caplog.text
    submit(engine, request("next")).result()
    assert engine.is_alive


@pytest.mark.parametrize("fails", [False, True], ids=["cancelled", "fails"])
def test_who_waits_for_a_prefill_that_is_broken_off_gets_one(
    engine: Engine, pipe: Pipeline, gate: Gate, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """One request of a batch is cancelled, or memory runs out once, in the middle of the prefill they share."""
    first = hold(engine, gate)
    refs = (reference(7),)
    compute, calls = Prefiller._compute, []

    def broken_off(own: Prefiller, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            assert engine.cancel("left")
            if fails:
                raise RuntimeError("out of luck")
        return compute(own, *args, **options)

    monkeypatch.setattr(Prefiller, "_compute", broken_off)
    left = submit(engine, request("left", 1, references=refs), id="left")
    stayed = submit(engine, request("stayed", 2, references=refs), owner="b")
    later = submit(engine, request("later", 3, references=refs, num_inference_steps=2), owner="c")
    gate.open()
    first.result()
    assert isinstance(left.error(), Cancelled)
    alone = pipe("stayed", image=list(refs), generator=generators(2))
    assert same(stayed.result().images[0], alone.images[0])
    assert later.result().images
    assert len(calls) == 1 + fails
    assert engine.is_alive


def test_listeners_that_raise_stop_nothing(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: Event) -> None:
        raise ValueError("deaf")

    engine.submit(request(), id="broken", listener=broken)
    submit(engine, request()).result()
    assert "the listener of request broken failed" in caplog.text


def test_prefills_alone(engine: Engine, pipe: Pipeline) -> None:
    heard = Heard()
    engine.submit(PrefillRequest(references=(reference(3),)), id="prefill", listener=heard)
    end = heard.end()
    assert isinstance(end, Prefilled)
    assert end.source == "miss"
    assert submit(engine, request(references=(reference(3),))).result().reference_cache == "memory"
    assert engine.stats().prefills == 1


def test_refusals(engine: Engine, pipe: Pipeline, gate: Gate) -> None:
    for bad, field in (
        (request(" "), "prompt"),
        (request("a", *range(5)), "num_images"),
        (request("a", width=65), "width"),
        (request("a", num_inference_steps=0), "num_inference_steps"),
        (EditRequest(prompt="a", seeds=()), "seeds"),
    ):
        with pytest.raises(InvalidRequest, match=field):
            submit(engine, bad)
    small = Engine(pipe, memory_bytes=1000)
    with pytest.raises(CapacityError, match=r"need .* GiB, 0.00 GiB are free"):
        submit(small, request())
    small.close()
    hold(engine, gate)
    for _ in range(8):
        submit(engine, request())
    with pytest.raises(QueueFull, match="8 requests wait"):
        submit(engine, request())
    submit(engine, request(), accepted=True)
    submit(engine, request(), id="twice", accepted=True)
    with pytest.raises(InvalidRequest, match="in the queue already"):
        submit(engine, request(), id="twice", accepted=True)
    gate.open()


def test_close_hands_back_what_is_left(pipe: Pipeline, gate: Gate) -> None:
    engine = Engine(pipe)
    first = submit(engine, request("first"), id="first")
    assert gate.entered.wait(60)
    waits = submit(engine, request("waits"), id="waits")
    threading.Timer(0.2, gate.open).start()
    assert engine.close(timeout=0.01) == ["first", "waits"]
    assert not any(isinstance(e, (Finished, Failed)) for e in (*first.events, *waits.events))
    with pytest.raises(QueueFull, match="shutting down"):
        submit(engine, request())
    assert not engine.is_alive


def test_close_finishes_what_it_has_time_for(pipe: Pipeline) -> None:
    engine = Engine(pipe)
    heard = [submit(engine, request(f"{i}")) for i in range(3)]
    assert engine.close(timeout=60) == []
    assert [listener.result().batch >= 1 for listener in heard] == [True] * 3
