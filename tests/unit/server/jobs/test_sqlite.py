"""The folder of jobs: not usable, full, damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.jobs import folder, inputs, job, reference, sqlite

from limner.errors import OutputError
from limner.server.jobs.records import Handle
from limner.server.jobs.store import JobStore


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, on_disk: JobStore) -> None:
    data = folder(on_disk)
    assert (data.stat().st_mode & 0o777, (data / "secret").stat().st_mode & 0o777) == (0o700, 0o600)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file; give another folder"):
        JobStore(tmp_path / "file")
    sqlite(on_disk).execute("PRAGMA user_version = 9")
    on_disk.close()
    with pytest.raises(OutputError, match="is of version 9"):
        JobStore(data)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "jobs.sqlite").write_bytes(b"no database" * 1000)
    for _ in range(2):  # and it holds no lock
        with pytest.raises(OutputError, match="cannot be used"):
            JobStore(broken)
    (broken / "jobs.sqlite").unlink()
    (broken / "secret").write_bytes(b"short")
    with pytest.raises(OutputError, match="the secret of .* is damaged"):
        JobStore(broken)


def test_a_disk_that_is_full_leaves_nothing_half_done(on_disk: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, _ = on_disk.add(job())
    own = reference(1)
    sqlite(on_disk).execute(f"PRAGMA max_page_count = {sqlite(on_disk).execute('PRAGMA page_count').fetchone()[0]}")
    long = "x" * 100_000
    with pytest.raises(OutputError, match="cannot be written .*full"):
        on_disk.add(job(own, prompt=long), [own])
    with pytest.raises(OutputError, match="full"):
        on_disk.add_handle(
            Handle(owner="anna", key="k" + long, references=(own.report,), num_tokens=16), [own], max_handles=9
        )
    with pytest.raises(OutputError, match="full"):
        on_disk.end(kept.id, "error", result={"error": long}, keep_seconds=1)
    assert inputs(on_disk) == set()
    assert on_disk.counts() == {"pending": 1}
    assert (on_disk.handles("anna"), on_disk.spent("anna")) == ([], 2)
    sqlite(on_disk).execute("PRAGMA max_page_count = 1000000")
    assert on_disk.end(kept.id, "ready", result={}, keep_seconds=1) is not None
    assert on_disk.add(job(own, prompt=long), [own])[1]


def test_a_database_that_cannot_be_read_is_an_error_of_ours(on_disk: JobStore) -> None:
    sqlite(on_disk).execute("ALTER TABLE jobs RENAME TO other")
    for call in (lambda: on_disk.get("a"), on_disk.pending, on_disk.counts, lambda: on_disk.add(job(idempotency="k"))):
        with pytest.raises(OutputError, match="cannot be read"):
            call()
    sqlite(on_disk).execute("ALTER TABLE other RENAME TO jobs")
