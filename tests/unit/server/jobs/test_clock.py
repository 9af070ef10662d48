"""A clock that is set forward or back while jobs are pending loses no job, no result and no webhook."""

from __future__ import annotations

import os
import time

import pytest
from tests.support.jobs import Clock, files, folder, job

from limner.errors import NotFound
from limner.server.http.result_urls import ResultUrls
from limner.server.jobs import runner
from limner.server.jobs.records import Webhook
from limner.server.jobs.store import JobStore

HOOK = Webhook(url="https://h/x")
DAY = 86400.0


def test_results_of_a_pending_job_stay_however_old_they_seem(on_disk: JobStore, clock: Clock) -> None:
    """Also while their end cannot be written for long, as when a database is away."""
    one, _ = on_disk.add(job())
    names = on_disk.write_results(one.id, [b"1", b"2"], suffix="png")
    for name in names:
        os.utime(folder(on_disk) / "results" / name, (0, 0))
    on_disk._storage.write_file("results/nobody-1.png", b"x")
    os.utime(folder(on_disk) / "results" / "nobody-1.png", (0, 0))
    clock.now += DAY
    on_disk.clean(forget_seconds=60)
    assert files(on_disk, "results") == set(names)
    ended = on_disk.end(one.id, "ready", result={"files": names}, keep_seconds=60)
    assert ended is not None
    assert on_disk.read_result(ended, 1) == b"1"
    clock.now += 61
    on_disk.clean(forget_seconds=60)
    assert files(on_disk, "results") == set()


@pytest.mark.parametrize("jump", [-DAY, -30.0, 30.0, DAY])
def test_jobs_end_and_are_known_after_a_jump(store: JobStore, clock: Clock, jump: float) -> None:
    clock.now = 10 * DAY
    one, _ = store.add(job(idempotency="k"))
    clock.now += jump
    again, new = store.add(job(idempotency="k"))
    assert (again.id, new) == (one.id, False)
    store.clean(forget_seconds=60, grace_seconds=0)
    assert [found.id for found in store.pending()] == [one.id]
    names = store.write_results(one.id, [b"1", b"2"], suffix="png")
    ended = store.end(one.id, "ready", result={"files": names}, keep_seconds=600)
    assert ended is not None
    assert ended.expires == clock.now + 600
    assert store.read_result(ended, 2) == b"2"


def test_webhooks_do_not_wait_for_a_clock_that_was_set_back(store: JobStore, clock: Clock) -> None:
    clock.now = 10 * DAY
    first, _ = store.add(job(webhook=HOOK))
    store.end(first.id, "ready", result={}, keep_seconds=60)
    retried, _ = store.add(job(webhook=HOOK))
    store.end(retried.id, "ready", result={}, keep_seconds=60)
    store.webhook_attempted(retried.id, again=clock.now + 30)
    assert [found.id for found in store.due_webhooks()] == [first.id]
    clock.now -= 3600
    assert [found.id for found in store.due_webhooks()] == [first.id]
    clock.now += 3600 + 31
    assert {found.id for found in store.due_webhooks()} == {first.id, retried.id}
    store.webhook_attempted(first.id, again=None)
    store.webhook_attempted(retried.id, again=None)
    assert store.due_webhooks() == []


def test_signed_urls_follow_the_clock_of_the_jobs(on_disk: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = ResultUrls(on_disk.secret)
    now = time.time()
    signature = urls._signature("a", 1, int(now) + 600)
    urls.check("a", 1, int(now) + 600, signature)
    monkeypatch.setattr(time, "time", lambda: now + 601)
    with pytest.raises(NotFound, match="this result has expired"):
        urls.check("a", 1, int(now) + 600, signature)
    monkeypatch.setattr(time, "time", lambda: now - DAY)  # back again: it is as good as before
    urls.check("a", 1, int(now) + 600, signature)


def test_the_time_of_a_job_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    one = job(created=now, timeout=10.0)
    monkeypatch.setattr(time, "time", lambda: now + 4)
    assert runner._seconds_left(one) == pytest.approx(6)
    monkeypatch.setattr(time, "time", lambda: now - DAY)
    assert runner._seconds_left(one) == 10.0
    assert runner._seconds_left(job(created=now)) is None
