"""Sends the webhooks that are due, and notes each attempt in the job store.

Works in one event loop. What a webhook says of a job is given; how one attempt is made is in `webhooks`. Places are
shared: neither an owner nor a receiver whose webhooks hang keeps those of others waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import random
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from limner.errors import LimnerError
from limner.outbound.client import OutboundClient
from limner.server.descriptors import reserved
from limner.server.jobs.offload import LONGEST_PAUSE, Offload
from limner.server.jobs.places import Places
from limner.server.jobs.records import Job
from limner.server.jobs.store import JobStore
from limner.server.jobs.tasks import Tasks
from limner.server.jobs.webhooks import Delivery, Outcome, deliver, next_attempt

__all__ = ["WebhookSender"]

_logger = logging.getLogger("limner.server")
_MAX_CONCURRENT = 64
_POLL_SECONDS = 1.0


class WebhookSender:
    """Deliver webhooks at least once. `client` None: webhooks are switched off, and those that are due are given up.

    `describe` gives the JSON body for a job.
    """

    def __init__(
        self,
        *,
        jobs: JobStore,
        offload: Offload,
        client: OutboundClient | None,
        policy: Delivery,
        describe: Callable[[Job], dict[str, Any]],
    ) -> None:
        self._jobs = jobs
        self._offload = offload
        self._client = client
        self._policy = policy
        self._describe = describe
        self._due = asyncio.Event()
        self._tasks = Tasks()
        self._places = Places(total=max(8, min(_MAX_CONCURRENT, reserved() // 3)))
        self._under_way: set[str] = set()
        self._paused: dict[str, float] = {}  # attempts that could not be noted, until when, by the loop's clock

    def start(self) -> None:
        self._tasks.spawn(self._send_due())

    async def stop(self) -> None:
        """Break off. Webhooks under way stay due for the next start."""
        await self._tasks.cancel()

    def wake(self) -> None:
        """Look for due webhooks now: a job with one has ended."""
        self._due.set()

    async def _send_due(self) -> None:
        """Send many at once, in places that owners and receivers share."""
        due: list[Job] | None = []
        while True:
            self._due.clear()
            before = due
            try:
                due = await self._offload.store(self._jobs.due_webhooks)
            except LimnerError as error:
                due = None
                if before is not None:  # once an outage
                    _logger.error("webhooks that are due cannot be read, and wait: %s", error)
            self._begin(due or [])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_SECONDS):  # `wait_for` of Python 3.11 may forget a cancellation
                    await self._due.wait()

    def _begin(self, due: list[Job]) -> None:
        now = asyncio.get_running_loop().time()
        self._paused = {id: until for id, until in self._paused.items() if until > now}
        waiting = [job for job in due if job.id not in self._under_way and job.id not in self._paused]
        for index in self._places.take([(job.owner, _receiver(job)) for job in waiting]):
            job = waiting[index]
            self._under_way.add(job.id)
            self._tasks.spawn(self._send(job)).add_done_callback(functools.partial(self._sent, job))

    def _sent(self, job: Job, task: asyncio.Task[None]) -> None:
        self._under_way.discard(job.id)
        self._places.give_back(job.owner, _receiver(job))
        self._due.set()

    async def _send(self, job: Job) -> None:
        """Make one attempt, then note it: a crash in between repeats the attempt."""
        again = await self._attempt(job)
        try:
            await self._offload.store(self._jobs.webhook_attempted, job.id, again=again)
        except LimnerError:  # it stays due; pause, so that the receiver is not called again and again for our fault
            _logger.exception("the attempt at the webhook of %s cannot be noted", job.id)
            self._paused[job.id] = asyncio.get_running_loop().time() + LONGEST_PAUSE

    async def _attempt(self, job: Job) -> float | None:
        """Return when to try again; None: delivered, or given up."""
        assert job.webhook is not None
        if self._client is None:
            _logger.error("webhook of %s is given up: webhooks are switched off", job.id)
            return None
        body = json.dumps(self._describe(job)).encode()
        result = await deliver(job.webhook.url, body, job.webhook.secret, client=self._client)
        again = None
        if result.outcome is Outcome.RETRY:
            now = time.time()
            first = job.webhook_first or now
            again = next_attempt(
                job.webhook_attempts + 1, now, random.Random(), first_attempt=first, policy=self._policy
            )
        if result.outcome is not Outcome.DELIVERED:
            _logger.warning("webhook of %s: %s%s", job.id, result.problem, "" if again else "; given up")
        return again


def _receiver(job: Job) -> str:
    """Return the host that a webhook goes to."""
    assert job.webhook is not None
    return urlsplit(job.webhook.url).netloc.rpartition("@")[2].lower()
