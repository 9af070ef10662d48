"""Everything that works on jobs, built, started and stopped together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from limner.engine.protocol import Backend
from limner.outbound.client import OutboundClient
from limner.server.access.limits import Limiter
from limner.server.jobs.cleaner import Cleaner
from limner.server.jobs.known_references import KnownReferences
from limner.server.jobs.moderation import Moderation
from limner.server.jobs.offload import Offload
from limner.server.jobs.prefills import Prefills
from limner.server.jobs.records import Job
from limner.server.jobs.results import ResultWriter
from limner.server.jobs.runner import JobRunner
from limner.server.jobs.settings import RunnerSettings
from limner.server.jobs.store import JobStore
from limner.server.jobs.webhook_sender import WebhookSender
from limner.trust.provenance import Signer
from limner.trust.safety import Checks

__all__ = ["JobWork"]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class JobWork:
    """The parts that work on the jobs of one store, in one event loop. It is started and stopped once."""

    offload: Offload
    moderation: Moderation
    prefills: Prefills
    known: KnownReferences
    webhooks: WebhookSender
    runner: JobRunner
    cleaner: Cleaner

    @classmethod
    def build(
        cls,
        *,
        engine: Backend,
        jobs: JobStore,
        limiter: Limiter,
        checks: Checks,
        signer: Signer | None,
        webhook_client: OutboundClient | None,
        describe: Callable[[Job], dict[str, Any]],
        settings: RunnerSettings,
        shared_references: bool,
    ) -> Self:
        """Build the parts. `describe` gives the body of a job's webhook; without `webhook_client` none is sent.

        `shared_references`: every owner is told of all K/V, as `KnownReferences` says.
        """
        offload = Offload()
        known = KnownReferences(jobs, offload=offload, is_shared=shared_references)
        moderation = Moderation(checks, offload=offload)
        webhooks = WebhookSender(
            jobs=jobs, offload=offload, client=webhook_client, policy=settings.webhooks, describe=describe
        )
        runner = JobRunner(
            engine=engine,
            jobs=jobs,
            limiter=limiter,
            offload=offload,
            moderation=moderation,
            results=ResultWriter(engine=engine, jobs=jobs, offload=offload, known=known, signer=signer),
            webhooks=webhooks,
            settings=settings,
        )
        cleaner = Cleaner(
            jobs=jobs,
            offload=offload,
            every=settings.clean_every,
            give_back_every=settings.give_back_every,
            keep_jobs=settings.keep_jobs,
            keep_bytes=settings.keep_bytes,
            adopt_lost=runner.adopt_lost,
        )
        return cls(
            offload=offload,
            moderation=moderation,
            prefills=Prefills(engine),
            known=known,
            webhooks=webhooks,
            runner=runner,
            cleaner=cleaner,
        )

    async def start(self) -> None:
        """Continue the jobs of an earlier process, send webhooks, and clean."""
        await self.runner.start()
        self.webhooks.start()
        self.cleaner.start()

    async def stop(self) -> None:
        """Finish what can be finished in time, and stop the engine and all threads."""
        await self.runner.stop()
        self.prefills.close()
        await self.webhooks.stop()
        await self.cleaner.stop()
        self.offload.close()
