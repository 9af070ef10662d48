"""Signed URLs of results: whoever has one may read the picture until it expires.

Knows nothing of files and routes but the path of a result.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from urllib.parse import urlencode

from limner.errors import AccessDenied, NotFound
from limner.images import SUFFIXES
from limner.server.jobs.records import Job

__all__ = ["ResultUrls"]


class ResultUrls:
    """Make and check URLs under the secret of a job store."""

    def __init__(self, secret: bytes) -> None:
        self._key = hmac.new(secret, b"result urls", hashlib.sha256).digest()

    def of(self, job: Job, base: str) -> list[str]:
        """Return a URL under `base` for each picture of a job."""
        suffix, expires = SUFFIXES[job.output_format], int(job.expires or 0)
        urls = []
        for number in range(1, len(job.result.get("files", [])) + 1):
            query = urlencode({"expires": expires, "signature": self._signature(job.id, number, expires)})
            urls.append(f"{base}/v1/results/{job.id}/{number}{suffix}?{query}")
        return urls

    def check(self, id: str, number: int, expires: int, signature: str) -> None:
        """Raise `AccessDenied` for a URL that was not made here, and `NotFound` for one that has expired."""
        right = self._signature(id, number, expires)
        if not hmac.compare_digest(right.encode(), signature.encode("utf-8", "surrogatepass")):
            raise AccessDenied("signature: this URL was not made here, or was changed", missing=False)
        if expires <= time.time():
            raise NotFound("expires: this result has expired; ask for the picture again")

    def _signature(self, id: str, number: int, expires: int) -> str:
        text = f"{id}/{number}/{expires}".encode()
        return hmac.new(self._key, text, hashlib.sha256).hexdigest()
