"""A process that is killed at any moment while it writes results, ends jobs and cleans leaves a store that is whole."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

from tests.support.jobs import files, inputs, job, reference

from limner.server.jobs.storage import StorageInUse
from limner.server.jobs.store import JobStore

KILLS = int(os.environ.get("LIMNER_KILLS", "50"))
REFERENCES = [reference(seed) for seed in range(3)]


def work(data: str, told: int) -> None:
    """Live the life of many jobs, and tell each promise that was made."""
    store = JobStore(data)
    left = store.pending()
    for number in range(10**6):
        one, _ = (left.pop(), False) if left else store.add(job(REFERENCES[number % 3]), [REFERENCES[number % 3]])
        os.write(told, f"accepted {one.id}\n".encode())
        if number % 5 == 4:
            store.end(one.id, "content_moderated", result={}, keep_seconds=60)
            os.write(told, f"ended {one.id}\n".encode())
            continue
        names = store.write_results(one.id, [b"1" * 50_000, b"2" * 50_000], suffix="png")
        keep = 0.0 if number % 3 == 2 else 60.0
        store.end(one.id, "ready", result={"files": names}, keep_seconds=keep)
        if keep:
            os.write(told, f"ready {one.id}\n".encode())
        store.clean(forget_seconds=0.01 if number % 2 else 60, grace_seconds=0)


def killed(data: str, seconds: float) -> list[str]:
    """What a process told until it was killed so many seconds after its first job."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work(data, writing)
        os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as told:
        first = told.readline()
        assert first, "it did not begin"
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        return [line.strip() for line in (first + told.read()).splitlines() if line]


def reopened(data: str) -> JobStore:
    while True:
        try:
            return JobStore(data)
        except StorageInUse:  # a database notices the end of a session a little later
            time.sleep(0.01)


def test_kills_while_results_are_written_and_cleaned(data: str) -> None:
    rng = random.Random(0)
    for _ in range(KILLS):
        promises = killed(data, rng.uniform(0, 0.04))
        store = reopened(data)
        try:
            for line in promises:
                kind, id_ = line.split()
                found = store.get(id_)
                if kind == "ready":  # kept, and its pictures are whole
                    assert found is not None
                    assert [store.read_result(found, n) for n in (1, 2)] == [b"1" * 50_000, b"2" * 50_000]
                elif kind == "ended":
                    assert found is not None
                    assert found.status == "content_moderated"
                else:  # forgotten only once it ended
                    assert found is not None or line.replace("accepted", "ready") not in promises
            for one in store.pending():  # can be drawn again
                for report in one.references:
                    assert store.picture(report).computed_digest() == report.digest
            store.clean(forget_seconds=60, grace_seconds=0)
            known = {one.id for status in ("pending", "ready") for one in _jobs(store, status)}
            assert {name.rpartition("-")[0] for name in files(store, "results")} <= known
            used = {row[0] for row in store._storage.rows("SELECT DISTINCT digest FROM uses")}
            assert inputs(store) == used
            counted = store.spent("anna")
            assert counted >= 2 * len(known)
        finally:
            store.close()
        if not data.startswith("postgresql"):
            assert not [path for path in Path(data).rglob(".limner-*") if path.stat().st_size > 50_000]


def _jobs(store: JobStore, status: str) -> list[object]:
    rows = store._storage.rows("SELECT id FROM jobs WHERE status = ?", (status,))
    return [store.get(id_) for (id_,) in rows]
