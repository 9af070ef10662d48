"""`limner serve`: a pipeline, an engine and the application under uvicorn.

Owns how the parts are chosen from the command's options, structured logs and the shutdown. Knows no wire schema.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner.engine import Engine, load_aside
from limner.errors import InvalidRequest, MissingExtra, OutputError
from limner.files import write_file
from limner.pipeline import Pipeline
from limner.places import is_url
from limner.server.access.keys import KeyRing, check_bind, new_key
from limner.server.access.limits import LimitPolicy
from limner.server.jobs.open import check_data
from limner.server.jobs.storage import StorageInUse, StorageUnavailable
from limner.server.outbound.policy import OutboundPolicy
from limner.server.outbound.urls import Origin
from limner.trust import provenance, safety

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from limner.engine.protocol import Backend
    from limner.server.jobs.store import JobStore

__all__ = [
    "ServeOptions",
    "add_key",
    "build_app",
    "check_options",
    "default_data",
    "log_own",
    "make_server",
    "open_jobs",
    "serve",
]

_logger = logging.getLogger("limner.server")
_STANDBY_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    """What the command line says; files and folders as text. `data` is a folder, or a `postgresql://` URL."""

    host: str
    port: int
    data: str
    keys: str | None
    standby: bool = False
    unsafe: bool = False
    terms: str | None = None
    certificate: str | None = None
    private_key: str | None = None
    development_certificate: bool = False
    fetch_urls: bool = False
    allow_origins: tuple[str, ...] = ()
    requests_per_minute: float = 600.0
    concurrent: int = 24
    max_waiting: int = 256
    max_batch: int = 10
    images_per_key: int | None = None
    keep_results: float = 600.0
    drain: float = 30.0
    public_url: str | None = None
    tls_certificate: str | None = None
    tls_key: str | None = None
    log: str = "json"


def default_data() -> str:
    """`$XDG_DATA_HOME/limner/serve`, as the base directory specification says."""
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return str(Path(home) / "limner" / "serve")


def add_key(name: str, *, file: str) -> str:
    """Appends a new key to a key file; gives the key, which is written down nowhere. Raises `OutputError`."""
    plain, line = new_key(name)
    path = Path(file)
    try:
        before = path.read_bytes() if path.exists() else b""
        gap = b"" if not before or before.endswith(b"\n") else b"\n"
        write_file(path, before + gap + line.encode() + b"\n")
        path.chmod(0o600)
    except OSError as error:
        raise OutputError(f"keys: {file} cannot be written ({error.strerror or error})") from error
    return plain


def check_options(options: ServeOptions) -> None:
    """Raises what can be known to be wrong before a model is loaded."""
    check_bind(options.host, _keyring(options))
    check_data(options.data)
    _allowed(options)


def open_jobs(options: ServeOptions) -> JobStore:
    """The jobs of `data`, held by this process; with `standby` when nobody else has them. Raises `OutputError`."""
    with needs_extra("limner serve"):
        import uvicorn  # noqa: F401  # before anything is held

        from limner.server.jobs.store import JobStore
    told = False
    while True:
        try:
            return JobStore(options.data)
        except StorageInUse as error:
            if not options.standby:
                raise
            if not told:
                _logger.info("standby: %s", error)
                told = True
        except StorageUnavailable as error:
            if not told:  # it was not there before either
                raise
            _logger.warning("standby: %s", error)
        time.sleep(_STANDBY_SECONDS)


def serve(load: Callable[[], Pipeline], options: ServeOptions, *, model_name: str) -> None:
    """Serves until a signal stops it; then waits `drain` seconds for what runs. Raises what the options get wrong.

    The model is loaded when the jobs are held, so that one server too many ends soon; on standby before, so that it takes
    over soon.
    """
    check_bind(options.host, _keyring(options))
    _log_to_stderr(options.log)
    jobs = None if options.standby else open_jobs(options)
    pipe = load_aside(load)
    jobs = jobs or open_jobs(options)
    engine = Engine(pipe, max_waiting=options.max_waiting, max_batch=options.max_batch)
    app = build_app(engine, options, model_name=model_name, jobs=jobs)
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"{'https' if options.tls_certificate else 'http'}://{host}:{options.port}"
    _logger.info("%s at %s, jobs in %s", model_name, address, app.state.service.jobs.name)

    server = make_server(
        app,
        host=options.host,
        port=options.port,
        drain=options.drain,
        certificate=options.tls_certificate,
        key=options.tls_key,
    )
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again after a shutdown that went well
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        raise OutputError(f"port: {options.host}:{options.port} cannot be used; see the log, or give another --port")


@contextlib.contextmanager
def needs_extra(what: str) -> Iterator[None]:
    """Says how to install what an import in the block lacks."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtra(what, package=str(error.name), extra="serve") from error


