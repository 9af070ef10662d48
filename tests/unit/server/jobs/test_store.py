"""The store of jobs: written before it is answered, ended once, nothing left of what is refused."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.support.jobs import POLICY, Clock, files, inputs, job, reference
from tests.support.tiny import picture

from limner.errors import BudgetSpent, Conflict, InvalidRequest, OutputError
from limner.images import PreparedReference, mask_of_picture, picture_of_mask, prepare_canvas
from limner.server.jobs.records import Handle, JobOptions, JobPictures, Webhook, edit_request
from limner.server.jobs.storage import StorageInUse
from limner.server.jobs.store import JobStore


def test_a_job_is_kept_as_it_was_asked_for(store: JobStore, clock: Clock) -> None:
    first, second = reference(1), reference(2, width=80)
    asked = job(
        first,
        second,
        first,
        prompt="é\ud800\0",
        width=64,
        num_inference_steps=9,
        priority=-1,
        timeout=2.5,
        tolerance=1,
        output_format="jpeg",
        quality=3,
        options=JobOptions(base_url="a", handle="h", references_checked=True),
        webhook=Webhook(url="u", secret="s"),
        idempotency="k",
    )
    kept, new = store.add(asked, [first, second, first])
    assert new
    assert kept == replace(asked, created=1000.0)
    assert store.get(kept.id) == kept
    assert store.get(kept.id, owner="bob") is None
    assert store.get("other") is None
    assert store.get("\0") is None
    assert store.pending() == [kept]
    assert store.counts() == {"pending": 1}
    assert inputs(store) == {first.report.digest, second.report.digest}


def test_another_process_finds_everything(store: JobStore, data: str, clock: Clock) -> None:
    used = reference(1)
    kept, _ = store.add(job(used, idempotency="k"), [used])
    secret = store.secret
    with pytest.raises(StorageInUse, match="used by another server"):
        JobStore(data)
    store.close()
    store.close()
    after = JobStore(data, clock=clock)
    assert after.get(kept.id) == kept
    assert after.secret == secret
    read = after.picture(used.report)
    assert (read.data, read.report) == (used.data, used.report)
    assert after.add(job(used, idempotency="k"), [used]) == (kept, False)
    after.close()


def test_an_idempotency_key_is_one_job_of_one_owner(store: JobStore) -> None:
    first, second = reference(1), reference(2)
    kept, _ = store.add(job(first, idempotency="k", options=JobOptions(base_url="a")), [first])
    assert store.add(job(first, idempotency="k", options=JobOptions(base_url="b")), [first]) == (kept, False)
    changes: list[dict[str, Any]] = [
        {"prompt": "b"},
        {"seeds": (1,)},
        {"seeds": (2, 3)},
        {"width": 64},
        {"num_inference_steps": 5},
        {"priority": -1},
        {"timeout": 1.0},
        {"tolerance": 3},
        {"output_format": "webp"},
        {"quality": 9},
        {"webhook": Webhook(url="u")},
        {"drawn_seeds": True},
    ]
    for change in changes:
        with pytest.raises(Conflict, match="'k' was used for another request"):
            store.add(job(first, idempotency="k", **change), [first])
    with pytest.raises(Conflict):
        store.add(job(second, idempotency="k"), [second])
    assert inputs(store) == {first.report.digest}
    assert store.add(job(first, idempotency="k", owner="bob"), [first])[1]
    drawn = job(seeds=(5, 6), drawn_seeds=True, idempotency="d")
    assert store.add(drawn)[1]
    assert store.add(replace(drawn, seeds=(7, 8)))[0].seeds == (5, 6)
    with pytest.raises(Conflict):
        store.add(replace(drawn, seeds=(7,)))


def test_a_job_ends_once(store: JobStore, clock: Clock) -> None:
    kept, _ = store.add(job(webhook=Webhook(url="u")))
    names = store.write_results(kept.id, [b"one", b"two"], suffix="png")
    clock.now = 1010.0
    ended = store.end(kept.id, "ready", result={"files": names}, keep_seconds=60)
    assert ended is not None
    assert (ended.status, ended.ended, ended.expires) == ("ready", 1010.0, 1070.0)
    assert store.end(kept.id, "error", result={"error": "x"}, keep_seconds=60) is None
    assert store.end("other", "error", result={}, keep_seconds=60) is None
    assert store.get(kept.id) == ended
    assert [store.read_result(ended, number) for number in (0, 1, 2, 3)] == [None, b"one", b"two", None]
    clock.now = 1070.0
    assert store.read_result(ended, 1) is None
    assert store.pending() == []


def test_a_budget_counts_what_is_ready_or_on_its_way(store: JobStore) -> None:
    first, _ = store.add(job(), budget=4)
    store.add(job(), budget=4)
    own = reference(1)
    with pytest.raises(BudgetSpent, match="4 of 4 images are used"):
        store.add(job(own, seeds=(1,)), [own], budget=4)
    assert inputs(store) == set()
    store.add(job(owner="bob"), budget=4)
    store.end(first.id, "cancelled", result={}, keep_seconds=0)
    store.end(first.id, "cancelled", result={}, keep_seconds=0)
    assert store.spent("anna") == 2
    second, _ = store.add(job(), budget=4)
    store.end(second.id, "ready", result={}, keep_seconds=0)
    store.clean(forget_seconds=-1)
    assert store.get(second.id) is None
    assert store.spent("anna") == 4
    assert store.add(job(), budget=None)[1]


def test_handles(store: JobStore, clock: Clock) -> None:
    first, second = reference(1), reference(2)
    hers = Handle(owner="anna", key="k", references=(first.report, second.report), num_tokens=3, tolerance=2)
    kept = store.add_handle(hers, [first, second], max_handles=1)
    assert kept == replace(hers, created=1000.0)
    clock.now = 1001.0
    changed = replace(hers, num_tokens=4, nbytes=5, prefill_seconds=0.5)
    assert store.add_handle(changed, [first, second], max_handles=1) == replace(changed, created=1000.0)
    with pytest.raises(InvalidRequest, match="1 are kept for you"):
        store.add_handle(replace(hers, key="l"), [first, second], max_handles=1)
    store.add_handle(replace(hers, owner="bob"), [first, second], max_handles=1)
    assert store.handle("carl", "k") is None
    assert not store.remove_handle("anna", "k")  # he has it
    assert (store.handle("anna", "k"), store.handles("bob")[0].key) == (None, "k")
    assert inputs(store) == {first.report.digest, second.report.digest}
    running, _ = store.add(job(first), [first])
    assert store.remove_handle("bob", "k")
    assert inputs(store) == {first.report.digest}
    assert store.picture(running.references[0]).data == first.data


def test_what_is_over_goes(store: JobStore, clock: Clock) -> None:
    own = reference(1)
    kept, _ = store.add(job(own), [own])
    waiting, _ = store.add(job(webhook=Webhook(url="u")))
    for one in (kept, waiting):
        names = store.write_results(one.id, [b"x"], suffix="png")
        store.end(one.id, "ready", result={"files": names}, keep_seconds=10)
    pending, _ = store.add(job())
    store.write_results(pending.id, [b"x"], suffix="png")  # not ended yet
    store._storage.write_file("results/stray-1.png", b"x")
    store.clean(forget_seconds=100)
    assert len(files(store, "results")) == 4
    store.clean(forget_seconds=100, grace_seconds=-1)  # what no row knows, whatever its age
    assert files(store, "results") == {f"{one.id}-1.png" for one in (kept, waiting, pending)}
    clock.now += 11
    store.clean(forget_seconds=100)
    assert files(store, "results") == {f"{pending.id}-1.png"}
    assert inputs(store) == {own.report.digest}
    clock.now += 100
    store.clean(forget_seconds=100)
    assert store.get(kept.id) is None
    assert inputs(store) == set()
    assert store.get(waiting.id) is not None  # its webhook is still to be delivered
    assert store.get(pending.id) is not None
    store.webhook_attempted(waiting.id, again=None)
    store.clean(forget_seconds=100)
    assert store.get(waiting.id) is None


def test_masks_and_canvases_are_kept_and_go_with_their_job(store: JobStore, data: str, clock: Clock) -> None:
    own, canvas = reference(1), canvas_of(101)
    values = np.zeros((64, 101), np.uint8)
    values[:, :50] = 200
    mask = picture_of_mask(values)
    control = {"strength": 0.5, "expand": {"size": [128, 96], "anchor": "left"}, "reference_weights": [1.0, 0.5]}
    asked = job(own, canvas=canvas.report, mask=mask.report, control=control, idempotency="k")
    kept, _ = store.add(asked, JobPictures(references=(own,), canvas=canvas, mask=mask).all)
    assert kept == replace(asked, created=1000.0)
    used = {own.report.digest, canvas.report.digest, mask.report.digest}
    assert inputs(store) == used
    store.close()
    after = JobStore(data, clock=clock)
    assert after.pending() == [kept]
    found = after.pictures(kept)
    assert found.canvas is not None
    assert found.mask is not None
    assert [one.data for one in found.all] == [own.data, canvas.data, mask.data]
    assert np.array_equal(mask_of_picture(found.mask), values)
    request = edit_request(kept, found)
    assert (request.control["canvas"], request.canvas) == (found.canvas, None)
    assert request.control["strength"] == 0.5
    others: list[dict[str, Any]] = [
        {"mask": picture_of_mask(255 - values).report},
        {"canvas": canvas_of(102).report},
        {"control": {**control, "strength": 0.4}},
        {"mask": None},
    ]
    for change in others:
        with pytest.raises(Conflict):
            after.add(replace(asked, **change))
    assert inputs(after) == used
    after.end(kept.id, "ready", result={}, keep_seconds=0)
    after.clean(forget_seconds=-1)
    assert inputs(after) == set()
    after.close()


def test_the_first_reference_is_repainted_where_there_is_no_canvas() -> None:
    first, second = canvas_of(101), reference(2)
    masked = job(first, second, width=101, height=64, control={"preserve": "auto"})
    request = edit_request(masked, JobPictures(references=(first, second)))
    assert (request.canvas, request.width, request.height) == (first, None, None)
    weighed = job(first, second, width=64, height=64, control={"reference_weights": [1.0, 0.0]})
    request = edit_request(weighed, JobPictures(references=(first, second)))
    assert (request.canvas, request.width, request.height) == (None, 64, 64)


def canvas_of(width: int) -> PreparedReference:
    return prepare_canvas(picture(width, 64, seed=3), policy=POLICY)


def test_webhooks_that_are_due(store: JobStore, clock: Clock) -> None:
    plain, _ = store.add(job())
    kept, _ = store.add(job(webhook=Webhook(url="u", secret="s")))
    assert store.due_webhooks() == []
    for one in (plain, kept):
        store.end(one.id, "error", result={}, keep_seconds=60)
    (due,) = store.due_webhooks()
    assert (due.id, due.webhook, due.webhook_attempts, due.webhook_first) == (kept.id, kept.webhook, 0, None)
    store.webhook_attempted(kept.id, again=1005.0)
    assert store.due_webhooks() == []
    clock.now = 1005.0
    (due,) = store.due_webhooks()
    assert (due.webhook_attempts, due.webhook_first) == (1, 1000.0)
    store.webhook_attempted(kept.id, again=None)
    assert store.due_webhooks() == []


def test_many_threads(store: JobStore) -> None:
    own = reference(1)
    made: list[bool] = []

    def work(number: int) -> None:
        for i in range(10):
            kept, new = store.add(job(own, idempotency=f"k{i}"), [own])
            made.append(new)
            store.end(kept.id, "ready", result={}, keep_seconds=60)
            store.clean(forget_seconds=100)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(made) == 10
    assert store.counts() == {"ready": 10}
    assert store.spent("anna") == 20
    assert inputs(store) == {own.report.digest}


def test_newest_first(store: JobStore, clock: Clock) -> None:
    ids = []
    for _ in range(3):
        clock.now += 1
        ids.append(store.add(job())[0].id)
    store.add(job(owner="bob"))
    assert [one.id for one in store.of_owner("anna")] == ids[::-1]
    assert [one.id for one in store.of_owner("anna", limit=1)] == ids[-1:]


def test_the_database_refuses_what_is_not_of_its_kind(store: JobStore) -> None:
    with pytest.raises(OutputError), store._storage.transaction() as db:
        db.execute("INSERT INTO spent VALUES ('a', 'many')")
    assert store.spent("a") == 0


def test_due_webhooks_of_one_owner_do_not_crowd_out_others(
    store: JobStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limner.server.jobs.store._DUE_OF_OWNER", 3)
    monkeypatch.setattr("limner.server.jobs.store._MAX_DUE", 4)
    for owner in "aaaaabb":
        added, _ = store.add(job(owner=owner, webhook=Webhook(url="u")))
        store.end(added.id, "ready", result={}, keep_seconds=60)
        clock.now += 1
    assert [due.owner for due in store.due_webhooks()] == ["a", "b", "a", "b"]
    monkeypatch.setattr("limner.server.jobs.store._MAX_DUE", 9)
    assert [due.owner for due in store.due_webhooks()] == ["a", "b", "a", "b", "a"]
