"""How long jobs and results are stored, how a shutdown waits, and how webhooks are repeated."""

from __future__ import annotations

from dataclasses import dataclass, field

from limner.options import ServiceOptions
from limner.server.jobs.webhooks import Delivery

__all__ = ["RunnerSettings"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerSettings:
    """Settings of jobs; times in seconds.

    Results are served for `keep_results`, jobs are known for `keep_jobs` longer. A shutdown waits for `drain`.
    `images_per_key`: images that an owner may have over all jobs in the store; None: any number.
    """

    keep_results: float = ServiceOptions.keep_results
    keep_jobs: float = 86400.0
    drain: float = ServiceOptions.drain
    clean_every: float = 60.0
    give_back_every: float = 10.0
    webhooks: Delivery = field(default_factory=Delivery)
    images_per_key: int | None = ServiceOptions.images_per_key
