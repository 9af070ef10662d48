"""Who sends many requests waits for each of them, and nobody else does."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from limner.errors import AccessDenied
from limner.server.access.keys import Owner
from limner.server.http import turns
from limner.server.http.turns import Turns


def owner_of(headers: Mapping[str, str]) -> Owner:
    if "x-key" not in headers:
        raise AccessDenied("no key", missing=True)
    return Owner.named(headers["x-key"])


def scope(key: str | None = None, *, client: str = "10.0.0.1") -> dict[str, Any]:
    headers = [] if key is None else [(b"x-key", key.encode())]
    return {"type": "http", "method": "GET", "path": "/", "headers": headers, "client": (client, 5)}


async def nothing(*_: Any) -> None:
    raise AssertionError("no message is read or sent here")


class Began:
    """An application that notes who began, and lets those who look at the rounds of the loop count them."""

    def __init__(self) -> None:
        self.order: list[str] = []

    async def __call__(self, asked: Any, receive: Any, send: Any) -> None:
        self.order.append(asked["headers"][0][1].decode() if asked["headers"] else asked["client"][0])


def test_one_request_of_each_caller_begins_in_a_round() -> None:
    began = Began()

    async def run() -> None:
        app = Turns(began, owner_of=owner_of)
        crowd = [asyncio.create_task(app(scope("anna"), nothing, nothing)) for _ in range(50)]
        await asyncio.sleep(0)  # all are there
        await asyncio.gather(*(app(scope(**who), nothing, nothing) for who in ({"key": "bob"}, {"client": "10.0.0.9"})))
        assert set(began.order[-4:]) >= {"bob", "10.0.0.9"}
        assert len(began.order) < 10
        await asyncio.gather(*crowd)
        assert len(began.order) == 52

    asyncio.run(run())


def test_strangers_of_an_address_take_turns_as_one() -> None:
    began = Began()

    async def run() -> None:
        app = Turns(began, owner_of=owner_of)
        crowd = [asyncio.create_task(app(scope(client="10.0.0.1"), nothing, nothing)) for _ in range(20)]
        await asyncio.sleep(0)
        await app(scope("bob"), nothing, nothing)
        assert len(began.order) < 8
        await asyncio.gather(*crowd)

    asyncio.run(run())


@pytest.mark.parametrize("others", [False, True])
def test_time_is_left_to_others_where_there_are_any(others: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        later = loop.call_later
        monkeypatch.setattr(loop, "call_later", lambda delay, *call: (rests.append(delay), later(delay, *call))[1])
        app = Turns(Began(), owner_of=owner_of)
        if others:
            await app(scope("bob"), nothing, nothing)
            await asyncio.sleep(0)
        await asyncio.gather(*(app(scope("anna"), nothing, nothing) for _ in range(5)))

    asyncio.run(run())
    assert bool(rests) == others
    assert all(rest <= turns._MAX_REST for rest in rests)


def test_who_leaves_takes_no_turn() -> None:
    began = Began()

    async def run() -> None:
        app = Turns(began, owner_of=owner_of)
        tasks = [asyncio.create_task(app(scope("anna"), nothing, nothing)) for _ in range(4)]
        await asyncio.sleep(0)
        tasks[2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await app(scope("anna"), nothing, nothing)
        assert began.order == ["anna"] * 4
        await asyncio.sleep(0.05)
        assert not app._waiting
        assert not app._begun

    asyncio.run(run())
