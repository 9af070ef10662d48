"""Event streams: so many of one owner, so many in all."""

from __future__ import annotations

import pytest

from limner.errors import RateLimited
from limner.server.access.keys import Owner
from limner.server.access.streams import Streams


def test_streams_of_one_owner_leave_room_for_others() -> None:
    streams = Streams(total=6)
    anna, bob, carol = (Owner(name=name, id=name) for name in ("anna", "bob", "carol"))
    closes = [streams.open(anna) for _ in range(3)]
    with pytest.raises(RateLimited, match=r"anna has 3 event streams open and may have 3; close one, or poll"):
        streams.open(anna)
    others = [streams.open(bob) for _ in range(3)]
    with pytest.raises(RateLimited, match="6 event streams are open"):
        streams.check(carol)
    closes[0]()
    streams.open(carol)()
    streams.open(anna)
    for close in [*closes[1:], *others]:
        close()
    assert list(streams._open.elements()) == ["anna"]


def test_one_owner_never_has_more_than_32() -> None:
    streams, anna = Streams(total=1000), Owner(name="anna", id="anna")
    for _ in range(32):
        streams.open(anna)
    with pytest.raises(RateLimited):
        streams.open(anna)
