"""A replica without Ray: requests go in as values and come out as events."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support.tiny import generators, picture

from limner import Pipeline
from limner.config import ReferencePolicy
from limner.deploy.cluster import this_node
from limner.deploy.replica import Replica
from limner.engine import EditRequest, Event, Failed, Finished, Prefilled, PrefillRequest, Progress, Started
from limner.errors import InvalidRequest
from limner.images import prepare_reference
from limner.options import ModelOptions

REFERENCES = (prepare_reference(picture(64, 64), policy=ReferencePolicy()),)
EDIT = EditRequest(prompt="a dog", seeds=(1,), references=REFERENCES)


@pytest.fixture
def replica(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Replica]:
    monkeypatch.setattr("limner.deploy.replica.log_own", lambda kind: None)  # the loggers are the tests'
    replica = Replica(
        ModelOptions(model=str(tiny_folder)),
        versions=this_node(),
        threads=torch.get_num_threads(),
        max_batch=4,
        store=None,
        store_bytes=None,
        store_memory=1 << 26,
        memory_bytes=1 << 30,
    )
    yield replica
    replica._engine.close()


def heard(replica: Replica, request: EditRequest | PrefillRequest, id: str = "a") -> list[Event]:
    async def collect() -> list[Event]:
        draw = replica.draw(request, id=id, owner="o", priority=0, timeout=None)
        return [event async for event in draw]

    events: list[Event] = asyncio.run(collect())
    assert [type(event) for event in pickle.loads(pickle.dumps(events))] == [type(event) for event in events]
    return events


def test_edits_and_prefills_are_told_apart_by_their_types(replica: Replica) -> None:
    started, prefilled = heard(replica, PrefillRequest(references=REFERENCES))
    assert isinstance(started, Started)
    assert isinstance(prefilled, Prefilled)
    assert prefilled.source == "miss"
    *_, finished = heard(replica, EDIT)
    assert isinstance(finished, Finished)
    assert (finished.result.reference_cache, finished.result.reference_key) == ("memory", prefilled.key)
    _, engine, store = replica.stats()
    assert (engine.finished, engine.prefills, store.num_entries["memory"]) == (2, 1, 1)
    assert asyncio.run(replica.forget(prefilled.key))
    assert replica.stats()[2].num_entries["memory"] == 0


def test_masks_and_what_is_said_of_them_go_through(replica: Replica) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    masked = replace(EDIT, control={"mask_image": mask, "mask_blur": 0})
    sent = pickle.loads(pickle.dumps(replica._engine.opened(masked)))
    *_, finished = pickle.loads(pickle.dumps(heard(replica, sent)))
    assert isinstance(finished, Finished)
    expected = replica._pipe("a dog", image=picture(64, 64), generator=generators(1), mask_image=mask, mask_blur=0)
    assert np.array_equal(np.asarray(finished.result.images[0]), np.asarray(expected.images[0]))
    assert finished.result.canvas == expected.canvas
    assert finished.result.metadata == expected.metadata
    assert len(finished.result.canvas) == 1
    *_, kept = pickle.loads(pickle.dumps(heard(replica, replace(EDIT, control={"preserve": "auto"}), id="b")))
    (report,) = kept.result.preserved
    assert report.picture is kept.result.images[0]  # sent once


def test_costs_for_the_router_are_of_what_was_drawn(replica: Replica) -> None:
    assert replica.record_routing_stats() == {}
    heard(replica, PrefillRequest(references=REFERENCES))
    assert replica.record_routing_stats() == {}
    heard(replica, EDIT)
    assert set(replica.record_routing_stats()) == {"service_seconds", "kv_bytes_per_token"}
    asyncio.run(replica.forget(Pipeline.key_of(replica._pipe, REFERENCES)))
    heard(replica, EDIT)
    costs = replica.record_routing_stats()
    assert set(costs) == {"service_seconds", "kv_bytes_per_token", "prefill_seconds_per_token"}
    assert all(value > 0 for value in costs.values())


def test_what_is_refused_is_an_event(replica: Replica) -> None:
    (event,) = heard(replica, EditRequest(prompt=" ", seeds=(1,)))
    assert isinstance(event, Failed)
    assert isinstance(event.error, InvalidRequest)


def test_faults_of_libraries_are_made_portable(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stubborn(Exception):
        def __reduce__(self) -> Any:
            raise TypeError("not to be pickled")

    def broken(self: Pipeline, *args: Any, **options: Any) -> Any:
        raise Stubborn("no memory on the device")

    monkeypatch.setattr(Pipeline, "__call__", broken)
    *_, event = heard(replica, EDIT)
    assert isinstance(event, Failed)
    assert repr(event.error) == "RuntimeError('Stubborn: no memory on the device')"


def test_who_stops_listening_cancels(replica: Replica) -> None:
    async def leave() -> None:
        long = EditRequest(prompt="a dog", seeds=(1,), width=64, height=64, num_inference_steps=100)
        async with aclosing(replica.draw(long, id="a", owner="o", priority=0, timeout=None)) as events:
            async for event in events:
                if isinstance(event, Progress):
                    break

    asyncio.run(leave())
    while (engine := replica.stats()[1]).running:
        pass
    assert (engine.cancelled, engine.finished) == (1, 0)


def test_health(replica: Replica) -> None:
    replica.check_health()
    replica._engine.close()
    with pytest.raises(RuntimeError, match="the engine's thread has ended"):
        replica.check_health()
