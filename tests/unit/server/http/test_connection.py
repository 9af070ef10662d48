"""What is parsed of connections that all send at once, round by round of the event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from limner.server.http.connection import HastyProtocol, Intake


class Loop:
    """Rounds by hand: parsing takes 2 ms each time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.soon: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()

    def time(self) -> float:
        return self.now

    def call_soon(self, call: Callable[..., None], *args: Any) -> None:
        self.soon.append((call, args))

    def round(self) -> None:
        self.now += 0.001
        for _ in range(len(self.soon)):
            call, args = self.soon.popleft()
            call(*args)


class Connection:
    def __init__(self, loop: Loop, intake: Intake, parsed: list[str], name: str) -> None:
        self.loop, self.intake, self.parsed, self.name = loop, intake, parsed, name

    def send(self) -> None:
        if self.intake.is_open(self.loop):  # type: ignore[arg-type]
            self.take_up()
        else:
            self.intake.wait(self)  # type: ignore[arg-type]

    def take_up(self) -> None:
        self.loop.now += 0.002
        self.parsed.append(self.name)


def test_a_crowd_is_parsed_in_several_rounds_and_in_order() -> None:
    loop, intake, parsed = Loop(), Intake(), []  # type: ignore[var-annotated]
    for number in range(8):
        Connection(loop, intake, parsed, f"{number}").send()
    assert parsed == ["0", "1", "2"]
    loop.round()
    Connection(loop, intake, parsed, "late").send()
    assert parsed == ["0", "1", "2", "3", "4", "5"]
    loop.round()
    assert parsed == ["0", "1", "2", "3", "4", "5", "6", "7", "late"]
    loop.round()
    assert not loop.soon  # nothing is left
    Connection(loop, intake, parsed, "next").send()
    assert parsed[-1] == "next"


HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.is_closed = b"", False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def test_what_one_connection_sends_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """What comes after an answer, and is no chunk, makes uvicorn raise: its own 400 cannot be sent any more."""

    class Busy(Intake):
        def is_open(self, loop: asyncio.AbstractEventLoop) -> bool:
            return super().is_open(loop) and False  # all wait for the next round

    class Protocol(HastyProtocol):
        intake = Busy()

    config = uvicorn.Config(answer, access_log=False)
    config.load()

    async def until_answered(wires: list[Wire]) -> None:
        end = time.monotonic() + 10
        while not all(wire.written.endswith(b"ok") for wire in wires):
            assert time.monotonic() < end, [wire.written for wire in wires]
            await asyncio.sleep(0.001)

    async def run() -> None:
        protocols, wires = [], [Wire() for _ in range(31)]
        for wire in wires:
            protocols.append(Protocol(config=config, server_state=ServerState(), app_state={}))
            protocols[-1].connection_made(wire)
        bad, others = wires[15], [*wires[:15], *wires[16:]]
        protocols[15].data_received(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        await until_answered([bad])
        for wire, protocol in zip(wires, protocols, strict=True):
            protocol.data_received(b"zz\r\n" if wire is bad else HEAD + b"\r\n")
        await until_answered(others)
        assert [wire.is_closed for wire in others] == [False] * 30
        assert bad.is_closed
        protocols[0].data_received(HEAD + b"\r\n")
        wires[0].written = b""
        await until_answered(wires[:1])
        for protocol in protocols:
            protocol.connection_lost(None)

    caplog.set_level(logging.DEBUG, logger="limner.server")
    asyncio.run(run())
    told = [record for record in caplog.records if record.name == "limner.server"]
    assert [(one.levelname, one.exc_info is not None) for one in told] == [("DEBUG", True)]  # a caller can do it


def test_what_fails_in_the_server_is_an_error_in_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Protocol(HastyProtocol):
        intake = Intake()

    def fail(self: Any) -> None:
        raise TypeError("of ours")

    config = uvicorn.Config(answer, access_log=False)
    config.load()

    async def run() -> None:
        protocol, wire = Protocol(config=config, server_state=ServerState(), app_state={}), Wire()
        protocol.connection_made(wire)
        monkeypatch.setattr(Protocol, "handle_events", fail)
        protocol.data_received(HEAD + b"\r\n")
        assert wire.is_closed
        protocol.connection_lost(None)

    asyncio.run(run())
    (told,) = (record for record in caplog.records if record.name == "limner.server")
    assert told.levelname == "ERROR"
    assert "of ours" in caplog.text  # with its traceback
