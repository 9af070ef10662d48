"""Requests to an engine that say which LoRAs act: what runs together, what a paused batch goes on with, what is refused."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tests.support.engines import Heard, same
from tests.support.tiny import Gate, generators, picture

from limner import InvalidRequest, Pipeline
from limner.config import ReferencePolicy
from limner.engine import EditRequest, EditResult, Engine, Event, ModelCard, PrefillRequest, Progress
from limner.engine.admission import Admission
from limner.images import PreparedReference, prepare_reference

_ids = itertools.count()


@pytest.fixture
def engine(styled: Pipeline) -> Iterator[Engine]:
    engine = Engine(styled, max_waiting=32, max_batch=4)
    yield engine
    engine.close()


def reference(seed: int = 0) -> PreparedReference:
    return prepare_reference(picture(64, 64, seed=seed), policy=ReferencePolicy())


def request(loras: Any, *, seed: int = 0, num_inference_steps: int = 4) -> EditRequest:
    return EditRequest(
        prompt="a dog",
        seeds=(seed,),
        references=(reference(),),
        num_inference_steps=num_inference_steps,
        control={} if loras is None else {"loras": loras},
    )


def submit(engine: Engine, what: Any, **more: Any) -> Heard:
    heard = Heard()
    engine.submit(what, id=more.pop("id", f"job{next(_ids)}"), listener=heard, **more)
    return heard


def drawn(pipe: Pipeline, seeds: list[int], *, num_inference_steps: int = 4, **options: Any) -> list[np.ndarray]:
    """What the pipeline draws of these seeds in one batch."""
    out = pipe(
        ["a dog"] * len(seeds),
        image=[reference()],
        generator=generators(*seeds),
        num_inference_steps=num_inference_steps,
        **options,
    )
    return [np.asarray(image) for image in out.images]


def applied(result: EditResult) -> list[tuple[str, float]]:
    return [(lora["name"], lora["strength"]) for lora in result.metadata.get("loras", [])]


def test_only_equal_ones_run_together_and_each_is_as_if_it_were_set(
    engine: Engine, styled: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixed queue: bit for bit the pictures of the same pipeline, set by set_adapters."""
    gate = Gate(monkeypatch)
    gate.shut()
    first = submit(engine, request(None, num_inference_steps=1))
    assert gate.entered.wait(60)
    asked: list[Any] = [
        {"a": 0.5},
        None,
        {"b": 0.5, "a": 1.0},
        {"a": 0.5},
        (),
        [("a", 1), ("b", 0.5)],
        None,
        {"a": 0.25},
    ]
    heard = [submit(engine, request(loras, seed=seed)) for seed, loras in enumerate(asked)]
    gate.open()
    results = [one.result() for one in heard]
    assert first.result().batch == 1
    assert [result.batch for result in results] == [2, 2, 2, 2, 1, 2, 2, 1]
    monkeypatch.undo()
    together = {
        (0, 3): (["a"], [0.5]),
        (1, 6): (["a"], [0.7]),
        (2, 5): (["a", "b"], [1.0, 0.5]),
        (4,): ([], []),
        (7,): (["a"], [0.25]),
    }
    for numbers, (names, strengths) in together.items():
        styled.set_adapters(names, strengths)
        expected = drawn(styled, [*numbers])
        for number, image in zip(numbers, expected, strict=True):
            assert same(results[number].images[0], image), number
            assert sorted(applied(results[number])) == sorted(zip(names, strengths, strict=True))


def test_each_has_its_own_kv_and_finds_them_again(engine: Engine) -> None:
    found = [
        submit(engine, request(loras)).result()
        for loras in ({"a": 0.5}, {"b": 0.5}, {"a": 0.5}, None, {"b": 0.5}, None)
    ]
    assert [one.reference_cache for one in found] == ["miss", "miss", "memory", "miss", "memory", "memory"]
    keys = [one.reference_key for one in found]
    assert keys[0] == keys[2] != keys[1] == keys[4] != keys[3] == keys[5] != keys[0]
    assert engine.key_of([reference()]) == keys[5]
    assert engine.stats().prefills == 3


