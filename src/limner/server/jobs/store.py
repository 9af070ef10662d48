"""Jobs that outlive the process: what was accepted, what became of it, and the pictures of both, in one storage.

A job is written before it is answered, and it ends once: the row says `pending` until one transaction changes that,
however often the job was begun. No picture of a refused job stays. Knows nothing of engines, HTTP, wire dialects or
databases.

    tables                jobs, handles of references, which pictures they use, images made for each owner, keys of K/V that
                          removed jobs made from the pictures of handles
    inputs/<digest>.png   pictures of requests (processed references, canvases, masks), each once, without loss
    results/<id>-<n>.png  results, until they expire; results/<id>-map<n>.png what an edit with `preserve` changed of them
    secret                key of signed URLs, 32 random bytes
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from limner.errors import BudgetSpent, Conflict, InvalidRequest, OutputError
from limner.images import PreparedReference, ReferenceReport
from limner.server.jobs.handle_keys import HandleKeys
from limner.server.jobs.open import open_storage
from limner.server.jobs.pictures import PictureFiles
from limner.server.jobs.records import Handle, Job, JobPictures, Status
from limner.server.jobs.room import NOT_FORGOTTEN, Room, result_names
from limner.server.jobs.rows import SCHEMA, VERSION, fingerprint, handle_row, job_row, read_handle, read_job
from limner.server.jobs.storage import Connection, Row, Value

__all__ = ["JobStore"]

_DUE_OF_OWNER, _MAX_DUE = 64, 512
"""How many due webhooks are looked at, of one owner and in all."""
_CHECK_SECONDS = 1.0
_FINGERPRINT = 9  # the column
_REFUSED = ("request_moderated", "content_moderated")


class JobStore:
    """The jobs in a folder, or in a database at a `postgresql://` URL; one process at a time.

    Safe to use from several threads; `clock` gives epoch seconds. Methods raise `OutputError` if the storage fails.
    """

    def __init__(self, data: str | os.PathLike[str], *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._storage = open_storage(data)
        self._lock = self._storage.lock
        self._pictures = PictureFiles(self._storage)
        self._keys = HandleKeys(self._storage)
        self._room = Room(self._storage, self._pictures, self._keys)
        self._check_again = 0.0
        self._unwritable: OutputError | None = None
        try:
            self._storage.prepare(SCHEMA, version=VERSION)
            self._keys.prepare()
            self.secret = self._read_secret()
        except BaseException:
            self._storage.close()
            raise

    def check_writable(self) -> None:
        """Raise `OutputError` if no job could be written now. What was found holds for a second."""
        if time.monotonic() >= self._check_again:
            self._unwritable = None
            try:
                self._storage.check_writable()
            except OutputError as error:
                self._unwritable = error
            self._check_again = time.monotonic() + _CHECK_SECONDS
        if self._unwritable is not None:
            raise self._unwritable

    @property
    def name(self) -> str:
        """Where the jobs are, without a password."""
        return self._storage.name

    def _read_secret(self) -> bytes:
        try:
            if not self._storage.has_file("secret"):
                self._storage.write_file("secret", secrets.token_bytes(32), private=True)
            found = self._storage.read_file("secret")
        except OSError as error:
            raise OutputError(f"data: {self.name} cannot be used ({error}); give another folder") from error
        if len(found) != 32:
            raise OutputError(
                f"data: the secret of {self.name} is damaged; remove it, and links to results that were given are void"
            )
        return found

    def close(self) -> None:
        """Release the storage for another process. A second call does nothing."""
        self._storage.close()

    def _rows(self, query: str, *values: Value) -> list[Row]:
        return self._storage.rows(query, values)

    # jobs

    def encode(self, pictures: Sequence[PreparedReference]) -> dict[str, bytes]:
        """Return the files of pictures for `add` and `add_handle`, made without holding up other calls."""
        return self._pictures.encode(pictures)

    def add(
        self,
        job: Job,
        pictures: Sequence[PreparedReference] = (),
        *,
        files: Mapping[str, bytes] | None = None,
        budget: int | None = None,
    ) -> tuple[Job, bool]:
        """Write a job and its `pictures` (references, canvas, mask). Return the job as stored, and whether it is new.

        The same request again under an idempotency key of its owner gives the first job; another request under that key
        raises `Conflict`. Raises `BudgetSpent` if the owner would have more than `budget` images over all jobs. A job
        that is not accepted leaves nothing behind.
        """
        with self._lock:
            known = self.known(job)
            if known is not None:
                return known, False
            job = replace(job, created=self._clock())
            with self._pictures.written(pictures, files or {}), self._storage.transaction() as db:
                self._spend(db, job.owner, len(job.seeds), budget)
                self._pictures.use(db, job.pictures, user=f"job:{job.id}")
                db.execute(
                    "INSERT INTO jobs (id, owner, created, status, request, idempotency, fingerprint, webhook) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    job_row(job),
                )
        return job, True

    def known(self, job: Job) -> Job | None:
        """Return the job under the same idempotency key of the same owner, or None. Raises `Conflict` if they differ.

        The key of a job that was removed is free.
        """
        if job.idempotency is None:
            return None
        rows = self._rows("SELECT * FROM jobs WHERE owner = ? AND idempotency = ?", job.owner, job.idempotency)
        if not rows:
            return None
        known = read_job(rows[0])
        found = rows[0][_FINGERPRINT] if known.set_aside else fingerprint(known)
        if found != fingerprint(job):
            raise Conflict(f"idempotency_key: {job.idempotency!r} was used for another request; use a new one")
        return known

    def spent(self, owner: str) -> int:
        """Return the number of images of an owner's ready and pending jobs, including jobs that were removed."""
        rows = self._rows("SELECT images FROM spent WHERE owner = ?", owner)
        return int(rows[0][0]) if rows else 0

    def _spend(self, db: Connection, owner: str, num_images: int, budget: int | None) -> None:
        spent = self.spent(owner)
        if budget is not None and spent + num_images > budget:
            raise BudgetSpent(
                f"num_images: {num_images} more would be over the budget of this key: {spent} of {budget} images are used"
            )
        db.execute(
            "INSERT INTO spent (owner, images) VALUES (?, ?) ON CONFLICT (owner) DO UPDATE SET images = spent.images + ?",
            (owner, num_images, num_images),
        )

    def get(self, id: str, *, owner: str | None = None) -> Job | None:
        """Return a job, or None if it is not here, was removed, or is not of the given owner."""
        if "\0" in id:  # some databases refuse it
            return None
        rows = self._rows(f"SELECT * FROM jobs WHERE id = ? AND {NOT_FORGOTTEN}", id)
        job = read_job(rows[0]) if rows else None
        return job if job and owner in (None, job.owner) else None

    def pending(self) -> list[Job]:
        """Return the jobs that have not ended, oldest first, without those that this version cannot read."""
        rows = self._rows("SELECT * FROM jobs WHERE status = 'pending' ORDER BY created, id")
        return [job for job in map(read_job, rows) if not job.set_aside]

    def of_owner(self, owner: str, *, limit: int = 50, before: float | None = None) -> list[Job]:
        """Return an owner's jobs, newest first; those created before a time, if one is given."""
        rows = self._rows(
            f"SELECT * FROM jobs WHERE owner = ? AND created < ? AND {NOT_FORGOTTEN} ORDER BY created DESC, id LIMIT ?",
            owner,
            math.inf if before is None else before,
            limit,
        )
        return [read_job(row) for row in rows]

    def counts(self) -> dict[str, int]:
        """Return the number of jobs by status."""
        return dict(self._rows("SELECT status, count(*) FROM jobs GROUP BY status"))

    def end(self, id: str, status: Status, *, result: Mapping[str, object], keep_seconds: float) -> Job | None:
        """End a job and return it; None if it had ended before, or is gone.

        Only images of ready and pending jobs count against a budget. The pictures of a refused job are removed at once,
        unless others use them.
        """
        now = self._clock()
        with self._storage.transaction() as db:
            changed = db.execute(
                "UPDATE jobs SET status = ?, ended = ?, expires = ?, result = ?, "
                "webhook_due = CASE WHEN webhook IS NULL THEN NULL ELSE ? END WHERE id = ? AND status = 'pending'",
                (status, now, now + keep_seconds, json.dumps(dict(result)), now, id),
            ).rowcount
            if not changed:
                return None
            job = self.get(id)
            assert job is not None
            if status != "ready":
                db.execute("UPDATE spent SET images = images - ? WHERE owner = ?", (len(job.seeds), job.owner))
            unused = self._pictures.release(db, user=f"job:{id}") if status in _REFUSED else []
        self._pictures.remove(unused)
        return job

    # results

    def write_results(self, id: str, files: Sequence[bytes], *, suffix: str, kind: str = "") -> list[str]:
        """Write the pictures of a job, each whole, unless the job has ended. Return their names, with the kind in them."""
        names = result_names(id, len(files), suffix=suffix, kind=kind)
        with self._storage.transaction() as db:  # another process may have held the storage, and ended the job
            if db.execute("SELECT 1 FROM jobs WHERE id = ? AND status = 'pending'", (id,)).fetchone():
                for name, data in zip(names, files, strict=True):
                    self._storage.write_file(f"results/{name}", data)
        return names

    def read_result(self, job: Job, number: int, *, kind: Literal["files", "maps"] = "files") -> bytes | None:
        """Return a picture of a ready job, or the map of one, counted from 1; None if it has expired or never was."""
        names = job.result.get(kind, [])
        if job.status != "ready" or not 1 <= number <= len(names) or (job.expires or 0) <= self._clock():
            return None
        try:
            return self._storage.read_file(f"results/{names[number - 1]}")
        except FileNotFoundError:
            return None

    # webhooks

    def due_webhooks(self) -> list[Job]:
        """Return ended jobs whose webhook is due now: for each owner those due longest, so that none crowds out others."""
        query = (
            "SELECT jobs.* FROM jobs JOIN (SELECT id, row_number() OVER (PARTITION BY owner ORDER BY webhook_due, id) "
            "AS place FROM jobs WHERE webhook_due <= ? OR (webhook_due IS NOT NULL AND webhook_attempts = 0) "
            ") AS due ON due.id = jobs.id WHERE due.place <= ? "
            "ORDER BY due.place, jobs.webhook_due LIMIT ?"
        )
        # a first attempt is due at once; its time lies ahead only where the clock was set back
        due = map(read_job, self._rows(query, self._clock(), _DUE_OF_OWNER, _MAX_DUE))
        return [job for job in due if not job.set_aside]

    def webhook_attempted(self, id: str, *, again: float | None) -> None:
        """Note an attempt, and when to try again; None: delivered, or given up."""
        with self._storage.transaction() as db:
            db.execute(
                "UPDATE jobs SET webhook_attempts = webhook_attempts + 1, webhook_due = ?, "
                "webhook_first = coalesce(webhook_first, ?) WHERE id = ?",
                (again, self._clock(), id),
            )

    # references

    def pictures(self, job: Job, *, with_mask: bool = True) -> JobPictures:
        """Return the stored pictures of a job. Raises `LimnerError` if a file is gone, damaged or changed."""
        wanted = (job.canvas, job.mask if with_mask else None)
        canvas, mask = (None if one is None else self.picture(one) for one in wanted)
        return JobPictures(references=tuple(map(self.picture, job.references)), canvas=canvas, mask=mask)

    def picture(self, report: ReferenceReport) -> PreparedReference:
        """Return a stored reference. Raises `LimnerError` if its file is gone, damaged or changed."""
        return self._pictures.read(report)

    @property
    def picture_bytes(self) -> int:
        """Bytes of pictures that are kept in memory."""
        return self._pictures.cached_bytes

    def picture_png(self, digest: str) -> bytes:
        """Return the PNG file of a stored reference. Raises `LimnerError` if it is gone."""
        return self._pictures.read_png(digest)

    def add_handle(
        self,
        handle: Handle,
        pictures: Sequence[PreparedReference],
        *,
        max_handles: int,
        files: Mapping[str, bytes] | None = None,
    ) -> Handle:
        """Store references under their content key for an owner; the same ones again take no more room.

        Raises `InvalidRequest` if the owner has `max_handles` others.
        """
        with self._lock:
            others = self._rows("SELECT count(*) FROM handles WHERE owner = ? AND key != ?", handle.owner, handle.key)
            if others[0][0] >= max_handles:
                raise InvalidRequest("references", f"{max_handles} are kept for you, which is the most; delete some")
            with self._pictures.written(pictures, files or {}), self._storage.transaction() as db:
                self._pictures.use(db, handle.references, user=f"handle:{handle.owner}:{handle.key}")
                db.execute(
                    "INSERT INTO handles (owner, key, created, described) VALUES (?, ?, ?, ?) "
                    "ON CONFLICT (owner, key) DO UPDATE SET described = excluded.described",
                    handle_row(replace(handle, created=self._clock())),
                )
            found = self.handle(handle.owner, handle.key)
        assert found is not None
        return found

    def handle(self, owner: str, key: str) -> Handle | None:
        """Return references of an owner by their key, or None, also where this version cannot read them."""
        rows = self._rows("SELECT * FROM handles WHERE owner = ? AND key = ?", owner, key)
        return read_handle(rows[0]) if rows else None

    def handles(self, owner: str) -> list[Handle]:
        """Return all references of an owner that this version can read, newest first."""
        rows = self._rows("SELECT * FROM handles WHERE owner = ? ORDER BY created DESC, key", owner)
        return [handle for handle in map(read_handle, rows) if handle is not None]

    def keys_of_handle(self, owner: str, key: str) -> dict[str, bool]:
        """Return the keys of K/V that jobs of anybody made from the pictures of a handle, and its own.

        True: no other handle is for them, of an owner or of another one: neither of that key nor of the same pictures.
        """
        keys = self._keys.of(owner, key)
        with self._storage.transaction() as db:
            free = self._keys.free(db, owner, key, keys)
        return {one: one in free for one in keys}

    def remove_handle(self, owner: str, key: str, *, keys: Iterable[str] | None = None) -> list[str]:
        """Remove references of an owner, and pictures that nobody else uses.

        Return those of `keys`, by default the handle's own, that no handle is for now.
        """
        with self._storage.transaction() as db:
            free = self._keys.free(db, owner, key, [key] if keys is None else keys)
            self._keys.forget(db, owner, key)
            db.execute("DELETE FROM handles WHERE owner = ? AND key = ?", (owner, key))
            unused = self._pictures.release(db, user=f"handle:{owner}:{key}")
        self._pictures.remove(unused)
        return free

    # room

    def clean(self, *, forget_seconds: float, grace_seconds: float = 600.0) -> None:
        """Remove expired results, ended jobs `forget_seconds` after their results, and pictures that nobody uses.

        A job whose webhook is still to be delivered stays. Files that no row knows (left by a process that was killed
        between two writes) are removed once they are `grace_seconds` old.
        """
        self._room.clean(self._clock(), forget_seconds=forget_seconds, grace_seconds=grace_seconds)

    def trim(self, max_bytes: int) -> int:
        """Remove the oldest ended jobs while results and pictures of jobs have more bytes. Return how many were removed.

        Pictures of handles do not count, and stay.
        """
        return self._room.trim(self._clock(), max_bytes=max_bytes)

    def forget(self, id: str) -> bool:
        """Remove an ended job with its pictures. Return whether it was there and had ended."""
        return self._room.forget([id]) == 1

    def forget_all(self, owner: str) -> int:
        """Remove all ended jobs of an owner. Return how many were removed."""
        return self._room.forget_all(owner)
