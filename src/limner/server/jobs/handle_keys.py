"""The content keys of K/V that were made from the pictures of handles, whoever made them.

A job with LoRAs of its own, or with a part of a picture, has K/V under another key than the handle of its pictures. Its row
says which; of a job that is removed it is noted here, while somebody has a handle of the same pictures. Knows no engines
and no store of K/V.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from limner.server.jobs.rows import read_job
from limner.server.jobs.storage import Connection, Storage

__all__ = ["HandleKeys"]

# data of earlier versions have no such table
_TABLE = (
    "CREATE TABLE IF NOT EXISTS handle_keys (pictures TEXT NOT NULL, key TEXT NOT NULL, PRIMARY KEY (pictures, key))"
)


class HandleKeys:
    """The keys in one storage. A handle is named by its owner and its key; `pictures` are digests, in whatever order."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def prepare(self) -> None:
        """Make room for notes. Raises `OutputError`."""
        with self._storage.transaction() as db:
            db.execute(_TABLE)

    def note(self, db: Connection, job: str) -> None:
        """Note the key of a job, whose row or pictures are about to be removed."""
        row = db.execute("SELECT * FROM jobs WHERE id = ?", (job,)).fetchone()
        if row is None:
            return
        found = read_job(row)
        key, pictures = found.result.get("reference_key"), {report.digest for report in found.references}
        if key and any(of_handle != key for _, of_handle in _handles(db, pictures)):
            db.execute("INSERT INTO handle_keys VALUES (?, ?) ON CONFLICT DO NOTHING", (_name(pictures), key))

    def of(self, owner: str, handle: str) -> list[str]:
        """Return the keys of K/V that were made from the pictures of a handle: its own first."""
        user = _user(owner, handle)
        pictures = {digest for (digest,) in self._storage.rows('SELECT digest FROM uses WHERE "user" = ?', (user,))}
        noted = self._storage.rows("SELECT key FROM handle_keys WHERE pictures = ?", (_name(pictures),))
        keys = dict.fromkeys([handle, *(key for (key,) in noted)])
        jobs = self._storage.rows(
            'SELECT jobs.* FROM uses JOIN jobs ON jobs.id = substr(uses."user", 5) '
            "WHERE uses.digest = ? AND substr(uses.\"user\", 1, 4) = 'job:' AND jobs.status = 'ready'",
            (min(pictures, default=""),),
        )
        for job in map(read_job, jobs):
            key = job.result.get("reference_key")
            if key and {report.digest for report in job.references} == pictures:
                keys[key] = None
        return list(keys)

    def free(self, db: Connection, owner: str, handle: str, keys: Iterable[str]) -> list[str]:
        """Return those of `keys`, which `of` gave, that no other handle is for: of that key, or of the same pictures."""
        is_shared = bool(self._others(db, owner, handle))

        def is_free(key: str) -> bool:
            if is_shared and key != handle:
                return False
            query = "SELECT 1 FROM handles WHERE key = ? AND NOT (owner = ? AND key = ?) LIMIT 1"
            return db.execute(query, (key, owner, handle)).fetchone() is None

        return [key for key in keys if is_free(key)]

    def forget(self, db: Connection, owner: str, handle: str) -> None:
        """Remove the notes for a handle that is about to be removed, unless another has the same pictures."""
        if not self._others(db, owner, handle):
            db.execute("DELETE FROM handle_keys WHERE pictures = ?", (_name(_pictures(db, _user(owner, handle))),))

    def _others(self, db: Connection, owner: str, handle: str) -> set[tuple[str, str]]:
        return _handles(db, _pictures(db, _user(owner, handle))) - {(owner, handle)}


def _handles(db: Connection, pictures: set[str]) -> set[tuple[str, str]]:
    """Return owner and key of each handle of just these pictures."""
    # handles come before jobs in the table's index: those of a popular picture, which are many, are not read
    query = 'SELECT "user" FROM uses WHERE digest = ? AND "user" < ? AND substr("user", 1, 7) = ?'
    users = [user for (user,) in db.execute(query, (min(pictures, default=""), "job:", "handle:")).fetchall()]
    found = [user.removeprefix("handle:").rpartition(":") for user in users if _pictures(db, user) == pictures]
    return {(owner, key) for owner, _, key in found}


def _pictures(db: Connection, user: str) -> set[str]:
    return {digest for (digest,) in db.execute('SELECT digest FROM uses WHERE "user" = ?', (user,)).fetchall()}


def _user(owner: str, handle: str) -> str:
    return f"handle:{owner}:{handle}"


def _name(pictures: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(pictures)).encode()).hexdigest()
