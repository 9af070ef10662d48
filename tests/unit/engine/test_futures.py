"""Requests as futures: results, errors, and taking them back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.tiny import picture

from limner import EditRequest, Engine, InvalidRequest, Pipeline, ReferencePolicy
from limner.engine import future_of
from limner.images import prepare_references


@pytest.fixture
def engine(pipe: Pipeline) -> Iterator[Engine]:
    engine = Engine(pipe, memory_bytes=1 << 30)
    yield engine
    engine.close()


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


def test_a_future_is_taken_back(engine: Engine) -> None:
    first, second = future_of(engine, request(1)), future_of(engine, request(2), priority=9)
    cancelled = second.cancel()
    assert first.result(60).seeds == (1,)
    assert second.cancelled() == cancelled
