"""The assistant's process: the model is loaded, then tools are served over stdin and stdout, or HTTP on this machine.

Owns what is opened and closed around it. Knows no tools.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Callable

import uvicorn
from mcp.server.lowlevel import NotificationOptions
from mcp.server.stdio import stdio_server

from limner.engine import Engine, load_in_thread
from limner.errors import OutputError
from limner.mcp.folder import AllowedFolder
from limner.mcp.server import Assistant, create_server
from limner.outbound.client import OutboundClient
from limner.pipeline import Pipeline

__all__ = ["run"]

_MAX_BODY_BYTES = 128 << 20
"""Of one request over HTTP, pictures as base64 included, as of the service; the package's own limit is 4 MiB."""


def run(
    load: Callable[[], Pipeline],
    *,
    folder: str | os.PathLike[str] | None,
    fetch_urls: bool = False,
    port: int | None = None,
) -> None:
    """Serve until stdin ends, or with `port` over HTTP at 127.0.0.1 until a signal. Raises `LimnerError`."""
    with contextlib.ExitStack() as stack:
        allowed = stack.enter_context(contextlib.closing(AllowedFolder(folder))) if folder is not None else None
        listener = stack.enter_context(_listen(port)) if port is not None else None
        engine = Engine(load_in_thread(load), previews=False)
        stack.callback(engine.close)
        asyncio.run(_serve(engine, allowed, fetch_urls=fetch_urls, listener=listener))


async def _serve(
    engine: Engine, folder: AllowedFolder | None, *, fetch_urls: bool, listener: socket.socket | None
) -> None:
    with contextlib.ExitStack() as stack:
        outbound = stack.enter_context(contextlib.closing(OutboundClient())) if fetch_urls else None
        card = engine.pipe.text_encoder.known.card
        server = create_server(Assistant(engine=engine, folder=folder, outbound=outbound, card=card))
        if listener is None:
            options = server.create_initialization_options(NotificationOptions(resources_changed=True))
            async with stdio_server() as (read, write):
                await server.run(read, write, options)
        else:
            listener.listen()  # from now on callers wait, instead of being refused until the server has begun
            print(f"limner: tools at http://127.0.0.1:{listener.getsockname()[1]}/mcp", file=sys.stderr, flush=True)
            # hosts and origins of other machines are refused, since the host is this one
            app = server.streamable_http_app(host="127.0.0.1", max_request_body_size=_MAX_BODY_BYTES)
            await uvicorn.Server(uvicorn.Config(app, log_level="warning")).serve([listener])


def _listen(port: int) -> socket.socket:
    """Return a socket at 127.0.0.1, so that what the port is taken for shows before a model is loaded."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise OutputError(f"--http: 127.0.0.1:{port} cannot be used ({error.strerror}); give another port") from error
    return listener
