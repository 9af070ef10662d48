"""Requests as futures: results, errors, and taking them back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import wait

import pytest
from tests.support.tiny import Gate, picture

from limner import Cancelled, EditRequest, Engine, InvalidRequest, Pipeline, ReferencePolicy
from limner.engine import future_of
from limner.images import prepare_references


@pytest.fixture
def engine(pipe: Pipeline) -> Iterator[Engine]:
    engine = Engine(pipe, memory_bytes=1 << 30)
    yield engine
    engine.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate(monkeypatch)
    gate.shut()
    return gate


def request(seed: int) -> EditRequest:
    return EditRequest(
        prompt="a cat",
        seeds=(seed,),
        references=prepare_references([picture(64, 64)], policy=ReferencePolicy()),
        width=64,
        height=64,
    )


def test_results_in_any_order(engine: Engine) -> None:
    jobs = [future_of(engine, request(seed)) for seed in range(3)]
    assert [job.result(60).seeds for job in reversed(jobs)] == [(2,), (1,), (0,)]
    assert engine.stats().prefills == 1


def test_errors_are_raised(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="seeds"):
        future_of(engine, EditRequest(prompt="a", seeds=()))
    late = future_of(engine, request(1), timeout=-1)
    assert "deadline" in type(late.exception(60)).__name__.lower()


def test_a_future_that_waits_is_taken_back(engine: Engine, gate: Gate) -> None:
    first = future_of(engine, request(1))
    assert gate.entered.wait(60)
    second = future_of(engine, request(2), priority=9)
    assert second.cancel()
    assert engine.stats().waiting == 0
    gate.open()
    assert first.result(60).seeds == (1,)
    assert engine.stats().cancelled == 1
    assert wait([second], 60).done == {second}


def test_a_future_that_is_being_drawn_is_not_taken_back(engine: Engine, gate: Gate) -> None:
    first = future_of(engine, request(1))
    assert gate.entered.wait(60)
    assert (first.cancel(), first.running()) == (False, True)
    gate.open()
    assert first.result(60).seeds == (1,)
    assert engine.stats().cancelled == 0


def test_futures_end_with_their_engine(pipe: Pipeline, gate: Gate) -> None:
    engine = Engine(pipe, memory_bytes=1 << 30)
    jobs = [future_of(engine, request(1))]
    assert gate.entered.wait(60)
    jobs += [future_of(engine, request(seed)) for seed in (2, 3)]
    jobs[2].cancel()
    closing = threading.Thread(target=engine.close)
    closing.start()
    for job in jobs[:2]:  # while the first is still held
        with pytest.raises(Cancelled, match="the engine was closed"):
            job.result(60)
    assert jobs[2].cancelled()
    gate.open()
    closing.join()