def test_a_paused_batch_goes_on_with_its_own(engine: Engine, styled: Pipeline) -> None:
    """Between its steps others are drawn, with other LoRAs, with those that are set, and a prefill."""
    short: list[Heard] = []
    long = Heard()
    others: list[Any] = [{"b": -0.5}, None]

    def listen(event: Event) -> None:
        long(event)
        if isinstance(event, Progress) and event.step == 1:
            short.extend(submit(engine, request(loras, seed=7), owner=f"of {loras}") for loras in others)
            short.append(submit(engine, PrefillRequest(references=(reference(5),)), owner="prefill"))

    engine.submit(request({"b": 0.5}, seed=1, num_inference_steps=40), id="long", listener=listen, owner="a")
    result = long.result()
    told = [event.step for event in long.events if isinstance(event, Progress)]
    assert told == list(range(1, 41))
    assert all(one.events for one in short[:2]), "nothing was let through"
    assert result.waited > 0
    for one in short:  # the engine is idle then: of two threads none may draw with other LoRAs
        one.end()
    alone = drawn(styled, [1], num_inference_steps=40, loras={"b": 0.5})[0]
    assert np.array_equal(np.asarray(result.images[0]), alone)
    for heard, loras in zip(short, others, strict=False):
        assert same(heard.result().images[0], drawn(styled, [7], loras=loras)[0])
    key = short[2].end().key  # type: ignore[union-attr]
    assert key == engine.key_of([reference(5)])
    assert [(one.name, one.strength) for one in styled.networks.adapters.applied] == [("a", 0.7)]


def test_a_failed_request_leaves_what_is_set(engine: Engine, styled: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("broken")

    expected = drawn(styled, [3])[0]
    monkeypatch.setattr("limner.pipeline.pipeline.make_output", fail)
    assert isinstance(submit(engine, request({"b": 0.5})).error(), ValueError)
    monkeypatch.undo()
    assert np.array_equal(np.asarray(submit(engine, request(None, seed=3)).result().images[0]), expected)


@pytest.mark.parametrize("loras", [{"c": 1.0}, {"a": float("inf")}, "a", {"a": "x"}])
def test_refused_before_anything_is_queued(loras: Any, engine: Engine, styled: Pipeline) -> None:
    with pytest.raises(InvalidRequest, match="^loras: "):
        engine.check(request(loras))
    heard = Heard()
    with pytest.raises(InvalidRequest, match="^loras: "):
        engine.submit(request(loras), id="x", listener=heard)
    assert (heard.events, engine.stats().accepted) == ([], 0)
    styled.fuse_lora()
    with pytest.raises(InvalidRequest, match=r"fused .* unfuse_lora\(\) first"):
        engine.check(request({"b": 1.0}))
    engine.check(request(None))


def test_a_process_without_the_model_knows_them(styled: Pipeline) -> None:
    """A card, and a request, go to other processes as values."""
    card = pickle.loads(pickle.dumps(ModelCard.of(styled, memory_bytes=1 << 30)))
    assert [(one.name, one.strength, one.fused) for one in card.loras] == [("a", 0.7, False), ("b", 0.0, False)]
    admission = Admission(model=card, max_waiting=4, max_batch=4, memory_bytes=1 << 30)
    sent = pickle.loads(pickle.dumps(request({"b": 0.5})))
    size = admission.check(sent)
    with pytest.raises(InvalidRequest, match="'c' not loaded; loaded: a, b"):
        admission.check(request({"c": 1.0}))
    keys = [
        admission.batch_key(request(loras), size=size) for loras in ({"b": 0.5}, [("b", 0.5)], {"b": 0.25}, (), None)
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4
