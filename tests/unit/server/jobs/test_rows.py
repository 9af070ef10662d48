"""Rows of earlier versions are read, and rows of this one are the same."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tests.support.jobs import sqlite

from limner.errors import Conflict
from limner.images import ReferenceReport
from limner.server.dialects.job_view import as_result
from limner.server.jobs.records import Handle, Job, JobOptions, Webhook
from limner.server.jobs.rows import fingerprint
from limner.server.jobs.store import JobStore

REPORT = ReferenceReport(
    original_size=(130, 64),
    oriented=False,
    resized_to=None,
    cut=(1, 0, 1, 0),
    processed_size=(128, 64),
    digest="37118661f4845a56700beaf8604b6443a611dbec18709d05e7f985bb09605ba8",
)
OLD_REPORT = (
    '{"original_size": [130, 64], "oriented": false, "resized_to": null, "cut": [1, 0, 1, 0], '
    '"processed_size": [128, 64], "digest": "37118661f4845a56700beaf8604b6443a611dbec18709d05e7f985bb09605ba8"}'
)
# Rows as `JobStore` wrote them when options were a dict (commit 4dbbd36).
OLD_FULL = (
    "0b5d6c1e-7c11-4d2a-9b1a-2f6f3e1a9c55",
    "anna",
    1000.0,
    "ready",
    '{"prompt": "\\u00e9\\ud800 a cat", "seeds": [7, 8], "drawn_seeds": true, "width": 64, "height": 80, "num_steps": 9, '
    '"priority": -1, "timeout": 2.5, "tolerance": 1, "output_format": "jpeg", "quality": 90, '
    '"options": {"base_url": "http://a", "handle": "' + "f" * 64 + '", "references_checked": true}, '
    '"references": [' + OLD_REPORT + "]}",
    1000.0,
    1060.0,
    '{"files": ["a-1.png"], "seeds": [7, 8]}',
    "once",
    "e00a838ae3109051471c38e3d8f5ec3240d89ca0d9a742136db55611b3731377",
    '{"url": "https://h/x", "secret": "s"}',
    1005.0,
    1,
    1000.0,
)
OLD_PLAIN = (
    "plain",
    "anna",
    1000.0,
    "pending",
    '{"prompt": "a", "seeds": [1], "drawn_seeds": false, "width": null, "height": null, "num_steps": 4, "priority": 0, '
    '"timeout": null, "tolerance": 2, "output_format": "png", "quality": 95, "options": {}, "references": []}',
    *(None, None, "{}", None, None, None, None, 0, None),
)
OLD_HANDLES = [
    ("anna", "e" * 64, 1000.0, '{"tolerance": 2, "num_tokens": 32, "references": [' + OLD_REPORT + "]}"),
    (
        "anna",
        "f" * 64,
        1000.0,
        '{"tolerance": 1, "nbytes": 10, "prefill_seconds": 0.25, "num_tokens": 32, "references": [' + OLD_REPORT + "]}",
    ),
]
FULL = Job(
    id=OLD_FULL[0],
    owner="anna",
    prompt="é\ud800 a cat",
    seeds=(7, 8),
    drawn_seeds=True,
    references=(REPORT,),
    width=64,
    height=80,
    num_inference_steps=9,
    priority=-1,
    timeout=2.5,
    tolerance=1,
    output_format="jpeg",
    quality=90,
    options=JobOptions(base_url="http://a", handle="f" * 64, references_checked=True),
    webhook=Webhook(url="https://h/x", secret="s"),
    idempotency="once",
    created=1000.0,
    status="ready",
    ended=1000.0,
    expires=1060.0,
    result={"files": ["a-1.png"], "seeds": [7, 8]},
    webhook_attempts=1,
    webhook_first=1000.0,
)
PLAIN = Job(id="plain", owner="anna", prompt="a", seeds=(1,), created=1000.0)
HANDLES = [
    Handle(owner="anna", key="e" * 64, references=(REPORT,), num_tokens=32, tolerance=2, created=1000.0),
    Handle(
        owner="anna",
        key="f" * 64,
        references=(REPORT,),
        num_tokens=32,
        tolerance=1,
        nbytes=10,
        prefill_seconds=0.25,
        created=1000.0,
    ),
]


def test_rows_of_an_earlier_version_are_read(store: JobStore) -> None:
    with store._storage.transaction() as db:
        for row in (OLD_FULL, OLD_PLAIN):
            db.execute(f"INSERT INTO jobs VALUES ({', '.join('?' * len(row))})", row)
        for handle in OLD_HANDLES:
            db.execute("INSERT INTO handles VALUES (?, ?, ?, ?)", handle)
    assert store.get(FULL.id) == FULL
    assert store.pending() == [PLAIN]
    assert store.handles("anna") == HANDLES
    assert store.add(replace(FULL, id="again")) == (FULL, False)  # the fingerprint is that of then


def test_rows_are_written_as_an_earlier_version_wrote_them(on_disk: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_disk._storage, "has_file", lambda name: True)  # of the picture
    for one in (FULL, PLAIN):
        new = replace(
            one, status="pending", ended=None, expires=None, result={}, webhook_attempts=0, webhook_first=None
        )
        on_disk.add(new)
    on_disk.end(FULL.id, "ready", result=FULL.result, keep_seconds=60)
    on_disk.webhook_attempted(FULL.id, again=1005.0)
    for handle in HANDLES:
        on_disk.add_handle(handle, (), max_handles=9)
    assert sqlite(on_disk).execute("SELECT * FROM jobs ORDER BY id").fetchall() == [OLD_FULL, OLD_PLAIN]
    assert sqlite(on_disk).execute("SELECT * FROM handles ORDER BY key").fetchall() == OLD_HANDLES
    assert fingerprint(FULL) == OLD_FULL[9]
    assert json.loads(OLD_FULL[4])["num_steps"] == FULL.num_inference_steps


NEWER: dict[str, dict[str, object]] = {
    "another field": {"request": json.dumps({**json.loads(OLD_PLAIN[4]), "voice": "a dog"})},
    "another option": {"request": OLD_PLAIN[4].replace('"options": {}', '"options": {"lora": "x"}')},
    "another control": {"request": json.dumps({**json.loads(OLD_PLAIN[4]), "control": {"voice": "a dog"}})},
    "a control of another form": {"request": json.dumps({**json.loads(OLD_PLAIN[4]), "control": {"mask": "m"}})},
    "a field less": {"request": OLD_PLAIN[4].replace('"num_steps"', '"steps"')},
    "another format": {"request": "\x01not JSON"},
    "another kind": {"request": "[]"},
    "another webhook": {"webhook": '{"url": "https://h/x", "headers": {}}'},
    "another status": {"status": "paused"},
}


@pytest.mark.parametrize("name", NEWER)
def test_a_row_of_a_newer_version_is_set_aside(on_disk: JobStore, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """Rolling back: the service starts, the other jobs run, and the row is there for the newer version."""
    id_ = f"newer {name}"
    columns = "id owner created status request ended expires result idempotency fingerprint webhook webhook_due"
    row = dict(zip(columns.split(), OLD_PLAIN, strict=False)) | {"id": id_} | NEWER[name]
    del row["webhook_due"]
    sqlite(on_disk).execute("ALTER TABLE jobs ADD COLUMN added TEXT")  # as a newer version may
    sqlite(on_disk).execute(
        f"INSERT INTO jobs ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", tuple(row.values())
    )
    kept, _ = on_disk.add(Job(owner="anna", prompt="b", seeds=(1,)))
    assert on_disk.pending() == [kept]
    assert [(job.id, job.set_aside) for job in on_disk.of_owner("anna")] == [(kept.id, False), (id_, True)]
    assert on_disk.pending() == [kept]
    assert [id_ in record.getMessage() for record in caplog.records] == [True]  # once
    found = on_disk.get(id_, owner="anna")
    assert found is not None
    shown = as_result(found, [], None)
    assert (shown["status"], shown["details"]["state"]) == ("Pending", "set aside")
    assert on_disk.get(id_, owner="bob") is None
    on_disk.clean(forget_seconds=0)
    (left,) = sqlite(on_disk).execute("SELECT request FROM jobs WHERE id = ?", (id_,)).fetchone()
    assert left == row["request"]


def test_a_mask_of_an_earlier_version_is_read(on_disk: JobStore) -> None:
    """It stood outside of `control`, and its edge was not softened."""
    row = (*OLD_PLAIN[:4], json.dumps({**json.loads(OLD_PLAIN[4]), "mask": json.loads(OLD_REPORT)}), *OLD_PLAIN[5:])
    sqlite(on_disk).execute(f"INSERT INTO jobs VALUES ({', '.join('?' * len(row))})", row)
    assert on_disk.pending() == [replace(PLAIN, mask=REPORT, control={"mask_blur": 0})]


def test_an_ended_job_with_fields_of_a_newer_version_is_shown(on_disk: JobStore) -> None:
    row = list(OLD_FULL)
    row[4] = json.dumps({**json.loads(row[4]), "voice": "a dog"})
    sqlite(on_disk).execute(f"INSERT INTO jobs VALUES ({', '.join('?' * len(row))})", row)
    assert on_disk.get(FULL.id) == FULL


def test_a_request_again_whose_job_is_set_aside(on_disk: JobStore) -> None:
    asked = Job(owner="anna", prompt="a", seeds=(1,), idempotency="k")
    kept, _ = on_disk.add(asked)
    sqlite(on_disk).execute("UPDATE jobs SET request = '{}'")
    again, new = on_disk.add(replace(asked, id="again"))
    assert (again.id, again.set_aside, new) == (kept.id, True, False)
    with pytest.raises(Conflict):
        on_disk.add(replace(asked, id="again", prompt="b"))
