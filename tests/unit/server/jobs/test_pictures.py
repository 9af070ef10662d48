"""Reference pictures of jobs: whose they are, and that nobody changed them."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from PIL import Image
from tests.support.jobs import Clock, inputs, job, reference

from limner.errors import LimnerError
from limner.images import PreparedReference
from limner.server.jobs.pictures import PictureFiles
from limner.server.jobs.records import Handle
from limner.server.jobs.store import JobStore


def test_of_a_refused_job_no_picture_stays(store: JobStore) -> None:
    shared, own = reference(1), reference(2)
    store.add(job(shared), [shared])
    for status in ("request_moderated", "content_moderated"):
        kept, _ = store.add(job(shared, own), [shared, own])
        assert inputs(store) == {shared.report.digest, own.report.digest}
        store.end(kept.id, status, result={"finding": {}}, keep_seconds=60)  # type: ignore[arg-type]
        assert inputs(store) == {shared.report.digest}
    with pytest.raises(LimnerError, match="cannot be read again"):
        store.picture(own.report)
    failed, _ = store.add(job(own), [own])
    store.end(failed.id, "error", result={}, keep_seconds=60)
    assert own.report.digest in inputs(store)


def test_a_report_belongs_to_who_uploaded(store: JobStore) -> None:
    first = reference(1)
    other = PreparedReference(data=first.data, report=replace(first.report, original_size=(99, 99), cut=(1, 2, 3, 4)))
    one, _ = store.add(job(first), [first])
    two, _ = store.add(job(other), [other])
    store.add_handle(Handle(owner="anna", key="k", references=(other.report,), num_tokens=16), [other], max_handles=9)
    assert [store.get(j.id).references[0] for j in (one, two)] == [first.report, other.report]  # type: ignore[union-attr]
    assert store.picture(other.report).report == other.report
    assert store.handle("anna", "k").references == (other.report,)  # type: ignore[union-attr]


def test_a_picture_that_was_changed_is_not_used(store: JobStore, data: str, clock: Clock) -> None:
    own = reference(1)
    store.add(job(own), [own])
    store.close()
    after = JobStore(data, clock=clock)
    name, buffer = f"inputs/{own.report.digest}.png", io.BytesIO()
    Image.frombytes("RGB", (64, 64), reference(2).data).save(buffer, "PNG")
    after._storage.write_file(name, buffer.getvalue())
    with pytest.raises(LimnerError, match="was changed"):
        after.picture(own.report)
    after._storage.write_file(name, b"x")
    with pytest.raises(LimnerError, match="cannot be read again"):
        after.picture(own.report)
    after._storage.remove_files([name])
    for read in (lambda: after.picture(own.report), lambda: after.picture_png(own.report.digest)):
        with pytest.raises(LimnerError, match="cannot be read again"):
            read()
    after.close()


def test_memory_for_pictures_is_bounded(store: JobStore) -> None:
    size = len(reference(0).data)
    pictures = store._pictures = PictureFiles(store._storage, max_cached_bytes=3 * size)
    cache = pictures._cache
    for seed in range(5):
        own = reference(seed)
        store.add(job(own), [own])
    assert (len(cache._pixels), cache.nbytes) == (3, 3 * size)
    assert store.picture(reference(0).report).data == reference(0).data
    assert cache.nbytes == 3 * size
