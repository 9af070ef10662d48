"""The ASGI application: the parts of a server put together, errors in the dialect of their path, health.

Owns the life of the parts and what holds for all routes. The routes of the dialects are in modules of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Lifespan, Message, Receive, Scope, Send

from limner.engine.protocol import Backend
from limner.errors import LimnerError
from limner.outbound.client import OutboundClient
from limner.server.access.bodies import Bodies
from limner.server.access.keys import OPERATOR, KeyRing, Owner
from limner.server.access.limits import Limiter
from limner.server.access.streams import Streams
from limner.server.descriptors import max_streams
from limner.server.dialects import bfl, openai_images, page, references, results
from limner.server.dialects import jobs as job_routes
from limner.server.dialects.job_view import as_result
from limner.server.dialects.unknown_fields import told
from limner.server.http.errors import ERRORS, INTERNAL, answer_of, error_body, is_openai
from limner.server.http.limits import BodyLimits, LocalCallers
from limner.server.http.metrics import Metrics
from limner.server.http.pictures import PictureReader
from limner.server.http.result_urls import ResultUrls
from limner.server.http.service import KEYS, Service
from limner.server.http.settings import ServeSettings
from limner.server.http.turns import Turns
from limner.server.http.wire import SafeJSON
from limner.server.jobs.records import Job
from limner.server.jobs.store import JobStore
from limner.server.jobs.work import JobWork
from limner.trust.provenance import Signer
from limner.trust.safety import Checks
from limner.version import __version__

__all__ = ["create_app"]

_logger = logging.getLogger("limner.server")
_UNREADY: dict[int | str, dict[str, Any]] = {503: {"description": "Not ready", "model": dict[str, str]}}
_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")


def create_app(
    *,
    engine: Backend,
    keyring: KeyRing,
    checks: Checks,
    settings: ServeSettings,
    signer: Signer | None = None,
    jobs: JobStore | None = None,
    outbound: OutboundClient | None = None,
    webhook_client: OutboundClient | None = None,
) -> FastAPI:
    """Return the application over an engine. Serving starts its jobs, stopping drains them; it can be served once.

    `jobs` are those of `settings.data`, if they are open already; they are closed when the application stops.
    `outbound` fetches pictures by URL. `webhook_client` calls the receivers of webhooks, which may be slow and must not
    hold up pictures.
    """
    jobs = jobs or JobStore(settings.data)
    outbound = outbound or OutboundClient(settings.outbound)
    webhook_client = webhook_client or OutboundClient(settings.outbound)
    limiter, urls = Limiter(settings.limits), ResultUrls(jobs.secret)

    def describe(job: Job) -> dict[str, Any]:
        base = settings.public_url or job.options.base_url or ""
        return as_result(job, urls.of(job, base.rstrip("/")), None)

    work = JobWork.build(
        engine=engine,
        jobs=jobs,
        limiter=limiter,
        checks=checks,
        signer=signer,
        webhook_client=webhook_client if settings.webhooks else None,
        describe=describe,
        settings=settings.runner,
        shared_references=settings.shared_references or keyring.is_open,
    )
    service = Service(
        engine=engine,
        jobs=jobs,
        runner=work.runner,
        prefills=work.prefills,
        known=work.known,
        moderation=work.moderation,
        offload=work.offload,
        pictures=PictureReader(engine=engine, offload=work.offload, settings=settings, outbound=outbound),
        urls=urls,
        keyring=keyring,
        limiter=limiter,
        settings=settings,
        outbound=outbound,
        streams=Streams(total=max_streams()),
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await work.start()
        service.ready = True
        try:
            yield
        finally:
            service.refuse()
            await work.stop()
            outbound.close()
            webhook_client.close()
            jobs.close()

    return _application(service, Metrics(engine=engine, jobs=jobs, runner=work.runner), lifespan)


def _application(service: Service, metrics: Metrics, lifespan: Lifespan[FastAPI]) -> FastAPI:
    """Return the application over the parts: routes, errors and middlewares."""
    settings = service.settings
    app = FastAPI(
        title="Limner",
        version=__version__,
        summary="Draw and edit pictures; the K/V of references are computed once and kept.",
        lifespan=lifespan,
        default_response_class=SafeJSON,
        generate_unique_id_function=lambda route: route.name,  # the names in generated clients
        openapi_url=None,  # it would be made anew for each request, in the event loop
        docs_url=None,  # FastAPI's page for it fetches scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    for routes in (bfl, openai_images, references, job_routes, results, page):
        app.include_router(routes.routes(service))
    _add_health(app, service, metrics)
    _add_errors(app)
    _add_document(app)
    app.add_middleware(
        BodyLimits,
        max_bytes=settings.max_body_bytes,
        bodies=Bodies(max_bytes=settings.max_buffered_bytes, shared=not service.keyring.is_open),
        seconds=settings.body_seconds,
        owner_of=service.keyring.identify,
        error_body=error_body,
    )
    if service.keyring.is_open:
        app.add_middleware(LocalCallers, error_body=error_body, browser_origins=settings.browser_origins)
    if settings.browser_origins:  # outside of what refuses, so that a page can read why
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(map(str, settings.browser_origins)),
            allow_methods=["DELETE", "GET", "POST"],
            allow_headers=["*"],
            allow_credentials=False,
            allow_private_network=True,
            expose_headers=["retry-after"],
        )
    app.add_middleware(_Observed, metrics=metrics)
    if not service.keyring.is_open:  # whoever may come to one without keys is the same owner
        app.add_middleware(Turns, owner_of=service.keyring.identify)
    _build_routes(app)
    return app


def _build_routes(app: FastAPI) -> None:
    """Have FastAPI make its routes now: it takes a quarter of a second, and else the first request does it in the loop."""
    scope = {"type": "http", "method": "GET", "path": "/-", "root_path": "", "headers": []}
    for route in app.routes:
        route.matches(scope)


def _add_health(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.get("/healthz", tags=["health"], summary="Whether the process answers")
    async def healthz() -> dict[str, str]:
        return {"status": "ok", "version": __version__}

    @app.get(
        "/health", tags=["health"], responses=_UNREADY, summary="Whether the engine works, as vLLM and SGLang have it"
    )
    async def health() -> Response:
        works = service.ready and service.engine.is_alive
        return SafeJSON({"status": "ok" if works else "starting or shutting down"}, status_code=200 if works else 503)

    @app.get("/readyz", tags=["health"], responses=_UNREADY, summary="Whether requests are taken")
    async def readyz() -> Response:
        problem = ""
        if not service.ready or not service.engine.is_alive:
            problem = "starting or shutting down"
        else:
            try:
                await service.offload.store(service.jobs.counts)
                await service.offload.store(service.jobs.check_writable)
            except LimnerError as error:
                _logger.warning("not ready: %s", error)
                reason = getattr(error.__cause__, "strerror", None)  # the message names the folder
                problem = f"the job store fails: {reason}" if reason else "the job store fails"
            if service.engine.stats().waiting >= service.engine.max_waiting:
                problem = "the queue is full"
        return SafeJSON({"status": problem or "ready"}, status_code=503 if problem else 200)

    @app.get(
        "/metrics",
        tags=["health"],
        responses={**ERRORS, 200: {"content": {"text/plain": {}}, "description": "Prometheus text"}},
        response_class=Response,
        dependencies=KEYS,
        summary="Prometheus metrics",
    )
    async def read_metrics(owner: Owner = Depends(service.owner)) -> Response:
        with_references = service.known.is_shared or owner.name == OPERATOR
        body, kind = await asyncio.to_thread(metrics.text, with_references=with_references)
        return Response(body, headers={"content-type": kind})


def _add_document(app: FastAPI) -> None:
    """Give the OpenAPI document, made once, without FastAPI's 422 of every route: the OpenAI dialect answers 400."""
    full = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            for path, operations in full()["paths"].items():
                for operation in operations.values() if is_openai(path) else ():
                    operation["responses"].pop("422", None)
            schemas = full()["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
        return full()

    app.openapi = openapi  # type: ignore[method-assign]
    rendered, one_makes_it = b"", asyncio.Lock()

    @app.get("/openapi.json", include_in_schema=False)
    async def document() -> Response:
        nonlocal rendered
        async with one_makes_it:
            rendered = rendered or await asyncio.to_thread(lambda: bytes(SafeJSON(app.openapi()).body))
        return Response(rendered, media_type="application/json")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(LimnerError)
    async def known(request: Request, error: LimnerError) -> Response:
        status, body, headers = answer_of(request.url.path, error)
        return SafeJSON(body, status_code=status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        path, kind = request.url.path, _body_of(request)
        found = [{**one, "msg": told(one, kind)} for one in error.errors()]
        if is_openai(path):
            first = found[0]
            where = [] if first["type"] == "json_invalid" else [str(part) for part in first["loc"] if part != "body"]
            field = ".".join(where) or None
            return SafeJSON(error_body(path, 400, f"{field or 'body'}: {first['msg']}", field=field), status_code=400)
        detail = [
            {"loc": list(e["loc"]), "msg": e["msg"], "type": e["type"]} for e in found
        ]  # without the value that was sent
        return SafeJSON({"detail": detail}, status_code=422)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        if request.method == "OPTIONS" and error.status_code == 405:  # which methods there are is no secret
            return Response(status_code=204, headers=error.headers)
        body = error_body(request.url.path, error.status_code, str(error.detail))
        return SafeJSON(body, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        body = error_body(request.url.path, 500, INTERNAL)
        return SafeJSON(body, status_code=500)


def _body_of(request: Request) -> object:
    """Return the class of the body that the route of a request reads, or None."""
    fields = getattr(getattr(request.scope.get("route"), "dependant", None), "body_params", ())
    return getattr(getattr(fields[0], "field_info", None), "annotation", None) if fields else None


class _Observed:
    """Count and time requests, and log a line for each."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            seconds = time.perf_counter() - start
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in _METHODS else "other"  # callers may send any word
            self._metrics.request(method=method, route=route, status=status, seconds=seconds)
            if route not in ("/health", "/healthz", "/readyz", "/metrics"):
                owner = scope.get("state", {}).get("owner")
                line = {
                    "event": "request",
                    "method": method,
                    "route": route,
                    "status": status,
                    "ms": round(seconds * 1e3, 1),
                    "owner": getattr(owner, "name", None),
                }
                _logger.info("%s", json.dumps(line))
