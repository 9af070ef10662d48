"""Requests begin in turns: a caller who sends many holds neither the event loop nor the interpreter.

An ASGI middleware. A request takes the loop a millisecond or so. Of hundreds that are there at once, all would begin in one
round of the loop, and who waits in it for a thread, ten times for a picture, would wait for them each time. So in a round
one request of each caller begins. And who computes in Python, as the engine does between products, waits for the
interpreter while the loop has it: while others are there, a crowd has a third of the loop's time.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from limner.errors import AccessDenied
from limner.server.access.keys import Owner

__all__ = ["Turns"]

_ACTIVE_SECONDS = 60.0
"""An owner who sent nothing for so long leaves the whole loop to others."""
_SHARE = 3
"""The next request of a crowd begins when this many times what the loop worked since the last one is over."""
_MAX_REST = 0.02
"""Most seconds until then. A loop that worked for longer did so for others."""


class Turns:
    """Let requests begin as described. Where `owner_of(headers)` raises `AccessDenied`, the address is the caller."""

    def __init__(self, app: ASGIApp, *, owner_of: Callable[[Headers], Owner]) -> None:
        self._app = app
        self._owner_of = owner_of
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._begun: set[str] = set()
        """Callers of whom a request has begun in this round; none: there is no round."""
        self._since = (0.0, 0.0)
        """When this round began, and how long the loop had worked by then."""
        self._seen: dict[str, float] = {}
        """When each owner last sent a request."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._turn(self._caller(scope))
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> str:
        try:
            owner = self._owner_of(Headers(scope=scope)).id
        except AccessDenied:
            return f"address {(scope.get('client') or ('',))[0]}"
        self._seen[owner] = asyncio.get_running_loop().time()
        return f"owner {owner}"

    async def _turn(self, caller: str) -> None:
        if caller not in self._begun:
            if not self._begun:
                self._begin_round()
            self._begun.add(caller)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        await turn

    def _begin_round(self) -> None:
        loop = asyncio.get_running_loop()
        self._since = loop.time(), time.thread_time()
        loop.call_soon(self._end_round)

    def _round(self) -> None:
        """Let one request of each caller begin."""
        self._begun.clear()
        for caller, turns in list(self._waiting.items()):
            while turns and caller not in self._begun:
                turn = turns.popleft()
                if not turn.done():  # its caller has not left
                    turn.set_result(None)
                    self._begun.add(caller)
            if not turns:
                del self._waiting[caller]
        if self._begun:
            self._begin_round()

    def _end_round(self) -> None:
        """Go on with the next round, after a rest where some wait and others are there."""
        loop = asyncio.get_running_loop()
        if self._waiting and self._others(loop.time()):
            passed, worked = loop.time() - self._since[0], time.thread_time() - self._since[1]
            rest = min(_SHARE * worked, _MAX_REST) - passed
            if rest > 0:
                loop.call_later(rest, self._end_round)
                return
        self._round()

    def _others(self, now: float) -> bool:
        """Whether there are owners besides those who crowd."""
        self._seen = {owner: at for owner, at in self._seen.items() if now - at <= _ACTIVE_SECONDS}
        return any(f"owner {owner}" not in self._waiting for owner in self._seen)
