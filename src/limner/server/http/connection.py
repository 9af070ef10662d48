"""Limits of connections: a time limit for the head of a request, and how many there are at once.

uvicorn's HTTP/1.1 with one more timer and a number. Without them a client that sends nothing, or a header now and then,
holds a connection for any time, and connections take the file descriptors that jobs need.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["HEAD_SECONDS", "HastyProtocol"]

_FULL = (
    b'{"detail":[{"loc":[],"msg":"the server has as many connections as it may; try again later","type":"http_503"}]}'
)
HEAD_SECONDS = 10.0
"""Seconds from the connection, or the first byte of a further request, to the end of the head."""


class HastyProtocol(H11Protocol):
    """Close a connection whose request head is not complete in time.

    Of more than `max_connections`, the one that has waited longest for a request is closed; where all have requests, a
    new one is answered with 503.
    """

    head_seconds = HEAD_SECONDS
    max_connections = 4096
    _timer: asyncio.TimerHandle | None = None
    _idle_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._idle_since = self.loop.time()
        self._time_head()
        self._make_room()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._idle_since = self.loop.time()
        if self.conn.trailing_data[0]:  # the next request has begun
            self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _make_room(self) -> None:
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
