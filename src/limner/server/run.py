"""Running a service in this process: the model, an engine, the application under uvicorn, until a signal.

Owns the order of a start, waiting on standby, and the shutdown. Knows no wire schema; what an option means to the
application stands in `limner.server.application`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from limner.engine import Engine
from limner.engine.about import ModelAbout
from limner.engine.load import load_in_thread
from limner.errors import OutputError
from limner.memory.free import share_one_heap, spare_garbage_collector
from limner.options import ServeOptions
from limner.pipeline import Pipeline
from limner.server import descriptors
from limner.server.access.keys import check_bind
from limner.server.application import build_app, keyring, needs_extra
from limner.server.jobs.storage import StorageInUse, StorageUnavailable
from limner.server.logs import log_everything

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from limner.server.jobs.store import JobStore

__all__ = ["ServeOptions", "make_server", "open_jobs", "serve"]

_logger = logging.getLogger("limner.server")
_STANDBY_SECONDS = 1.0
_MAX_BACKLOG = 512
"""Connections that wait until they are accepted."""
_SWITCH_SECONDS = 0.001
"""The event loop waits so long for a thread that computes in Python, several times a request. Python's default is 5 ms."""


def serve(
    load: Callable[[], Pipeline], options: ServeOptions, *, model_name: str, about: ModelAbout | None = None
) -> None:
    """Serve until a signal stops it, then wait `drain` seconds for jobs. Raises `LimnerError` for wrong options.

    The jobs are held before the model is loaded, so that a server that cannot have them ends soon. On standby the model is
    loaded first, so that it takes over soon.
    """
    check_bind(options.host, keyring(options))
    # on standby, whoever has the jobs may have the port as well
    jobs = None if options.standby else _open_with_port(options)
    descriptors.raise_limit()
    share_one_heap()
    sys.setswitchinterval(_SWITCH_SECONDS)
    log_everything(options.log)
    pipe = load_in_thread(load)
    jobs = jobs or open_jobs(options)
    engine = Engine(pipe, max_waiting=options.max_waiting, max_batch=options.max_batch)
    app = build_app(engine, options, model_name=model_name, about=about, jobs=jobs)
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"{'https' if options.tls_certificate else 'http'}://{host}:{options.port}"
    _logger.info("%s at %s, jobs in %s", model_name, address, app.state.service.jobs.name)
    if sys.stderr.isatty():  # by itself, for terminals that open what is clicked
        print(f"\n    {address}/\n", file=sys.stderr, flush=True)

    server = make_server(
        app,
        host=options.host,
        port=options.port,
        drain=options.drain,
        certificate=options.tls_certificate,
        key=options.tls_key,
    )
    spare_garbage_collector()
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again after a shutdown that went well
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        raise OutputError(f"port: {options.host}:{options.port} cannot be used; see the log, or give another --port")


def _check_port(host: str, port: int) -> None:
    """Raise `OutputError` if the port cannot be listened at, before a model is loaded for nothing."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except OSError as error:
        raise OutputError(
            f"port: {host}:{port} cannot be used ({error.strerror or error}); give another --port, or stop who uses it"
        ) from error


def _open_with_port(options: ServeOptions) -> JobStore:
    """Return the jobs of `data`, if the port is free as well. Raises `OutputError` that names all that has to change."""
    try:
        jobs = open_jobs(options)
    except StorageInUse as error:
        try:
            _check_port(options.host, options.port)
        except OutputError:
            raise StorageInUse(f"{error}, and another --port: {options.port} is in use too") from None
        raise
    try:
        _check_port(options.host, options.port)
    except BaseException:
        jobs.close()
        raise
    return jobs


def open_jobs(options: ServeOptions) -> JobStore:
    """Return the jobs of `data`, held by this process; with `standby`, as soon as nobody else has them.

    Raises `OutputError`.
    """
    with needs_extra("limner serve"):
        import uvicorn  # noqa: F401  # before anything is held

        from limner.server.jobs.store import JobStore
    reported = False
    while True:
        try:
            return JobStore(options.storage)
        except StorageInUse as error:
            if not options.standby:
                raise
            if not reported:
                _logger.info("standby: %s", error)
                reported = True
        except StorageUnavailable as error:
            if not reported:  # it was not there before either
                raise
            _logger.warning("standby: %s", error)
        time.sleep(_STANDBY_SECONDS)


def make_server(
    app: FastAPI, *, host: str, port: int, drain: float, certificate: str | None = None, key: str | None = None
) -> uvicorn.Server:
    """Return uvicorn over the application, with limits for what comes before a request is one."""
    import uvicorn

    from limner.server.http.connection import Handshake, HastyProtocol, Intake

    most = descriptors.max_connections()

    class Protocol(HastyProtocol):
        max_connections = most
        intake = Intake()

    class Config(uvicorn.Config):
        def load(self) -> None:
            super().load()
            context, self.ssl = self.ssl, None  # asyncio's server would make handshakes without a limit
            if context is not None:
                under_way: dict[Handshake, asyncio.Transport] = {}
                self.http_protocol_class = lambda **parts: Handshake(  # type: ignore[assignment]
                    Protocol(**parts), context, under_way=under_way, most=max(4, min(512, most // 4))
                )

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            for server in self.servers:
                for listening in server.sockets:  # asyncio has one number for those that wait and those of a round
                    with socket.socket(fileno=os.dup(listening.fileno())) as same:
                        same.listen(_MAX_BACKLOG)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            app.state.service.refuse()  # before it waits for callers whose jobs run
            await super().shutdown(sockets)

    return Server(
        Config(
            app,
            host=host,
            port=port,
            http=Protocol,
            backlog=max(
                16, min(64, descriptors.reserved() // 2)
            ),  # accepted in a round of the loop, before one is counted
            loop="asyncio",  # and not another one where it is installed
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=max(1, math.ceil(drain)),
            h11_max_incomplete_event_size=32768,
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
    )