def build_app(engine: Backend, options: ServeOptions, *, model_name: str, jobs: JobStore | None = None) -> FastAPI:
    """The application that options ask for, over an engine. Raises what the options get wrong."""
    with needs_extra("limner serve"):
        from limner.server.app import create_app
        from limner.server.http.settings import ServeSettings
        from limner.server.jobs.settings import RunnerSettings

    return create_app(
        engine=engine,
        keyring=_keyring(options),
        checks=safety.no_checks() if options.unsafe else safety.default_checks(terms=options.terms),
        settings=ServeSettings(
            data=options.data,
            public_url=options.public_url,
            fetch_urls=options.fetch_urls,
            outbound=OutboundPolicy(allowed=_allowed(options)),
            limits=LimitPolicy(
                requests_per_minute=options.requests_per_minute,
                burst=max(1, round(options.requests_per_minute)),
                concurrent=options.concurrent,
            ),
            runner=RunnerSettings(
                keep_results=options.keep_results, drain=options.drain, images_per_key=options.images_per_key
            ),
            model_name=model_name,
        ),
        signer=_signer(options),
        jobs=jobs,
    )


def _allowed(options: ServeOptions) -> frozenset[Origin]:
    try:
        return frozenset(Origin.parse(text) for text in options.allow_origins)
    except ValueError as error:
        raise InvalidRequest("--allow-origin", str(error)) from None


def make_server(
    app: FastAPI, *, host: str, port: int, drain: float, certificate: str | None = None, key: str | None = None
) -> uvicorn.Server:
    """uvicorn over the application, with limits for what comes before a request is one."""
    import uvicorn

    from limner.server.http.connection import HastyProtocol

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            app.state.service.refuse()  # before it waits for callers whose jobs run
            await super().shutdown(sockets)

    return Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            http=HastyProtocol,
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


def _keyring(options: ServeOptions) -> KeyRing:
    if options.keys is not None:
        return KeyRing.from_file(options.keys)
    value = os.environ.get("LIMNER_KEYS")
    return KeyRing.from_environment(value) if value else KeyRing.open()


def _signer(options: ServeOptions) -> provenance.Signer | None:
    if options.development_certificate:
        if options.certificate:
            raise InvalidRequest("--c2pa-development", "a certificate is given as well; give one of them")
        folder = default_data() if is_url(options.data) else options.data
        return provenance.development_credentials(Path(folder) / "c2pa-development")
    if (options.certificate is None) != (options.private_key is None):
        raise InvalidRequest("--c2pa-certificate", "needs --c2pa-key, and the other way round")
    if options.certificate is None or options.private_key is None:
        return None
    return provenance.Signer.from_files(options.certificate, options.private_key)


class _JSONLines(logging.Formatter):
    """One JSON object a line; a message that is one already is taken into it."""

    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
        }
        message = record.getMessage()
        try:
            own = json.loads(message) if message.startswith("{") else None
        except ValueError:
            own = None
        found |= own if isinstance(own, dict) else {"message": message}
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found)


def log_own(kind: str) -> None:
    """Limner's own loggers to stderr, where the process's others are somebody else's."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(kind))
    logger = logging.getLogger("limner")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def _formatter(kind: str) -> logging.Formatter:
    return _JSONLines() if kind == "json" else logging.Formatter("%(levelname)s %(message)s")


def _log_to_stderr(kind: str) -> None:
    """All loggers to one handler, so that every line is of one kind: ours and uvicorn's from INFO on, others' warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(kind))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    for name in ("limner", "uvicorn"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers = []
        logger.propagate = True
