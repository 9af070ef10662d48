"""What a job store has room for: what expired is removed, what owners want forgotten, and the oldest beyond a size.

Knows nothing of engines and HTTP, and no job beyond the row that it removes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from limner.server.jobs.pictures import PictureFiles
from limner.server.jobs.storage import Connection, Storage

__all__ = ["Room"]

_GRACE_SECONDS = 600.0
_YOUNG_SECONDS = 60.0
"""Results stay for so long at least, however large they are: their caller may be fetching them."""
_AT_ONCE = 200


class Room:
    """Removes jobs, results and pictures of one storage. `now` in the methods is the time of the store's clock."""

    def __init__(self, storage: Storage, pictures: PictureFiles) -> None:
        self._storage = storage
        self._pictures = pictures

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

        A job whose webhook is still to be delivered keeps its row until then, and nothing else.
        """
        removed = 0
        for start in range(0, len(ids), _AT_ONCE):  # others wait for the lock
            part = ids[start : start + _AT_ONCE]
            with self._storage.lock:
                with self._storage.transaction() as db:
                    marks = ", ".join("?" * len(part))
                    rows = db.execute(
                        f"SELECT id, webhook_due IS NULL FROM jobs WHERE status != 'pending' AND id IN ({marks})", part
                    ).fetchall()
                    unused = self._delete(db, [id_ for id_, is_told in rows if is_told])
                    for id_, is_told in rows:
                        if not is_told:
                            db.execute("UPDATE jobs SET expires = 0 WHERE id = ?", (id_,))
                self._pictures.remove(unused)
                self._storage.remove_files(self._results_of({id_ for id_, _ in rows}))
            removed += len(rows)
        return removed

    def forget_all(self, owner: str) -> int:
        """Remove all ended jobs of an owner as `forget` does. Return how many were removed."""
        rows = self._storage.rows("SELECT id FROM jobs WHERE owner = ? AND status != 'pending'", (owner,))
        return self.forget([id_ for (id_,) in rows])

    def trim(self, now: float, *, max_bytes: int) -> int:
        """Remove the oldest ended jobs while results and pictures have more bytes. Return how many were removed.

        Pictures of references that are kept for an owner stay.
        """
        removed = 0
        while (over := self.num_bytes() - max_bytes) > 0:
            rows = self._storage.rows(
                "SELECT id FROM jobs WHERE status != 'pending' AND ended <= ? AND webhook_due IS NULL "
                "ORDER BY ended, id LIMIT ?",
                (now - _YOUNG_SECONDS, _AT_ONCE),
            )
            sizes, oldest = self._result_sizes(), []
            for (id_,) in rows:
                oldest.append(id_)
                over -= sizes[id_]
                if over <= 0:
                    break
            if not (found := self.forget(oldest)):
                break  # what is left is pending, young or kept as references
            removed += found
        return removed

    def _result_sizes(self) -> Counter[str]:
        """Return the bytes of results by job."""
        sizes: Counter[str] = Counter()
        for name, _, size in self._storage.files("results"):
            sizes[_job_of(name)] += size
        return sizes

    def num_bytes(self) -> int:
        """Return the bytes of results and pictures."""
        return sum(size for folder in ("results", "inputs") for _, _, size in self._storage.files(folder))

    def _delete(self, db: Connection, ids: Iterable[str]) -> list[str]:
        """Remove rows. Return pictures without users, to be removed after the transaction."""
        unused: list[str] = []
        for id_ in ids:
            unused += self._pictures.release(db, user=f"job:{id_}")
            db.execute("DELETE FROM jobs WHERE id = ?", (id_,))
        return unused

    def _results_of(self, ids: set[str]) -> list[str]:
        return [f"results/{name}" for name, *_ in self._storage.files("results") if _job_of(name) in ids]

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


def _job_of(name: str) -> str:
    """The id of the job that a file of results belongs to."""
    return name.rpartition("-")[0]
