"""Bodies on their way and in memory, of one owner and in all."""

from __future__ import annotations

import pytest

from limner.errors import QueueFull, RateLimited
from limner.server.access import bodies
from limner.server.access.bodies import Bodies
from limner.server.access.keys import LOCAL, Owner

ANNA, BOB = Owner.named("anna"), Owner.named("bob")


def test_slow_bodies_of_one_owner_leave_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_COMING", 3)
    all_ = Bodies(max_bytes=400, shared=True)
    coming = [all_.open(ANNA) for _ in range(3)]
    with pytest.raises(RateLimited, match="anna sends 3 bodies at once"):
        all_.open(ANNA)
    all_.open(BOB).close()
    coming[0].come()
    all_.open(ANNA).close()
    for body in coming:
        body.close()
    assert all_.num_bytes == 0


def test_bytes_of_one_owner_are_a_quarter() -> None:
    all_ = Bodies(max_bytes=400, shared=True)
    first, second = all_.open(ANNA), all_.open(ANNA)
    first.take(60)
    first.come()  # it is still in memory
    second.take(40)
    with pytest.raises(RateLimited, match="requests of anna have over 100 bytes at once"):
        second.take(1)
    others = [all_.open(Owner.named(name)) for name in ("bob", "carl", "dora")]
    for body in others:
        body.take(100)
    with pytest.raises(QueueFull):
        all_.open(Owner.named("emil")).take(1)
    first.close()
    second.take(60)


def test_a_server_of_one_owner_has_no_share() -> None:
    all_ = Bodies(max_bytes=400, shared=False)
    opened = [all_.open(LOCAL) for _ in range(200)]
    opened[0].take(400)
    with pytest.raises(QueueFull):
        opened[1].take(1)
    opened[0].close()
    opened[1].take(400)
