"""Jobs that outlive the process: what was accepted, what became of it, and the pictures of both, in one folder.

Owns the SQLite file and the picture files beside it. A job is in the file before it is answered, and it ends once: the row
says `pending` until one transaction makes it something else, however often it was begun. Knows nothing of engines, HTTP or
wire dialects.

    DIR/jobs.sqlite           jobs, handles of references, which pictures they use
    DIR/inputs/<digest>.png   processed reference pictures, each once, without loss
    DIR/results/<id>-<n>.png  results, until they expire
    DIR/secret                key of signed URLs, 32 random bytes
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import secrets
import sqlite3
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from limner.errors import Conflict, InvalidRequest, LimnerError, OutputError
from limner.images import PreparedReference, ReferenceReport, write_beside

__all__ = ["Handle", "Job", "JobStore", "Status", "Webhook"]

Status = Literal["pending", "ready", "error", "request_moderated", "content_moderated", "cancelled"]
_VERSION = 1
_CACHED_BYTES = 256 << 20
_SCHEMA = """
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, created REAL NOT NULL, status TEXT NOT NULL, request TEXT NOT NULL,
    ended REAL, expires REAL, result TEXT NOT NULL DEFAULT '{}', idempotency TEXT, fingerprint TEXT,
    webhook TEXT, webhook_due REAL, webhook_attempts INTEGER NOT NULL DEFAULT 0, webhook_first REAL
) STRICT;
CREATE INDEX jobs_by_owner ON jobs (owner, created);
CREATE INDEX jobs_pending ON jobs (created) WHERE status = 'pending';
CREATE INDEX jobs_due ON jobs (webhook_due) WHERE webhook_due IS NOT NULL;
CREATE UNIQUE INDEX jobs_idempotency ON jobs (owner, idempotency) WHERE idempotency IS NOT NULL;
CREATE TABLE handles (
    owner TEXT NOT NULL, key TEXT NOT NULL, created REAL NOT NULL, described TEXT NOT NULL, PRIMARY KEY (owner, key)
) STRICT;
CREATE TABLE pictures (digest TEXT PRIMARY KEY, report TEXT NOT NULL, nbytes INTEGER NOT NULL, added REAL NOT NULL) STRICT;
CREATE TABLE uses (digest TEXT NOT NULL, user TEXT NOT NULL, PRIMARY KEY (digest, user)) STRICT;
CREATE INDEX uses_by_user ON uses (user);
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Webhook:
    """Where the end of a job is told, and the secret that signs it."""

    url: str
    secret: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One job. `references` are digests of pictures in order; `options` is what the dialect wants back.

    `result` holds, by status: `files` and what is told of them, or `error`. Times are seconds since the epoch.
    """

    owner: str
    prompt: str
    seeds: tuple[int, ...]
    references: tuple[str, ...] = ()
    width: int | None = None
    height: int | None = None
    num_steps: int = 4
    priority: int = 0
    timeout: float | None = None
    tolerance: int = 2
    output_format: str = "png"
    quality: int = 95
    options: dict[str, Any] = field(default_factory=dict)
    webhook: Webhook | None = None
    idempotency: str | None = None
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    created: float = 0.0
    status: Status = "pending"
    ended: float | None = None
    expires: float | None = None
    result: dict[str, Any] = field(default_factory=dict)
    webhook_attempts: int = 0
    webhook_first: float | None = None

    @property
    def fingerprint(self) -> str:
        """Equal for requests that ask for the same; seeds that the caller did not choose do not count."""
        asked = self._request()
        if asked["options"].get("drawn_seeds"):
            asked["seeds"] = len(self.seeds)
        return json.dumps(asked, sort_keys=True)

    def _request(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _REQUEST}


_REQUEST = (
    "prompt", "seeds", "references", "width", "height", "num_steps", "priority", "timeout", "tolerance", "output_format",
    "quality", "options",
)  # fmt: skip
_TUPLES = ("seeds", "references")


@dataclass(frozen=True, kw_only=True, slots=True)
class Handle:
    """References that were uploaded once: their content key, and their pictures in order."""

    owner: str
    key: str
    references: tuple[str, ...]
    created: float = 0.0
    described: dict[str, Any] = field(default_factory=dict)


class JobStore:
    """The jobs of one folder; one process at a time. Safe to use from several threads; `clock` gives epoch seconds."""

    def __init__(self, folder: str | os.PathLike[str], *, clock: Callable[[], float] = time.time) -> None:
        self.folder = Path(folder)
        self._clock = clock
        self._lock = threading.RLock()
        self._pictures: OrderedDict[str, PreparedReference] = OrderedDict()
        self._cached_bytes = 0
        try:
            for name in ("inputs", "results"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            self._held = (self.folder / "lock").open("w")
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._db = sqlite3.connect(self.folder / "jobs.sqlite", check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")  # what is answered survives a loss of power too
            self._prepare()
            self.secret = self._secret()
        except BlockingIOError:
            raise OutputError(
                f"data: {self.folder} is used by another server; stop it, or give another folder"
            ) from None
        except (OSError, sqlite3.Error) as error:
            raise OutputError(f"data: {self.folder} cannot be used ({error}); give another folder") from error

    def _prepare(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        elif version != _VERSION:
            raise OutputError(
                f"data: {self.folder} is of version {version}, this Limner reads {_VERSION}; give another folder"
            )

    def _secret(self) -> bytes:
        file = self.folder / "secret"
        if not file.exists():
            write_beside(file, secrets.token_bytes(32))
            file.chmod(0o600)
        return file.read_bytes()

    def close(self) -> None:
        with self._lock:
            self._db.close()
            self._held.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise OutputError(f"data: {self.folder} cannot be written ({error})") from error
                raise

    # jobs

    def add(self, job: Job, pictures: Sequence[PreparedReference] = ()) -> tuple[Job, bool]:
        """Writes a job down; gives it as it is kept, and whether it is new.

        A second job under an idempotency key of its owner is the first one again, if it asks for the same; otherwise
        `Conflict` is raised. `pictures` are its references.
        """
        for picture in pictures:
            self._write_picture(picture)
        job = replace(job, created=self._clock())
        with self._transaction() as db:
            if job.idempotency is not None:
                row = db.execute(
                    "SELECT * FROM jobs WHERE owner = ? AND idempotency = ?", (job.owner, job.idempotency)
                ).fetchone()
                if row is not None:
                    known = _job(row)
                    if known.fingerprint != job.fingerprint:
                        raise Conflict(
                            f"idempotency_key: {job.idempotency!r} was used for another request; use a new one"
                        )
                    return known, False
            for picture in pictures:
                self._note_picture(db, picture)
            self._use(db, job.references, user=f"job:{job.id}")
            db.execute(
                "INSERT INTO jobs (id, owner, created, status, request, idempotency, fingerprint, webhook) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    job.id, job.owner, job.created, job.status, json.dumps(job._request()), job.idempotency,
                    job.fingerprint if job.idempotency else None,
                    json.dumps(asdict(job.webhook)) if job.webhook else None,
                ),
            )  # fmt: skip
        return job, True

    def get(self, id: str, *, owner: str | None = None) -> Job | None:
        """A job, if it is here (and is of that owner, if one is given)."""
        with self._lock:
            row = self._db.execute("SELECT * FROM jobs WHERE id = ?", (id,)).fetchone()
        job = _job(row) if row else None
        return job if job and owner in (None, job.owner) else None

    def by_idempotency(self, owner: str, key: str) -> Job | None:
        """The job that an owner asked for under an idempotency key."""
        with self._lock:
            row = self._db.execute("SELECT * FROM jobs WHERE owner = ? AND idempotency = ?", (owner, key)).fetchone()
        return _job(row) if row else None

    def pending(self) -> list[Job]:
        """Jobs that have not ended, the oldest first."""
        with self._lock:
            rows = self._db.execute("SELECT * FROM jobs WHERE status = 'pending' ORDER BY created, id").fetchall()
        return [_job(row) for row in rows]

    def of_owner(self, owner: str, *, limit: int = 50) -> list[Job]:
        """An owner's jobs, the newest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT * FROM jobs WHERE owner = ? ORDER BY created DESC, id LIMIT ?", (owner, limit)
            ).fetchall()
        return [_job(row) for row in rows]

    def counts(self) -> dict[str, int]:
        """Number of jobs by status."""
        with self._lock:
            return dict(self._db.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall())

    def end(
        self,
        id: str,
        status: Status,
        *,
        result: Mapping[str, Any],
        keep_seconds: float,
    ) -> Job | None:
        """Ends a job. None: it had ended before, or is gone, and stays as it is."""
        now = self._clock()
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE jobs SET status = ?, ended = ?, expires = ?, result = ?, "
                "webhook_due = CASE WHEN webhook IS NULL THEN NULL ELSE ? END WHERE id = ? AND status = 'pending'",
                (status, now, now + keep_seconds, json.dumps(dict(result)), now, id),
            ).rowcount
        return self.get(id) if changed else None

    def write_results(self, id: str, files: Sequence[bytes], *, suffix: str) -> list[str]:
        """Writes the pictures of a job, each whole; gives their names."""
        names = [f"{id}-{number}.{suffix}" for number in range(1, len(files) + 1)]
        for name, data in zip(names, files, strict=True):
            write_beside(self.folder / "results" / name, data)
        return names

    def read_result(self, job: Job, number: int) -> bytes | None:
        """A picture of a job that is ready, the first is 1; None: it has expired or never was."""
        names = job.result.get("files", [])
        if job.status != "ready" or not 1 <= number <= len(names) or (job.expires or 0) <= self._clock():
            return None
        try:
            return Path(self.folder / "results" / names[number - 1]).read_bytes()
        except FileNotFoundError:
            return None

    # webhooks

    def due_webhooks(self) -> list[Job]:
        """Ended jobs whose webhook is due now."""
        with self._lock:
            rows = self._db.execute(
                "SELECT * FROM jobs WHERE webhook_due <= ? ORDER BY webhook_due LIMIT 100", (self._clock(),)
            ).fetchall()
        return [_job(row) for row in rows]

    def webhook_attempted(self, id: str, *, again: float | None) -> None:
        """Notes an attempt, and when to try again; None: delivered, or given up."""
        with self._transaction() as db:
            db.execute(
                "UPDATE jobs SET webhook_attempts = webhook_attempts + 1, webhook_due = ?, "
                "webhook_first = coalesce(webhook_first, ?) WHERE id = ?",
                (again, self._clock(), id),
            )

    # pictures

    def _write_picture(self, picture: PreparedReference) -> None:
        digest = picture.report.digest
        file = self.folder / "inputs" / f"{digest}.png"
        if not file.exists():
            buffer = io.BytesIO()
            size = picture.report.processed_size
            Image.frombytes("RGB", size, picture.data).save(buffer, "PNG", compress_level=1)
            write_beside(file, buffer.getvalue())
        self._keep_picture(picture)

    def _note_picture(self, db: sqlite3.Connection, picture: PreparedReference) -> None:
        db.execute(
            "INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, ?)",
            (picture.report.digest, json.dumps(asdict(picture.report)), len(picture.data), self._clock()),
        )

    def _use(self, db: sqlite3.Connection, digests: Sequence[str], *, user: str) -> None:
        for digest in set(digests):
            if db.execute("SELECT 1 FROM pictures WHERE digest = ?", (digest,)).fetchone() is None:
                raise LimnerError(f"picture {digest} is not kept; send it again")
            db.execute("INSERT OR IGNORE INTO uses VALUES (?, ?)", (digest, user))

    def _keep_picture(self, picture: PreparedReference) -> None:
        with self._lock:
            if picture.report.digest not in self._pictures:
                self._cached_bytes += len(picture.data)
            self._pictures[picture.report.digest] = picture
            self._pictures.move_to_end(picture.report.digest)
            while self._cached_bytes > _CACHED_BYTES:
                self._cached_bytes -= len(self._pictures.popitem(last=False)[1].data)

    def picture(self, digest: str) -> PreparedReference:
        """A kept reference. Raises `LimnerError` where its file is gone or is not what was written."""
        with self._lock:
            if digest in self._pictures:
                self._pictures.move_to_end(digest)
                return self._pictures[digest]
            row = self._db.execute("SELECT report FROM pictures WHERE digest = ?", (digest,)).fetchone()
        if row is None:
            raise LimnerError(f"picture {digest} is not kept; send it again")
        values = json.loads(row[0])
        report = ReferenceReport(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})  # type: ignore[arg-type]
        try:
            with Image.open(self.folder / "inputs" / f"{digest}.png") as image:
                picture = PreparedReference(data=image.tobytes(), report=report)
        except (OSError, SyntaxError, ValueError) as error:
            raise LimnerError(f"picture {digest} cannot be read again ({error}); send it again") from error
        if picture.computed_digest() != digest:
            raise LimnerError(f"picture {digest} was changed on disk; send it again")
        self._keep_picture(picture)
        return picture

    def picture_file(self, digest: str) -> Path:
        """The PNG of a kept reference."""
        return self.folder / "inputs" / f"{digest}.png"

    # handles of references

    def add_handle(self, handle: Handle, pictures: Sequence[PreparedReference]) -> Handle:
        """Keeps references under their content key for an owner; the same ones again are the first ones."""
        for picture in pictures:
            self._write_picture(picture)
        with self._transaction() as db:
            for picture in pictures:
                self._note_picture(db, picture)
            self._use(db, handle.references, user=f"handle:{handle.owner}:{handle.key}")
            described = json.dumps({"references": handle.references, **handle.described})
            db.execute(
                "INSERT INTO handles VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET described = excluded.described",
                (handle.owner, handle.key, self._clock(), described),
            )
        found = self.handle(handle.owner, handle.key)
        assert found is not None
        return found

    def handle(self, owner: str, key: str) -> Handle | None:
        """References of an owner, by their key."""
        with self._lock:
            row = self._db.execute("SELECT * FROM handles WHERE owner = ? AND key = ?", (owner, key)).fetchone()
        return _handle(row) if row else None

    def handles(self, owner: str) -> list[Handle]:
        """All references of an owner, the newest first."""
        with self._lock:
            rows = self._db.execute("SELECT * FROM handles WHERE owner = ? ORDER BY created DESC", (owner,)).fetchall()
        return [_handle(row) for row in rows]

    def all_keys(self) -> set[str]:
        """Keys that some owner has a handle of."""
        with self._lock:
            return {key for (key,) in self._db.execute("SELECT DISTINCT key FROM handles")}

    def remove_handle(self, owner: str, key: str) -> bool:
        """Whether it was there."""
        with self._transaction() as db:
            db.execute("DELETE FROM uses WHERE user = ?", (f"handle:{owner}:{key}",))
            return db.execute("DELETE FROM handles WHERE owner = ? AND key = ?", (owner, key)).rowcount > 0

    # room

    def clean(self, *, forget_seconds: float, grace_seconds: float = 600.0) -> None:
        """Removes results that have expired, ended jobs `forget_seconds` after that, and pictures that nobody uses.

        A job whose webhook is still to be delivered stays. Files that no row knows (of a process that was killed between
        two of its writes) go once they are `grace_seconds` old.
        """
        now = self._clock()
        with self._transaction() as db:
            expired = db.execute("SELECT result FROM jobs WHERE status = 'ready' AND expires <= ?", (now,)).fetchall()
            old = db.execute(
                "SELECT id FROM jobs WHERE status != 'pending' AND expires <= ? AND webhook_due IS NULL",
                (now - forget_seconds,),
            ).fetchall()
            for (id_,) in old:
                db.execute("DELETE FROM uses WHERE user = ?", (f"job:{id_}",))
                db.execute("DELETE FROM jobs WHERE id = ?", (id_,))
            unused = db.execute(
                "SELECT digest FROM pictures WHERE added <= ? AND digest NOT IN (SELECT digest FROM uses)",
                (now - grace_seconds,),
            ).fetchall()
            for (digest,) in unused:
                db.execute("DELETE FROM pictures WHERE digest = ?", (digest,))
                if (dropped := self._pictures.pop(digest, None)) is not None:
                    self._cached_bytes -= len(dropped.data)
                self.picture_file(digest).unlink(missing_ok=True)
            known = {f"{digest}.png" for (digest,) in db.execute("SELECT digest FROM pictures")}
            kept = {
                name
                for (text,) in db.execute("SELECT result FROM jobs WHERE status = 'ready' AND expires > ?", (now,))
                for name in json.loads(text).get("files", [])
            }
        for (text,) in expired:
            for name in json.loads(text).get("files", []):
                (self.folder / "results" / name).unlink(missing_ok=True)
        for folder, names in (("inputs", known), ("results", kept)):
            for file in (self.folder / folder).iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if file.name not in names and file.stat().st_mtime <= time.time() - grace_seconds:
                        file.unlink()


def _job(row: tuple[Any, ...]) -> Job:
    (id_, owner, created, status, request, ended, expires, result, idempotency, _, webhook, _, attempts, first) = row
    asked = json.loads(request)
    asked |= {name: tuple(asked[name]) for name in _TUPLES}
    return Job(
        id=id_, owner=owner, created=created, status=status, ended=ended, expires=expires, result=json.loads(result),
        idempotency=idempotency, webhook=Webhook(**json.loads(webhook)) if webhook else None, webhook_attempts=attempts,
        webhook_first=first, **asked,
    )  # fmt: skip


def _handle(row: tuple[Any, ...]) -> Handle:
    owner, key, created, described = row
    values = json.loads(described)
    return Handle(
        owner=owner, key=key, created=created, references=tuple(values.pop("references")), described=values
    )  # fmt: skip


def check_idempotency_key(key: str | None) -> str | None:
    """A key of 1 to 255 printable ASCII characters, or none. Raises `InvalidRequest`."""
    if key is not None and not (1 <= len(key) <= 255 and key.isascii() and key.isprintable()):
        raise InvalidRequest("idempotency_key", f"has {len(key)} characters; 1 to 255 printable ASCII ones are allowed")
    return key
