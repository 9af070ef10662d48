"""What a job store has room for: what expired is removed, what owners want forgotten, and the oldest beyond a size.

Knows nothing of engines and HTTP, and no job beyond the row that it removes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from limner.images import SUFFIXES
from limner.server.jobs.handle_keys import HandleKeys
from limner.server.jobs.pictures import PictureFiles
from limner.server.jobs.storage import Connection, Storage

__all__ = ["NOT_FORGOTTEN", "Room", "result_names"]

NOT_FORGOTTEN = "coalesce(expires, 1) != 0"
"""Of a row: its owner has not had the job removed. One that was, and has a webhook to be delivered, expired at 0."""
_GRACE_SECONDS = 600.0
_YOUNG_SECONDS = 60.0
"""Results stay for so long at least, however large they are: their caller may be fetching them."""
_AT_ONCE = 200


class Room:
    """Removes jobs, results and pictures of one storage. `now` in the methods is the time of the store's clock."""

    def __init__(self, storage: Storage, pictures: PictureFiles, keys: HandleKeys) -> None:
        self._storage = storage
        self._pictures = pictures
        self._keys = keys

    def clean(self, now: float, *, forget_seconds: float, grace_seconds: float = _GRACE_SECONDS) -> None:
        """See `JobStore.clean`."""
        with self._storage.lock:
            with self._storage.transaction() as db:
                old = db.execute(
                    "SELECT id FROM jobs WHERE status != 'pending' AND expires <= ? AND webhook_due IS NULL",
                    (now - forget_seconds,),
                ).fetchall()
                unused = self._delete(db, [id_ for (id_,) in old])
            self._pictures.remove(unused)
            self._pictures.remove_unused(grace_seconds=grace_seconds)
        self._remove_expired_results(now, grace_seconds)

    def forget(self, ids: Sequence[str]) -> int:
        """Remove ended jobs with their results, and pictures that nobody else uses. Return how many were removed.

        A job whose webhook is still to be delivered keeps its row until then, and nothing else: callers do not find it, and
        its idempotency key is free.
        """
        removed = 0
        for start in range(0, len(ids), _AT_ONCE):  # others wait for the lock
            removed += self._forget(ids[start : start + _AT_ONCE])[0]
        return removed

    def _forget(self, ids: Sequence[str]) -> tuple[int, list[str]]:
        """Remove jobs of those ids, as `forget` does. Return how many, and their files."""
        marks = ", ".join("?" * len(ids))
        with self._storage.lock:
            with self._storage.transaction() as db:
                rows = db.execute(
                    "SELECT id, webhook_due IS NULL, request, result FROM jobs "
                    f"WHERE status != 'pending' AND {NOT_FORGOTTEN} AND id IN ({marks})",
                    ids,
                ).fetchall()
                unused = self._delete(db, [id_ for id_, is_told, _, _ in rows if is_told])
                for id_, is_told, _, _ in rows:
                    if not is_told:
                        self._keys.note(db, id_)
                        unused += self._pictures.release(db, user=f"job:{id_}")
                        db.execute(
                            "UPDATE jobs SET expires = 0, idempotency = NULL, fingerprint = NULL WHERE id = ?", (id_,)
                        )
            self._pictures.remove(unused)
            files = [f"results/{name}" for id_, _, *told in rows for name in _files_of(id_, *told)]
            self._storage.remove_files(files)
        return len(rows), [*files, *(f"inputs/{digest}.png" for digest in unused)]

    def forget_all(self, owner: str) -> int:
        """Remove all ended jobs of an owner as `forget` does. Return how many were removed."""
        query = f"SELECT id FROM jobs WHERE owner = ? AND status != 'pending' AND {NOT_FORGOTTEN}"
        rows = self._storage.rows(query, (owner,))
        return self.forget([id_ for (id_,) in rows])

    def trim(self, now: float, *, max_bytes: int) -> int:
        """Remove the oldest ended jobs while results and pictures of jobs have more bytes. Return how many were removed.

        Pictures of references that are kept for an owner do not count, and stay.
        """
        found = self._storage.rows('SELECT DISTINCT digest FROM uses WHERE substr("user", 1, 7) = ?', ("handle:",))
        kept = {f"{digest}.png" for (digest,) in found}
        sizes = {f"results/{name}": size for name, _, size in self._storage.files("results")}
        sizes |= {f"inputs/{name}": size for name, _, size in self._storage.files("inputs") if name not in kept}
        over, removed = sum(sizes.values()) - max_bytes, 0
        while over > 0:
            before = removed
            rows = self._storage.rows(
                f"SELECT id FROM jobs WHERE status != 'pending' AND {NOT_FORGOTTEN} AND ended <= ? "
                "AND webhook_due IS NULL ORDER BY ended, id LIMIT ?",
                (now - _YOUNG_SECONDS, _AT_ONCE),
            )
            for (id_,) in rows:
                count, files = self._forget([id_])
                over -= sum(sizes.get(file, 0) for file in files)
                removed += count
                if over <= 0:
                    break
            if removed == before:
                break  # what is left is pending, young or kept as references
        return removed

    def _delete(self, db: Connection, ids: Iterable[str]) -> list[str]:
        """Remove rows. Return pictures without users, to be removed after the transaction."""
        unused: list[str] = []
        for id_ in ids:
            self._keys.note(db, id_)
            unused += self._pictures.release(db, user=f"job:{id_}")
            db.execute("DELETE FROM jobs WHERE id = ?", (id_,))
        return unused

    def _remove_expired_results(self, now: float, grace_seconds: float) -> None:
        rows = self._storage.rows("SELECT id, expires FROM jobs WHERE status IN ('ready', 'pending')")
        expires: dict[str, float | None] = dict(rows)
        expired: list[str] = []
        for name, age, _ in self._storage.files("results"):
            id_ = _job_of(name)
            end = expires.get(id_)
            # those of a pending job stay, however long it takes to note its end, and whatever the clock says
            is_left = id_ not in expires and age >= grace_seconds
            if is_left or (end is not None and end <= now):
                expired.append(f"results/{name}")
        self._storage.remove_files(expired)


def result_names(id: str, num_images: int, *, suffix: str, kind: str = "") -> list[str]:
    """Return the names of a job's files with pictures of one kind: "" for results, "map" for maps."""
    return [f"{id}-{kind}{number}.{suffix}" for number in range(1, num_images + 1)]


def _files_of(id: str, request: str, result: str) -> list[str]:
    """The names of a job's files; a version that is not known may have written the row.

    They are in its result, or were written before the job failed, and follow from the request.
    """
    told, asked = _object(result), _object(request)
    lists = [told.get("files"), told.get("maps")]
    names = [name for names in lists if isinstance(names, list) for name in names]
    seeds, suffix = asked.get("seeds"), SUFFIXES.get(str(asked.get("output_format")), "").removeprefix(".")
    if isinstance(seeds, list) and suffix:
        names += result_names(id, len(seeds), suffix=suffix) + result_names(id, len(seeds), suffix="png", kind="map")
    return list(dict.fromkeys(name for name in names if isinstance(name, str) and _job_of(name) == id))


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _job_of(name: str) -> str:
    """The id of the job that a file of results belongs to."""
    return name.rpartition("-")[0]
