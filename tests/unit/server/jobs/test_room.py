"""What a job store has room for: jobs that are forgotten, and the oldest beyond a number of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from tests.support.jobs import Clock, files, inputs, job, reference

from limner.images import PreparedReference
from limner.server.jobs.records import Handle, Job, Webhook
from limner.server.jobs.store import JobStore


def ended(store: JobStore, *pictures: PreparedReference, size: int = 100, **values: Any) -> Job:
    """A ready job with two results of so many bytes."""
    kept, _ = store.add(job(*pictures, **values), pictures)
    names = store.write_results(kept.id, [bytes(size), bytes(size)], suffix="png")
    done = store.end(kept.id, "ready", result={"files": names}, keep_seconds=1e6)
    assert done is not None
    return done


def test_a_job_is_forgotten_with_what_only_it_needs(store: JobStore) -> None:
    own, shared = reference(1), reference(2)
    first, second = ended(store, own, shared), ended(store, shared)
    pending, _ = store.add(job(own), [own])
    assert store.forget(first.id)
    assert store.get(first.id) is None
    assert inputs(store) == {own.report.digest, shared.report.digest}
    assert {name.rpartition("-")[0] for name in files(store, "results")} == {second.id}
    assert not store.forget(first.id)
    assert not store.forget(pending.id)
    assert store.get(pending.id) is not None
    assert store.spent("anna") == 6  # what was drawn was drawn


def test_all_ended_jobs_of_one_owner_are_forgotten(store: JobStore) -> None:
    mine = [ended(store) for _ in range(3)]
    others, (pending, _) = ended(store, owner="bob"), store.add(job())
    assert store.forget_all("anna") == 3
    assert [store.get(one.id) for one in mine] == [None] * 3
    assert store.get(others.id) is not None
    assert store.get(pending.id) is not None
    assert store.forget_all("anna") == 0


def test_a_webhook_is_still_delivered(store: JobStore) -> None:
    own, shared = reference(1), reference(2)
    done, other = ended(store, own, shared, webhook=Webhook(url="u")), ended(store, shared)
    assert store.forget(done.id)
    assert {name.rpartition("-")[0] for name in files(store, "results")} == {other.id}
    assert inputs(store) == {shared.report.digest}
    assert [one.id for one in store.of_owner("anna")] == [other.id]
    assert store.get(done.id) is None
    assert not store.forget(done.id)
    assert store.forget_all("anna") == 1  # the other one
    assert inputs(store) == set()
    assert [one.id for one in store.due_webhooks()] == [done.id]
    store.webhook_attempted(done.id, again=None)
    assert store.counts() == {"ready": 1}
    store.clean(forget_seconds=0)
    assert store.counts() == {}


def test_the_key_of_a_removed_job_is_free(store: JobStore) -> None:
    first = ended(store, idempotency="k", webhook=Webhook(url="u"))
    assert store.add(job(idempotency="k", webhook=Webhook(url="u")))[0].id == first.id
    assert store.forget(first.id)
    second, is_new = store.add(job(idempotency="k", prompt="another"))
    assert is_new
    assert store.add(job(idempotency="k", prompt="another")) == (second, False)
    assert [one.id for one in store.due_webhooks()] == [first.id]


def test_what_a_failed_job_wrote_goes_with_it(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ended(store)
    for status, output_format, suffix in (("error", "jpeg", "jpg"), ("cancelled", "png", "png")):
        failed, _ = store.add(job(output_format=output_format))
        store.write_results(failed.id, [b"1", b"2"], suffix=suffix)
        store.write_results(failed.id, [b"1", b"2"], suffix="png", kind="map")
        store.end(failed.id, status, result={"error": "so"}, keep_seconds=1e6)  # type: ignore[arg-type]
        with monkeypatch.context() as patch:
            patch.setattr(store._storage, "files", None)
            assert store.forget(failed.id)
        assert {name.rpartition("-")[0] for name in files(store, "results")} == {other.id}


def test_the_files_of_a_job_are_those_of_its_row(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """To list all results for each job that goes took longer the more there were."""
    jobs = [ended(store) for _ in range(3)]
    odd, _ = store.add(job())
    names = store.write_results(odd.id, [b"x"], suffix="png")
    others = sorted(files(store, "results") - set(names))[:1]
    store.end(odd.id, "ready", result={"files": [*names, *others, 7]}, keep_seconds=1e6)
    monkeypatch.setattr(store._storage, "files", None)
    assert store.forget(odd.id)
    assert store.forget(jobs[0].id)
    monkeypatch.undo()
    assert {name.rpartition("-")[0] for name in files(store, "results")} == {jobs[1].id, jobs[2].id}


def test_the_oldest_jobs_go_when_there_is_no_room(store: JobStore, clock: Clock) -> None:
    kept, used = reference(1), reference(2)
    store.add_handle(Handle(owner="anna", key="k", references=(kept.report,), num_tokens=1), [kept], max_handles=9)
    jobs = []
    for number in range(5):
        clock.now = 1000.0 + number
        jobs.append(ended(store, *([used] if number == 0 else [kept])))
    clock.now += 61
    picture = next(size for name, _, size in store._storage.files("inputs") if name.startswith(used.report.digest))
    assert store.trim(5 * 200 + picture) == 0  # what has a handle does not count
    assert store.trim(4 * 200) == 1  # with the picture that only the oldest used
    assert store.trim(3 * 200 - 1) == 2
    assert [store.get(one.id) is None for one in jobs] == [True, True, True, False, False]
    assert inputs(store) == {kept.report.digest}
    clock.now -= 61
    assert store.trim(0) == 0  # who asked for them may be fetching them
    clock.now += 61
    assert store.trim(0) == 2
    assert inputs(store) == {kept.report.digest}  # it has a handle
    assert store.trim(0) == 0


def test_what_is_removed_already_makes_no_room(store: JobStore, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room was looked for without an end: the row of a removed job was found again and again."""
    told, young = ended(store, webhook=Webhook(url="u")), []
    assert store.forget(told.id)
    store.webhook_attempted(told.id, again=None)
    clock.now += 61
    young.append(ended(store))
    forget, rounds = store._room._forget, []

    def bounded(ids: Sequence[str]) -> tuple[int, list[str]]:
        rounds.append(ids)
        assert len(rounds) < 9, "it does not end"
        return forget(ids)

    monkeypatch.setattr(store._room, "_forget", bounded)
    assert store.trim(0) == 0
    assert rounds == []
    clock.now += 61
    assert store.trim(0) == 1
    assert store.get(young[0].id) is None


def test_jobs_that_another_call_removes_meanwhile_end_the_search(
    store: JobStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [ended(store) for _ in range(2)]
    clock.now += 61
    tried: list[str] = []

    def gone(ids: Sequence[str]) -> tuple[int, list[str]]:
        tried.extend(ids)
        assert len(tried) < 9, "it does not end"
        return 0, []

    monkeypatch.setattr(store._room, "_forget", gone)
    assert store.trim(0) == 0
    assert sorted(tried) == sorted(one.id for one in jobs)


def test_jobs_before_a_time_are_listed(store: JobStore, clock: Clock) -> None:
    found = []
    for clock.now in (1.25, 2.5, 3.75):
        found.append(store.add(job())[0])
    assert [one.created for one in store.of_owner("anna")] == [3.75, 2.5, 1.25]
    assert store.of_owner("anna", before=3.75, limit=1) == [found[1]]
    assert store.of_owner("anna", before=1.25) == []
