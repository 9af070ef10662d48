"""Jobs that outlive the process: what was accepted, what became of it, and the pictures of both, in one storage.

Owns the tables and the picture files beside them. A job is written before it is answered, and it ends once: the row
says `pending` until one transaction makes it something else, however often it was begun. Of a job that is refused no
picture stays. Knows nothing of engines, HTTP, wire dialects or databases.

    tables                jobs, handles of references, which pictures they use, images made for each owner
    inputs/<digest>.png   processed reference pictures, each once, without loss
    results/<id>-<n>.png  results, until they expire
    secret                key of signed URLs, 32 random bytes
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import secrets
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from PIL import Image

from limner.errors import BudgetSpent, Conflict, InvalidRequest, LimnerError, OutputError
from limner.images import PreparedReference, ReferenceReport
from limner.server.jobs.storage import Connection, StorageUnavailable, open_storage

__all__ = ["Handle", "Job", "JobStore", "Status", "Webhook", "check_idempotency_key"]

_logger = logging.getLogger("limner.server")
Status = Literal["pending", "ready", "error", "request_moderated", "content_moderated", "cancelled"]
_REFUSED = ("request_moderated", "content_moderated")
_VERSION = 1
_CACHED_BYTES = 256 << 20
_SCHEMA = """
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, created {real} NOT NULL, status TEXT NOT NULL, request TEXT NOT NULL,
    ended {real}, expires {real}, result TEXT NOT NULL DEFAULT '{{}}', idempotency TEXT, fingerprint TEXT,
    webhook TEXT, webhook_due {real}, webhook_attempts INTEGER NOT NULL DEFAULT 0, webhook_first {real}
){strict};
CREATE INDEX jobs_by_owner ON jobs (owner, created);
CREATE INDEX jobs_pending ON jobs (created) WHERE status = 'pending';
CREATE INDEX jobs_by_expiry ON jobs (expires) WHERE expires IS NOT NULL;
CREATE INDEX jobs_due ON jobs (webhook_due) WHERE webhook_due IS NOT NULL;
CREATE UNIQUE INDEX jobs_idempotency ON jobs (owner, idempotency) WHERE idempotency IS NOT NULL;
CREATE TABLE handles (
    owner TEXT NOT NULL, key TEXT NOT NULL, created {real} NOT NULL, described TEXT NOT NULL, PRIMARY KEY (owner, key)
){strict};
CREATE TABLE uses (digest TEXT NOT NULL, "user" TEXT NOT NULL, PRIMARY KEY (digest, "user")){strict};
CREATE INDEX uses_by_user ON uses ("user");
CREATE TABLE spent (owner TEXT PRIMARY KEY, images INTEGER NOT NULL){strict};
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Webhook:
    """Where the end of a job is told, and the secret that signs it."""

    url: str
    secret: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One job. `references` say which pictures, in order, and what was done to this caller's; `options` is what others
    want back and does not change what is drawn.

    `drawn_seeds`: the caller left them to the server. `result` holds, by status: `files` and what is told of them,
    `finding`, or `error`. Times are seconds since the epoch.
    """

    owner: str
    prompt: str
    seeds: tuple[int, ...]
    drawn_seeds: bool = False
    references: tuple[ReferenceReport, ...] = ()
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
        del asked["options"]
        asked["references"] = [report.digest for report in self.references]
        asked["seeds"] = len(self.seeds) if self.drawn_seeds else self.seeds
        asked["webhook"] = asdict(self.webhook) if self.webhook else None
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _request(self) -> dict[str, Any]:
        asked = {name: getattr(self, name) for name in _REQUEST}
        return asked | {"references": [asdict(report) for report in self.references]}


_REQUEST = (
    "prompt",
    "seeds",
    "drawn_seeds",
    "width",
    "height",
    "num_steps",
    "priority",
    "timeout",
    "tolerance",
    "output_format",
    "quality",
    "options",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Handle:
    """References that were uploaded once: their content key, and what was done to their pictures, in order."""

    owner: str
    key: str
    references: tuple[ReferenceReport, ...]
    created: float = 0.0
    described: dict[str, Any] = field(default_factory=dict)


class JobStore:
    """The jobs of a folder, or of a database at a `postgresql://` URL; one process at a time.

    Safe to use from several threads; `clock` gives epoch seconds. Methods raise `OutputError` where the storage fails.
    """

    def __init__(self, data: str | os.PathLike[str], *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._pictures: OrderedDict[str, bytes] = OrderedDict()
        self._cached_bytes = 0
        self._storage = open_storage(data)
        self._lock = self._storage.lock
        try:
            self._storage.prepare(_SCHEMA, version=_VERSION)
            self.secret = self._secret()
        except BaseException:
            self._storage.close()
            raise

    @property
    def name(self) -> str:
        """Where the jobs are, without a password."""
        return self._storage.name

    def _secret(self) -> bytes:
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
        """Lets another process have the jobs. A second time does nothing."""
        self._storage.close()

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        return self._storage.rows(query, values)

    # jobs

    def add(
        self, job: Job, pictures: Sequence[PreparedReference] = (), *, budget: int | None = None
    ) -> tuple[Job, bool]:
        """Writes a job down; gives it as it is kept, and whether it is new.

        A second job under an idempotency key of its owner is the first one again, if it asks for the same; otherwise
        `Conflict` is raised. `pictures` are its references. `BudgetSpent` is raised where the owner would have more than
        `budget` images, all jobs taken together. What is refused leaves nothing behind.
        """
        with self._lock:
            known = self.known(job)
            if known is not None:
                return known, False
            job = replace(job, created=self._clock())
            with self._written(pictures), self._storage.transaction() as db:
                self._spend(db, job.owner, len(job.seeds), budget)
                self._use(db, job.references, user=f"job:{job.id}")
                db.execute(
                    "INSERT INTO jobs (id, owner, created, status, request, idempotency, fingerprint, webhook) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        job.id,
                        job.owner,
                        job.created,
                        job.status,
                        json.dumps(job._request()),
                        job.idempotency,
                        job.fingerprint if job.idempotency else None,
                        json.dumps(asdict(job.webhook)) if job.webhook else None,
                    ),
                )
        return job, True

    def known(self, job: Job) -> Job | None:
        """The job that its owner asked for under the same idempotency key. Raises `Conflict` if it is another one."""
        if job.idempotency is None:
            return None
        rows = self._rows("SELECT * FROM jobs WHERE owner = ? AND idempotency = ?", job.owner, job.idempotency)
        if not rows:
            return None
        known = _job(rows[0])
        if known.fingerprint != job.fingerprint:
            raise Conflict(f"idempotency_key: {job.idempotency!r} was used for another request; use a new one")
        return known

    def spent(self, owner: str) -> int:
        """Images of an owner's jobs that are ready or pending, also of those that are forgotten."""
        rows = self._rows("SELECT images FROM spent WHERE owner = ?", owner)
        return int(rows[0][0]) if rows else 0

    def _spend(self, db: Connection, owner: str, num_images: int, budget: int | None) -> None:
        spent = self.spent(owner)
        if budget is not None and spent + num_images > budget:
            raise BudgetSpent(
                f"num_images: {num_images} more would be over the budget of this key: {spent} of {budget} images are used"
            )
        db.execute(
            "INSERT INTO spent VALUES (?, ?) ON CONFLICT (owner) DO UPDATE SET images = spent.images + ?",
            (owner, num_images, num_images),
        )

    def get(self, id: str, *, owner: str | None = None) -> Job | None:
        """A job, if it is here (and is of that owner, if one is given)."""
        if "\0" in id:  # which not every database takes
            return None
        rows = self._rows("SELECT * FROM jobs WHERE id = ?", id)
        job = _job(rows[0]) if rows else None
        return job if job and owner in (None, job.owner) else None

    def pending(self) -> list[Job]:
        """Jobs that have not ended, the oldest first."""
        return [_job(row) for row in self._rows("SELECT * FROM jobs WHERE status = 'pending' ORDER BY created, id")]

    def of_owner(self, owner: str, *, limit: int = 50) -> list[Job]:
        """An owner's jobs, the newest first."""
        rows = self._rows("SELECT * FROM jobs WHERE owner = ? ORDER BY created DESC, id LIMIT ?", owner, limit)
        return [_job(row) for row in rows]

    def counts(self) -> dict[str, int]:
        """Number of jobs by status."""
        return dict(self._rows("SELECT status, count(*) FROM jobs GROUP BY status"))

    def end(self, id: str, status: Status, *, result: Mapping[str, Any], keep_seconds: float) -> Job | None:
        """Ends a job. None: it had ended before, or is gone, and stays as it is.

        Only images that are ready count against a budget. The references of a job that was refused go at once, unless
        another one has them.
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
            dropped = self._unused_without(db, f"job:{id}") if status in _REFUSED else []
        self._remove_files(dropped)
        return job

    def write_results(self, id: str, files: Sequence[bytes], *, suffix: str) -> list[str]:
        """Writes the pictures of a job, each whole, unless it has ended; gives their names."""
        names = [f"{id}-{number}.{suffix}" for number in range(1, len(files) + 1)]
        with self._storage.transaction() as db:  # another process may have had the storage meanwhile
            if db.execute("SELECT 1 FROM jobs WHERE id = ? AND status = 'pending'", (id,)).fetchone():
                for name, data in zip(names, files, strict=True):
                    self._storage.write_file(f"results/{name}", data)
        return names

    def read_result(self, job: Job, number: int) -> bytes | None:
        """A picture of a job that is ready, the first is 1; None: it has expired or never was."""
        names = job.result.get("files", [])
        if job.status != "ready" or not 1 <= number <= len(names) or (job.expires or 0) <= self._clock():
            return None
        try:
            return self._storage.read_file(f"results/{names[number - 1]}")
        except FileNotFoundError:
            return None

    # webhooks

    def due_webhooks(self) -> list[Job]:
        """Ended jobs whose webhook is due now."""
        rows = self._rows("SELECT * FROM jobs WHERE webhook_due <= ? ORDER BY webhook_due LIMIT 100", self._clock())
        return [_job(row) for row in rows]

    def webhook_attempted(self, id: str, *, again: float | None) -> None:
        """Notes an attempt, and when to try again; None: delivered, or given up."""
        with self._storage.transaction() as db:
            db.execute(
                "UPDATE jobs SET webhook_attempts = webhook_attempts + 1, webhook_due = ?, "
                "webhook_first = coalesce(webhook_first, ?) WHERE id = ?",
                (again, self._clock(), id),
            )

    # pictures

    @contextlib.contextmanager
    def _written(self, pictures: Sequence[PreparedReference]) -> Iterator[None]:
        """Writes pictures that are not there yet; takes them away again where the block fails."""
        made: list[str] = []
        try:
            for picture in pictures:
                digest = picture.report.digest
                file = _input(digest)
                if not self._storage.has_file(file):
                    buffer = io.BytesIO()
                    size = picture.report.processed_size
                    Image.frombytes("RGB", size, picture.data).save(buffer, "PNG", compress_level=1)
                    self._storage.write_file(file, buffer.getvalue())
                    made.append(digest)
                self._keep_picture(digest, picture.data)
            yield
        except StorageUnavailable:  # perhaps it was done; `clean` removes what nobody uses
            raise
        except BaseException:
            self._remove_files(made)
            raise

    def _use(self, db: Connection, reports: Sequence[ReferenceReport], *, user: str) -> None:
        for digest in {report.digest for report in reports}:
            if not self._storage.has_file(_input(digest)):
                raise LimnerError(f"picture {digest} is not kept; send it again")
            db.execute("INSERT INTO uses VALUES (?, ?) ON CONFLICT DO NOTHING", (digest, user))

    def _unused_without(self, db: Connection, user: str) -> list[str]:
        """Ends the uses of a user; the pictures that nobody has now, to be removed after the transaction."""
        digests = [digest for (digest,) in db.execute('SELECT digest FROM uses WHERE "user" = ?', (user,)).fetchall()]
        db.execute('DELETE FROM uses WHERE "user" = ?', (user,))
        return [d for d in digests if not db.execute("SELECT 1 FROM uses WHERE digest = ? LIMIT 1", (d,)).fetchone()]

    def _remove_files(self, digests: Sequence[str]) -> None:
        """What cannot be removed now is, by `clean`, later."""
        for digest in digests:
            self._cached_bytes -= len(self._pictures.pop(digest, b""))
        self._storage.remove_files([_input(digest) for digest in digests])

    def _keep_picture(self, digest: str, data: bytes) -> None:
        with self._lock:
            if digest not in self._pictures:
                self._cached_bytes += len(data)
                self._pictures[digest] = data
            self._pictures.move_to_end(digest)
            while self._cached_bytes > _CACHED_BYTES:
                self._cached_bytes -= len(self._pictures.popitem(last=False)[1])

    def picture(self, report: ReferenceReport) -> PreparedReference:
        """A kept reference. Raises `LimnerError` where its file is gone or is not what was written."""
        digest = report.digest
        with self._lock:
            if digest in self._pictures:
                self._pictures.move_to_end(digest)
                return PreparedReference(data=self._pictures[digest], report=report)
        try:
            with Image.open(io.BytesIO(self._storage.read_file(_input(digest))), formats=["PNG"]) as image:
                picture = PreparedReference(data=image.tobytes(), report=report)
        except (OSError, SyntaxError, ValueError) as error:
            _logger.warning("picture %s cannot be read again (%s)", digest, error)
            raise LimnerError(f"picture {digest} cannot be read again; send it again") from error
        if picture.computed_digest() != digest:
            raise LimnerError(f"picture {digest} was changed where it is kept; send it again")
        self._keep_picture(digest, picture.data)
        return picture

    def picture_png(self, digest: str) -> bytes:
        """The PNG file of a kept reference. Raises `LimnerError` where it is gone."""
        try:
            return self._storage.read_file(_input(digest))
        except OSError as error:
            raise LimnerError(f"picture {digest} cannot be read again; send it again") from error

    # handles of references

    def add_handle(self, handle: Handle, pictures: Sequence[PreparedReference], *, max_handles: int) -> Handle:
        """Keeps references under their content key for an owner; the same ones again take no more room.

        Raises `InvalidRequest` where the owner has `max_handles` others.
        """
        with self._lock:
            others = self._rows("SELECT count(*) FROM handles WHERE owner = ? AND key != ?", handle.owner, handle.key)
            if others[0][0] >= max_handles:
                raise InvalidRequest("references", f"{max_handles} are kept for you, which is the most; delete some")
            with self._written(pictures), self._storage.transaction() as db:
                self._use(db, handle.references, user=f"handle:{handle.owner}:{handle.key}")
                references = [asdict(report) for report in handle.references]
                db.execute(
                    "INSERT INTO handles VALUES (?, ?, ?, ?) "
                    "ON CONFLICT (owner, key) DO UPDATE SET described = excluded.described",
                    (
                        handle.owner,
                        handle.key,
                        self._clock(),
                        json.dumps({**handle.described, "references": references}),
                    ),
                )
            found = self.handle(handle.owner, handle.key)
        assert found is not None
        return found

    def handle(self, owner: str, key: str) -> Handle | None:
        """References of an owner, by their key."""
        rows = self._rows("SELECT * FROM handles WHERE owner = ? AND key = ?", owner, key)
        return _handle(rows[0]) if rows else None

    def handles(self, owner: str) -> list[Handle]:
        """All references of an owner, the newest first."""
        rows = self._rows("SELECT * FROM handles WHERE owner = ? ORDER BY created DESC, key", owner)
        return [_handle(row) for row in rows]

    def is_only_owner(self, owner: str, key: str) -> bool:
        """Whether nobody else has a handle of these references."""
        return not self._rows("SELECT 1 FROM handles WHERE key = ? AND owner != ? LIMIT 1", key, owner)

    def remove_handle(self, owner: str, key: str) -> bool:
        """Forgets references of an owner, with pictures that nobody else has; whether nobody has the key now."""
        with self._storage.transaction() as db:
            db.execute("DELETE FROM handles WHERE owner = ? AND key = ?", (owner, key))
            dropped = self._unused_without(db, f"handle:{owner}:{key}")
            is_last = db.execute("SELECT 1 FROM handles WHERE key = ? LIMIT 1", (key,)).fetchone() is None
        self._remove_files(dropped)
        return is_last

    # room

    def clean(self, *, forget_seconds: float, grace_seconds: float = 600.0) -> None:
        """Removes results that have expired, ended jobs `forget_seconds` after that, and pictures that nobody uses.

        A job whose webhook is still to be delivered stays. Files that no row knows (of a process that was killed between
        two of its writes) go once they are `grace_seconds` old.
        """
        now = self._clock()
        with self._lock:
            with self._storage.transaction() as db:
                old = db.execute(
                    "SELECT id FROM jobs WHERE status != 'pending' AND expires <= ? AND webhook_due IS NULL",
                    (now - forget_seconds,),
                ).fetchall()
                dropped = [digest for (id_,) in old for digest in self._unused_without(db, f"job:{id_}")]
                for row in old:
                    db.execute("DELETE FROM jobs WHERE id = ?", row)
            self._remove_files(dropped)
            used = {f"{digest}.png" for (digest,) in self._rows("SELECT DISTINCT digest FROM uses")}
            self._storage.remove_files(
                f"inputs/{name}"
                for name, age in self._storage.files("inputs")
                if name not in used and age >= grace_seconds
            )
        expires = dict(self._rows("SELECT id, expires FROM jobs WHERE status = 'ready'"))
        over: list[str] = []
        for name, age in self._storage.files("results"):
            end = expires.get(name.rpartition("-")[0])
            if age >= grace_seconds if end is None else end <= now:
                over.append(f"results/{name}")
        self._storage.remove_files(over)


def _input(digest: str) -> str:
    return f"inputs/{digest}.png"


def _job(row: tuple[Any, ...]) -> Job:
    (id_, owner, created, status, request, ended, expires, result, idempotency, _, webhook, _, attempts, first) = row
    asked = json.loads(request)
    asked |= {"seeds": tuple(asked["seeds"]), "references": _reports(asked["references"])}
    return Job(
        id=id_,
        owner=owner,
        created=created,
        status=status,
        ended=ended,
        expires=expires,
        result=json.loads(result),
        idempotency=idempotency,
        webhook=Webhook(**json.loads(webhook)) if webhook else None,
        webhook_attempts=attempts,
        webhook_first=first,
        **asked,
    )


def _handle(row: tuple[Any, ...]) -> Handle:
    owner, key, created, described = row
    values = json.loads(described)
    return Handle(
        owner=owner, key=key, created=created, references=_reports(values.pop("references")), described=values
    )


def _reports(found: Sequence[Mapping[str, Any]]) -> tuple[ReferenceReport, ...]:
    """Reports from JSON, which knows no tuples."""
    return tuple(
        ReferenceReport(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})  # type: ignore[arg-type]
        for values in found
    )


def check_idempotency_key(key: str | None) -> str | None:
    """A key of 1 to 255 printable ASCII characters, or none. Raises `InvalidRequest`."""
    if key is not None and not (1 <= len(key) <= 255 and key.isascii() and key.isprintable()):
        raise InvalidRequest("idempotency_key", f"has {len(key)} characters; 1 to 255 printable ASCII ones are allowed")
    return key
