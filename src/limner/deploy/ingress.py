"""The ingress: the application of `limner serve`, over the replicas.

Owns the application's start on Ray Serve, and `RayReplicas`, which calls replicas by their handle and tells which of
Ray's errors mean a lost replica. Knows no wire schemas.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from limner.deploy.remote import LostReplica, RemoteEngine
from limner.engine import EditRequest, Event, Failed, Finished, ModelCard, Prefilled, PrefillRequest
from limner.engine.about import about_model
from limner.errors import InvalidRequest, RemoteError, first_line
from limner.memory.free import spare_garbage_collector
from limner.server.application import build_app
from limner.server.http.errors import error_body
from limner.server.http.limits import LoopbackCallers
from limner.server.jobs.storage import StorageInUse
from limner.server.logs import log_own
from limner.store import StoreStats

if TYPE_CHECKING:
    from limner.deploy.options import DeployOptions

__all__ = ["GRACE_SECONDS", "IngressApp", "RayReplicas"]

_logger = logging.getLogger("limner.server")
GRACE_SECONDS = 15.0
"""For what is left to do at a shutdown after the `drain` of the options."""
_CONTROL_SECONDS = 5.0
_RETRY_SECONDS = 0.5


class RayReplicas:
    """`limner.deploy.remote.Replicas` over the handle of the deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._draw = handle.options(method_name="draw", stream=True)

    @contextlib.asynccontextmanager
    async def run(self, request: EditRequest | PrefillRequest, **options: Any) -> AsyncIterator[AsyncIterator[Event]]:
        """Give the events of a request. Leaving the block before the last one cancels it. Raises `LostReplica`."""
        response = self._draw.remote(request, **options)
        ended = False

        async def events() -> AsyncIterator[Event]:
            nonlocal ended
            try:
                async for event in response:
                    ended = isinstance(event, (Finished, Prefilled, Failed))
                    yield event
            except RayTaskError:  # a fault of ours; some of these are of the kinds below, too
                raise
            except (
                DeploymentUnavailableError,
                ObjectLostError,
                ReplicaUnavailableError,
                RequestCancelledError,
                TaskCancelledError,
            ) as error:
                raise LostReplica(first_line(error), counts=False) from error
            except RayError as error:  # died, out of memory, its node gone
                unavailable = type(error) is RayActorError  # it may come back
                raise LostReplica(first_line(error), counts=not unavailable) from error
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                raise LostReplica("it was stopped", counts=False) from error

        try:
            yield events()
        finally:
            if not ended:
                response.cancel()

    async def forget(self, key: str) -> bool:
        """Remove References from the store of every replica; False if none had them. Raises `RemoteError`."""
        try:
            return any(await self._broadcast("forget", key))
        except Exception as error:
            raise RemoteError(
                f"replicas did not confirm that {key} is forgotten ({first_line(error)}); ask again"
            ) from error

    async def store_stats(self) -> list[StoreStats]:
        """Return the counts of all replicas; none, and a line in the log, if one does not answer."""
        try:
            return [store for _, _, store in await self._broadcast("stats")]
        except Exception as error:
            _logger.warning("replicas did not report their counts: %s", first_line(error))
            return []

    async def _broadcast(self, method: str, *args: Any) -> list[Any]:
        """Call a method of all replicas. Raises what Ray does if one of them does not answer within seconds."""
        return list(await self._handle.broadcast(method, *args).results_async(timeout_s=_CONTROL_SECONDS))


class IngressApp:
    """The application of `limner serve`, over the replicas. Ray calls `__serve_build_asgi_app__` for it."""

    def __init__(self, replicas: DeploymentHandle, options: DeployOptions) -> None:
        log_own(options.log)
        self._handle, self._options = replicas, options

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application, once a replica has loaded the model of the options. Raises `InvalidRequest`."""
        options = self._options
        card = await self._card()
        self._engine = RemoteEngine(
            RayReplicas(self._handle), card, max_waiting=options.max_waiting, max_batch=options.max_batch
        )
        built = await self._build()
        if built.state.service.keyring.is_open:
            if options.keyed:
                raise InvalidRequest(
                    "--keys",
                    "$LIMNER_KEYS is set for the command and not on the head node; give --keys FILE of that "
                    "node, or set it where Ray is started",
                )
            built.add_middleware(LoopbackCallers, error_body=error_body)
        spare_garbage_collector()
        return built

    async def _card(self) -> ModelCard:
        """The card of a replica of these options: during an update the first to answer may be of those before."""
        while True:
            model, card = await self._handle.card.remote()
            if model == self._options.model_options():
                assert isinstance(card, ModelCard)
                return card
            await asyncio.sleep(_RETRY_SECONDS)

    async def _build(self) -> FastAPI:
        """The application. During an update the ingress before may still have the jobs, until it has drained."""
        options = self._options
        end = time.monotonic() + 2 * options.drain + 2 * GRACE_SECONDS
        while True:
            try:
                return await asyncio.to_thread(
                    build_app,
                    self._engine,
                    options.serve_options(),
                    model_name=options.model_name,
                    about=about_model(options.model_options()),
                )
            except StorageInUse:
                if time.monotonic() > end:
                    raise
            await asyncio.sleep(_RETRY_SECONDS)

    def check_health(self) -> None:
        """Raise if the application has shut down; Ray then starts another ingress, and its jobs are where `data` says."""
        if not self._engine.is_alive:
            raise RuntimeError("the ingress has shut down")
