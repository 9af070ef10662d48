"""The processed reference pictures of jobs and handles: files, who uses them, and pixels cached in memory.

Each picture is stored once, as a PNG file named by its digest. The table `uses` says which jobs and handles need it; the
last use that ends removes the file. Knows nothing of jobs and handles but their names as users.
"""

from __future__ import annotations

import contextlib
import io
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from PIL import Image

from limner.errors import LimnerError
from limner.images import PreparedReference, ReferenceReport
from limner.server.jobs.storage import Connection, Storage, StorageFull, StorageUnavailable

__all__ = ["PictureFiles"]

_logger = logging.getLogger("limner.server")
MAX_CACHED_BYTES = 256 << 20


class PictureFiles:
    """The pictures in one storage. Safe to use from several threads."""

    def __init__(self, storage: Storage, *, max_cached_bytes: int = MAX_CACHED_BYTES) -> None:
        self._storage = storage
        self._cache = _Cache(max_cached_bytes)

    @property
    def cached_bytes(self) -> int:
        return self._cache.nbytes

    def encode(self, pictures: Iterable[PreparedReference]) -> dict[str, bytes]:
        """Return the files of pictures that are missing, by digest: work that is done before the storage is held."""
        missing = {p.report.digest: p for p in pictures if not self._storage.has_file(_file(p.report.digest))}
        return {digest: _png(picture) for digest, picture in missing.items()}

    @contextlib.contextmanager
    def written(self, pictures: Sequence[PreparedReference], files: Mapping[str, bytes]) -> Iterator[None]:
        """Write the pictures that are missing, from `files` if they are there; remove them again if the block raises."""
        new: list[str] = []
        try:
            for picture in pictures:
                digest = picture.report.digest
                if not self._storage.has_file(_file(digest)):
                    self._storage.write_file(_file(digest), files.get(digest) or _png(picture))
                    new.append(digest)
                self._cache.put(digest, picture.data)
            yield
        except BaseException as error:
            # where the storage did not answer the block may have succeeded; `remove_unused` removes what nobody uses
            if not isinstance(error, StorageUnavailable) or isinstance(error, StorageFull):
                self.remove(new)
            raise

    def use(self, db: Connection, reports: Iterable[ReferenceReport], *, user: str) -> None:
        """Note a user of pictures. Raises `LimnerError` if the file of one is missing."""
        for digest in {report.digest for report in reports}:
            if not self._storage.has_file(_file(digest)):
                raise LimnerError(f"picture {digest} is not kept; send it again")
            db.execute('INSERT INTO uses (digest, "user") VALUES (?, ?) ON CONFLICT DO NOTHING', (digest, user))

    def release(self, db: Connection, *, user: str) -> list[str]:
        """End the uses of a user. Return the pictures without users, to be removed after the transaction."""
        digests = [digest for (digest,) in db.execute('SELECT digest FROM uses WHERE "user" = ?', (user,)).fetchall()]
        db.execute('DELETE FROM uses WHERE "user" = ?', (user,))
        return [d for d in digests if not db.execute("SELECT 1 FROM uses WHERE digest = ? LIMIT 1", (d,)).fetchone()]

    def remove(self, digests: Sequence[str]) -> None:
        """Remove pictures. `remove_unused` tries again later where that fails."""
        for digest in digests:
            self._cache.drop(digest)
        self._storage.remove_files([_file(digest) for digest in digests])

    def remove_unused(self, *, grace_seconds: float) -> None:
        """Remove files that have no user and were written at least `grace_seconds` ago."""
        used = {f"{digest}.png" for (digest,) in self._storage.rows("SELECT DISTINCT digest FROM uses")}
        self._storage.remove_files(
            f"inputs/{name}"
            for name, age, _ in self._storage.files("inputs")
            if name not in used and age >= grace_seconds
        )

    def read(self, report: ReferenceReport) -> PreparedReference:
        """Return a picture with its report. Raises `LimnerError` if its file is gone, damaged or changed."""
        digest = report.digest
        cached = self._cache.get(digest)
        if cached is not None:
            return PreparedReference(data=cached, report=report)
        try:
            with Image.open(io.BytesIO(self._storage.read_file(_file(digest))), formats=["PNG"]) as image:
                picture = PreparedReference(data=image.tobytes(), report=report)
        except (OSError, SyntaxError, ValueError) as error:
            _logger.warning("picture %s cannot be read again (%s)", digest, error)
            raise LimnerError(f"picture {digest} cannot be read again; send it again") from error
        if picture.computed_digest() != digest:
            raise LimnerError(f"picture {digest} was changed where it is kept; send it again")
        self._cache.put(digest, picture.data)
        return picture

    def read_png(self, digest: str) -> bytes:
        """Return the PNG file of a picture. Raises `LimnerError` if it is gone."""
        try:
            return self._storage.read_file(_file(digest))
        except OSError as error:
            raise LimnerError(f"picture {digest} cannot be read again; send it again") from error


class _Cache:
    """Pixels by digest, up to a number of bytes; the least recently used go first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._pixels: OrderedDict[str, bytes] = OrderedDict()
        self.nbytes = 0

    def get(self, digest: str) -> bytes | None:
        with self._lock:
            if digest in self._pixels:
                self._pixels.move_to_end(digest)
            return self._pixels.get(digest)

    def put(self, digest: str, pixels: bytes) -> None:
        with self._lock:
            if digest not in self._pixels:
                self.nbytes += len(pixels)
                self._pixels[digest] = pixels
            self._pixels.move_to_end(digest)
            while self.nbytes > self._max_bytes:
                self.nbytes -= len(self._pixels.popitem(last=False)[1])

    def drop(self, digest: str) -> None:
        with self._lock:
            self.nbytes -= len(self._pixels.pop(digest, b""))


def _png(picture: PreparedReference) -> bytes:
    buffer = io.BytesIO()
    size = picture.report.processed_size
    Image.frombytes("RGB", size, picture.data).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _file(digest: str) -> str:
    return f"inputs/{digest}.png"
