"""Limits: who has to wait, and for how long."""

from __future__ import annotations

import math

import pytest

from limner.errors import InvalidRequest, RateLimited
from limner.server.access.keys import Owner
from limner.server.access.limits import Limiter, LimitPolicy

ANNA, BEN = Owner.named("anna"), Owner.named("ben")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_then_the_rate() -> None:
    clock = Clock()
    limiter = Limiter(LimitPolicy(requests_per_minute=6, burst=3), clock=clock)  # a token in 10 s
    for _ in range(3):
        limiter.admit(ANNA)
    with pytest.raises(RateLimited, match="anna.*6 requests a minute.*10 s") as caught:
        limiter.admit(ANNA)
    assert caught.value.retry_after == 10
    limiter.admit(BEN)  # another's bucket

    clock.now += 3.5
    with pytest.raises(RateLimited) as caught:
        limiter.admit(ANNA)
    assert caught.value.retry_after == 7  # 6.5, rounded up; asking again did not cost anything
    clock.now += 6.5
    limiter.admit(ANNA)
    with pytest.raises(RateLimited):
        limiter.admit(ANNA)

    clock.now += 1000  # no more than the burst is saved up
    for _ in range(3):
        limiter.admit(ANNA)
    with pytest.raises(RateLimited):
        limiter.admit(ANNA)


@pytest.mark.parametrize("seconds", [0.001, 0.5, 1, 7, 22, 60, 85.7])  # for a token
def test_who_waits_as_long_as_told_is_admitted(seconds: float) -> None:
    """Also if he asks in between: parts of a token add up to one, for all that floating point says (2 s and 5 s of 7)."""
    clock = Clock()
    limiter = Limiter(LimitPolicy(requests_per_minute=60 / seconds, burst=1), clock=clock)
    for waited in range(max(1, math.floor(seconds))):
        limiter.admit(ANNA)
        clock.now += waited
        with pytest.raises(RateLimited) as caught:
            limiter.admit(ANNA)
        assert isinstance(caught.value.retry_after, int)
        assert caught.value.retry_after == max(1, math.ceil(seconds - waited))
        clock.now += caught.value.retry_after


def test_no_more_than_the_burst_is_saved_up() -> None:
    clock = Clock()
    limiter = Limiter(LimitPolicy(requests_per_minute=60, burst=10), clock=clock)
    limiter.admit(ANNA)
    clock.now += 9.5  # 9 tokens and 9.5 more
    for _ in range(10):
        limiter.admit(ANNA)
    with pytest.raises(RateLimited):
        limiter.admit(ANNA)


def test_memory_is_bounded() -> None:
    clock = Clock()
    limiter = Limiter(LimitPolicy(requests_per_minute=60, burst=10), clock=clock)  # full after 10 s
    for number in range(1000):
        clock.now += 1
        limiter.admit(Owner.named(f"owner{number}"))
        assert limiter.num_owners <= 11


def test_a_forgotten_bucket_is_a_full_one() -> None:
    """Dropping must not give tokens away: one who comes just before the bucket is full has what he would have had."""
    clock = Clock()
    limiter = Limiter(LimitPolicy(requests_per_minute=60, burst=10), clock=clock)
    for _ in range(10):
        limiter.admit(ANNA)
    clock.now += 9
    limiter.admit(BEN)
    for _ in range(9):
        limiter.admit(ANNA)
    with pytest.raises(RateLimited):
        limiter.admit(ANNA)


def test_jobs_at_once() -> None:
    clock = Clock()
    limiter = Limiter(LimitPolicy(concurrent=2), clock=clock)
    first = limiter.hold(ANNA)
    clock.now += 4
    with limiter.hold(ANNA):
        assert limiter.running(ANNA) == 2
        clock.now += 2
        with pytest.raises(RateLimited, match="2 unfinished jobs.*may have 2") as caught:
            limiter.hold(ANNA)
        assert caught.value.retry_after == 6  # nothing is known but that the oldest has run 6 s
        limiter.hold(BEN).release()  # took 0 s
        restored = limiter.hold(ANNA, beyond_limit=True)
        assert limiter.running(ANNA) == 3
        restored.release()
        restored.release()  # again: nothing
        assert limiter.running(ANNA) == 2
    first.release()
    assert limiter.running(ANNA) == 0
    assert limiter.num_owners == 0


def test_the_time_to_wait_for_a_place_comes_from_how_long_jobs_take() -> None:
    clock = Clock()
    limiter = Limiter(LimitPolicy(concurrent=1), clock=clock)
    with limiter.hold(BEN):
        clock.now += 30
    limiter.hold(ANNA)
    for age, expected in ((0, 30), (12.5, 18), (29.9, 1), (45, 45)):
        clock.now = 1030 + age
        with pytest.raises(RateLimited) as caught:
            limiter.hold(ANNA)
        assert caught.value.retry_after == expected


@pytest.mark.parametrize(
    "wrong", [{"requests_per_minute": 0}, {"requests_per_minute": float("nan")}, {"burst": 0}, {"concurrent": 0}]
)
def test_limits_that_let_nobody_in_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        LimitPolicy(**wrong)  # type: ignore[arg-type]
