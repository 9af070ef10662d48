"""Limits of connections: times for handshake, head and reading of answers, how many there are, how small chunks are.

uvicorn's HTTP/1.1 with two more timers and some numbers, and an intake that leaves the loop to others now and then. Without
the timers a client that sends nothing, or a header now and then, or reads no answer, holds a connection for any time, and
connections take the file descriptors that jobs need.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import logging
import ssl
import termios
from asyncio import sslproto
from collections import deque
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["HEAD_SECONDS", "Handshake", "HastyProtocol", "Intake"]

_logger = logging.getLogger("limner.server")
_FULL = (
    b'{"detail":[{"loc":[],"msg":"the server has as many connections as it may; try again later","type":"http_503"}]}'
)
sslproto.SSLProtocol.max_size = 32 << 10
"""Bytes that asyncio has ready for each connection that speaks TLS; it takes 256 kB, and a record has 16 at most."""
HEAD_SECONDS = 10.0
"""Seconds from the connection, or the first byte of a further request, to the end of the head."""
_GOODBYE_SECONDS = 1.0
"""A connection that is closed waits so long for its caller to close it as well, where it speaks TLS."""
_PARSING_SECONDS = 0.005
_FREE_CHUNKS, _MIN_CHUNK = 1000, 256
"""After so many chunks of a body, they have so many bytes on average: each is parsed while all others wait."""


class Intake:
    """What came over all connections of a loop, parsed for `_PARSING_SECONDS` in a round of it; the rest in the next ones.

    Hundreds of connections that send at once would be parsed in one round, while all else waits.
    """

    def __init__(self) -> None:
        self._waiting: deque[HastyProtocol] = deque()
        self._end: float | None = None
        """Until when something is parsed in this round; None: nothing was yet."""

    def is_open(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether something may be parsed in this round: nothing waits that came before, and there is time."""
        if self._end is None:
            self._end = loop.time() + _PARSING_SECONDS
            loop.call_soon(self._round, loop)
        return not self._waiting and loop.time() < self._end

    def wait(self, connection: HastyProtocol) -> None:
        """Have a connection take up what came, after those that wait already."""
        self._waiting.append(connection)

    def _round(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._waiting:
            self._end = None
            return
        self._end = loop.time() + _PARSING_SECONDS
        loop.call_soon(self._round, loop)  # before the work: whatever it raises, the next round comes
        while self._waiting and loop.time() < self._end:
            self._waiting.popleft().take_up()


class _Requests(h11.Connection):
    """The requests of a connection, whose bodies do not come in crumbs."""

    _num_chunks = _num_bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_chunks = self._num_bytes = 0
        elif isinstance(event, h11.Data):
            self._num_chunks += 1
            self._num_bytes += len(event.data)
            if self._num_chunks > _FREE_CHUNKS + self._num_bytes // _MIN_CHUNK:
                raise h11.RemoteProtocolError("the chunks of the body are too small")
        return event


class HastyProtocol(H11Protocol):
    """Close a connection whose request head is not complete in time, or whose caller does not read for long.

    Of more than `max_connections`, the one that has waited longest for a request is closed; where all have requests, a
    new one is answered with 503.
    """

    head_seconds = HEAD_SECONDS
    write_seconds = 60.0
    """A caller who takes nothing of an answer for so long has left, or holds the answer in memory on purpose."""
    max_connections = 4096
    intake: Intake
    """That of all connections of a server."""
    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _idle_since = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._came: list[bytes] = []
        self.conn = _Requests(h11.SERVER, self.config.h11_max_incomplete_event_size or (64 << 10))

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._idle_since = self.loop.time()
        self._time_head()
        self._make_room()

    def data_received(self, data: bytes) -> None:
        if not self._came and self.intake.is_open(self.loop):
            self._parse(data)
            return
        if not self._came:
            self.intake.wait(self)
        self._came.append(data)
        self.flow.pause_reading()

    def take_up(self) -> None:
        """Parse what came while there was no time for it."""
        data = b"".join(self._came)
        self._came.clear()
        if not self.transport.is_closing():
            self.flow.resume_reading()
            self._parse(data)

    def _parse(self, data: bytes) -> None:
        """Parse what came; a connection for which that fails is closed.

        uvicorn answers what is no HTTP with 400, and raises where the connection has its answer already.
        """
        try:
            super().data_received(data)
        except h11.LocalProtocolError:
            _logger.debug("a connection is closed: what came over it cannot be parsed", exc_info=True)
            self.transport.abort()
        except Exception:
            _logger.exception("a connection is closed: what came over it makes the server fail")
            self.transport.abort()
        else:
            self._time_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._idle_since = self.loop.time()
        if self.conn.trailing_data[0]:  # the next request has begun
            self._time_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.write_seconds, self._check_read, self._waiting_bytes())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._stop_write_timer()
        super().connection_lost(exc)

    def _waiting_bytes(self) -> int:
        """Return how much of the answer the caller's machine does not have: here, and in the system's buffer."""
        queued = array.array("i", [0])
        with contextlib.suppress(OSError):  # not told of sockets of every kind
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, queued)
        return self.transport.get_write_buffer_size() + queued[0]

    def _check_read(self, before: int) -> None:
        """Give up a caller who has read nothing; one who reads slowly has time."""
        left = self._waiting_bytes()
        if left >= before:
            self.transport.abort()
        else:
            self._write_timer = self.loop.call_later(self.write_seconds, self._check_read, left)

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _make_room(self) -> None:
        if len(self.connections) <= self.max_connections:  # those that close included: nobody has to be looked at
            return
        others = [one for one in self.connections if isinstance(one, HastyProtocol) and one is not self]
        others = [one for one in others if not one.transport.is_closing()]
        if len(others) < self.max_connections:
            return
        idle = [one for one in others if one._is_idle]
        if idle:
            min(idle, key=lambda one: one._idle_since).transport.close()
            return
        head = f"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {len(_FULL)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\nretry-after: 5\r\n\r\n" + _FULL)
        self.transport.close()

    def _time_head(self) -> None:
        if not self._is_idle:  # a request is being read or answered
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.head_seconds, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Handshake(asyncio.Protocol):
    """A new connection that speaks TLS, until its handshake is over and the protocol of requests takes it.

    asyncio's own server counts no handshake, and gives each a minute. Of more than `most` in `under_way`, the oldest is
    closed.
    """

    def __init__(
        self,
        protocol: HastyProtocol,
        context: ssl.SSLContext,
        *,
        under_way: dict[Handshake, asyncio.Transport],
        most: int,
    ) -> None:
        self._protocol, self._context, self._under_way, self._most = protocol, context, under_way, most
        self._early: list[bytes] = []  # came with the end of the handshake
        self._is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()  # what comes is for TLS
        if len(self._under_way) >= self._most:
            self._under_way.pop(next(iter(self._under_way))).abort()
        self._under_way[self] = transport
        self._task = asyncio.get_running_loop().create_task(self._shake(transport))

    def data_received(self, data: bytes) -> None:
        self._early.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True

    async def _shake(self, plain: asyncio.Transport) -> None:
        loop, seconds = asyncio.get_running_loop(), self._protocol.head_seconds
        if plain.is_closing():
            return
        try:
            transport = await loop.start_tls(
                plain,
                self,
                self._context,
                server_side=True,
                ssl_handshake_timeout=seconds,
                ssl_shutdown_timeout=_GOODBYE_SECONDS,
            )
        except (OSError, asyncio.CancelledError):  # ssl.SSLError is an OSError, as is one that takes too long
            plain.abort()
            return
        finally:
            self._under_way.pop(self, None)
        if transport is None or self._is_lost:
            return
        transport.set_protocol(self._protocol)
        self._protocol.connection_made(transport)
        for data in self._early:
            self._protocol.data_received(data)
