"""How long jobs and results are stored, how a shutdown waits, and how webhooks are repeated."""

from __future__ import annotations

from dataclasses import dataclass, field

from limner.options import ServiceOptions
from limner.server.jobs.webhooks import Delivery

__all__ = ["FOR_GOOD", "KEEP_SECONDS", "OPEN_BYTES", "RunnerSettings"]

KEEP_SECONDS = 600.0
"""Seconds for which a service with keys keeps results, unless it is told."""
FOR_GOOD = 10 * 365 * 86400.0
"""Seconds for which results are kept that only room limits. URLs of results end, so there has to be a number."""

OPEN_BYTES = 2 << 30
"""What a service without keys keeps of results and pictures of jobs, unless it is told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerSettings:
    """Settings of jobs; times in seconds.

    Results are served for `keep_results`, jobs are known for `keep_jobs` longer. With `keep_bytes` the oldest jobs go when
    results and pictures of jobs have more bytes. A shutdown waits for `drain`.
    `images_per_key`: images that an owner may have over all jobs in the store; None: any number.
    """

    keep_results: float = KEEP_SECONDS
    keep_bytes: int | None = None
    keep_jobs: float = 86400.0
    drain: float = ServiceOptions.drain
    clean_every: float = 60.0
    give_back_every: float = 10.0
    webhooks: Delivery = field(default_factory=Delivery)
    images_per_key: int | None = ServiceOptions.images_per_key

    @classmethod
    def of(cls, options: ServiceOptions, *, is_open: bool) -> RunnerSettings:
        """The settings that options ask for. A service without keys (`is_open`) is one person's, and keeps a history."""
        seconds, num_bytes = options.keep_results, options.keep_bytes
        return cls(
            keep_results=(FOR_GOOD if is_open else KEEP_SECONDS) if seconds is None else seconds,
            keep_bytes=OPEN_BYTES if num_bytes is None and is_open else num_bytes,
            drain=options.drain,
            images_per_key=options.images_per_key,
        )
