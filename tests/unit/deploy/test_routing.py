"""The choice of a replica: stable homes, hot keys that spread, rare ones that wait, costs compared, the dead left alone."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from limner import InvalidRequest
from limner.deploy.routing import AffinityRouter, Homes, Placements, RoutingPolicy, choose
from limner.errors import QueueFull

REPLICAS = [f"replica-{i}" for i in range(20)]
KEYS = [f"key-{i}" for i in range(2000)]


def home(homes: Homes, key: str) -> str:
    return homes.first(key, 1)[0]


def decide(
    key: str = "k", *, waits: dict[str, float], holders: tuple[str, ...] = (), uses: float = 1.0, **settings: Any
) -> tuple[str, str]:
    """Where a request of 2 s goes whose prefill takes 1 s; replicas that `waits` does not name are idle."""
    given: dict[str, Any] = {
        "fetch_seconds": 1.0,
        "mean_wait": 0.0,
        "policy": RoutingPolicy(homes=2, slack=0, bound=math.inf, repay=64),
        "oldest": lambda name: 0,
        **settings,
    }
    choice = choose(
        key,
        homes=Homes(REPLICAS),
        holders=holders,
        uses=uses,
        wait=lambda name: waits.get(name, 0.0),
        service_seconds=2.0,
        **given,
    )
    return choice.replica, choice.reason


def test_homes_are_even() -> None:
    counts = Counter(home(Homes(REPLICAS), key) for key in KEYS)
    assert set(counts) == set(REPLICAS)
    assert max(counts.values()) < 2 * len(KEYS) / len(REPLICAS)
    # second homes of the keys of one replica are everybody's: its failure falls on all
    seconds = {Homes(REPLICAS).first(key, 2)[1] for key in KEYS if home(Homes(REPLICAS), key) == REPLICAS[0]}
    assert len(seconds) > len(REPLICAS) * 3 / 4


def test_one_that_leaves_moves_its_own_keys_alone() -> None:
    homes = Homes(REPLICAS)
    before = {key: homes.first(key, 2) for key in KEYS}
    homes.leave(REPLICAS[3])
    for key in KEYS:
        first, second = before[key]
        assert home(homes, key) == (second if first == REPLICAS[3] else first)
    homes.join(REPLICAS[3])
    assert {key: homes.first(key, 2) for key in KEYS} == before


def test_one_that_joins_takes_its_share() -> None:
    homes = Homes(REPLICAS)
    before = {key: home(homes, key) for key in KEYS}
    homes.join("new")
    moved = [key for key in KEYS if home(homes, key) != before[key]]
    assert {home(homes, key) for key in moved} == {"new"}
    assert 0.5 < len(moved) / (len(KEYS) / (len(REPLICAS) + 1)) < 1.5


def test_order_is_the_same_in_every_process_and_for_every_history() -> None:
    program = (
        "from limner.deploy.routing import Homes; h = Homes(f'replica-{i}' for i in range(20)); print(h.first('k', 20))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(Homes(reversed(REPLICAS)).first("k", 20))
    asked = Homes(REPLICAS)
    short = asked.first("k", 3)
    assert asked.first("k", 99)[:3] == short
    assert sorted(asked.first("k", 99)) == sorted(REPLICAS)
    few = Homes(REPLICAS, max_keys=1)
    assert [few.first(key, 2) for key in KEYS[:50]] == [asked.first(key, 2) for key in KEYS[:50]]


def test_unknown_key_goes_home_or_to_the_less_busy_of_its_homes() -> None:
    first, second, third = Homes(REPLICAS).first("k", 3)
    assert decide(waits={}) == (first, "home")
    assert decide(waits={first: 0.1}) == (second, "home")
    assert decide(waits={first: 5.0, second: 9.0}) == (first, "home")  # the third, idle, is not asked
    assert decide(waits={first: 5.0, second: 9.0}, policy=RoutingPolicy(homes=3)) == (third, "home")


def test_of_homes_that_are_not_busier_the_one_that_loses_least() -> None:
    first, second, third = Homes(REPLICAS).first("k", 3)
    policy = RoutingPolicy(homes=3, slack=1.5)
    given: dict[str, Any] = {"policy": policy, "oldest": {first: 7, second: 5, third: 2}.__getitem__}
    assert decide(waits={}, **given) == (third, "home")
    assert decide(waits={third: 1.4}, **given) == (third, "home")
    assert decide(waits={third: 1.6}, **given) == (second, "home")
    assert decide(waits={third: 1.6}, fetch_seconds=2.0, **given) == (third, "home")


def test_costs_are_compared() -> None:
    """A rare key waits up to prefill x (1 + repay); one whose copies pay for themselves waits about a prefill."""
    a = REPLICAS[0]
    policy = RoutingPolicy(repay=4.0, bound=math.inf, homes=2, slack=0)
    rare, hot = {"uses": 1.0, "policy": policy}, {"uses": 40.0, "policy": policy}
    assert decide(waits={a: 4.9}, holders=(a,), **rare) == (a, "holder")
    assert decide(waits={a: 5.1}, holders=(a,), **rare)[1] == "spread"
    assert decide(waits={a: 1.0}, holders=(a,), **hot) == (a, "holder")
    assert decide(waits={a: 1.2}, holders=(a,), **hot)[1] == "spread"
    assert decide(waits={a: 1.2}, holders=(a,), fetch_seconds=2.0, **hot) == (a, "holder")
    # what waits elsewhere counts too
    assert decide(waits=dict.fromkeys(REPLICAS, 0.2) | {a: 1.2}, holders=(a,), **hot) == (a, "holder")


def test_a_further_copy_goes_to_the_next_home_that_has_none() -> None:
    order = Homes(REPLICAS).first("k", 20)
    for n in range(1, 18):
        chosen = decide(waits=dict.fromkeys(order[:n], 99.0) | {order[n]: 0.5}, holders=tuple(order[:n]))
        assert chosen == (order[n + 1], "spread")
    assert decide(waits=dict.fromkeys(order, 99.0), holders=tuple(order)) == (order[0], "holder")


def test_least_busy_holder_and_of_idle_ones_the_oldest() -> None:
    a, b, c = REPLICAS[:3]
    assert decide(waits={a: 0.3, b: 0.2, c: 0.4}, holders=(a, b, c)) == (b, "holder")
    assert decide(waits={a: 0.3}, holders=(a, c, b)) == (c, "holder")


def test_full_holders_lose_their_privilege() -> None:
    """Bounded load: over bound x (mean + own work) a rare key, too, waits for a prefill and no longer."""
    a = REPLICAS[0]
    policy = RoutingPolicy(repay=100.0, bound=1.5, homes=2, slack=0)
    assert decide(waits={a: 3.0}, holders=(a,), policy=policy) == (a, "holder")
    assert decide(waits={a: 3.1}, holders=(a,), policy=policy)[1] == "spread"
    assert decide(waits={a: 3.1}, holders=(a,), policy=policy, mean_wait=1.0) == (a, "holder")


def test_the_dead_and_those_that_refuse_are_not_chosen() -> None:
    router = AffinityRouter(REPLICAS, capacity_bytes=100)
    state: dict[str, Any] = {
        "nbytes": 1,
        "wait": lambda name: 0.0,
        "mean_wait": 0.0,
        "service_seconds": 1.0,
        "fetch_seconds": 1.0,
    }
    first, second, third = router.homes.first("k", 3)
    assert router.route("k", **state).replica == first
    assert router.route("k", avoid=(first,), **state).replica == second
    router.leave(first)
    choice = router.route("k", **state)
    assert (choice.replica, choice.reason) == (second, "holder")
    router.leave(second)
    choice = router.route("k", **state)
    assert (choice.replica, choice.reason) == (third, "home")
    router.join(first)  # comes back empty, and is the home of what nobody has
    assert router.route("k", **state).replica == third
    router.leave(third)
    choice = router.route("k", **state)
    assert (choice.replica, choice.reason) == (first, "home")
    # a belief about a stranger is not followed
    assert decide(waits={}, holders=("gone",))[1] == "home"
    for name in REPLICAS:
        router.leave(name)
    with pytest.raises(QueueFull, match="none of 0 replicas"):
        router.route("k", **state)
    with pytest.raises(QueueFull, match="none of 20 replicas"):
        decide(waits={}, avoid=tuple(REPLICAS))


def test_hot_key_spreads_and_rare_keys_stay() -> None:
    """Work that drains at the rate of 20 replicas; half of it for one key, the rest for 200, each with its own holder."""
    router = AffinityRouter(REPLICAS, capacity_bytes=20)
    waits = dict.fromkeys(REPLICAS, 0.0)
    went: dict[str, Counter[str]] = {}
    for i in range(4000):
        key = "hot" if i % 2 else f"rare-{i // 2 % 200}"
        choice = router.route(
            key,
            nbytes=1,
            wait=waits.__getitem__,
            mean_wait=sum(waits.values()) / 20,
            service_seconds=1.0,
            fetch_seconds=0.3,
        )
        went.setdefault(key, Counter())[choice.replica] += 1
        waits[choice.replica] += 1.0 if choice.reason == "holder" else 1.3
        waits = {name: max(0.0, seconds - 1 / (20 * 0.7)) for name, seconds in waits.items()}
    assert 7 <= len(went["hot"]) <= 20  # half of 0.7 x 20 replicas' work needs 7 at least
    copies = [len(replicas) for key, replicas in went.items() if key != "hot"]
    assert sum(copies) / len(copies) < 1.6
    assert max(waits.values()) < 8


def test_beliefs_follow_a_store_that_drops_the_least_recent() -> None:
    placements = Placements(capacity_bytes=10)
    for key in ("a", "b", "a", "c"):
        placements.record(key, "r", nbytes=4)
    assert [list(placements.holders(key)) for key in "abc"] == [["r"], [], ["r"]]
    placements.record("a", "s", nbytes=4)
    assert list(placements.holders("a")) == ["r", "s"]
    placements.record("huge", "r", nbytes=11)
    assert not placements.holders("huge")
    assert placements.uses("huge") == 0
    placements.drop("a", "r")
    placements.drop("a", "r")
    assert list(placements.holders("a")) == ["s"]
    placements.record("d", "r", nbytes=6)  # what was dropped has made room
    assert list(placements.holders("c")) == ["r"]
    assert placements.oldest("r", nbytes=1) == 4  # c would go: the fourth that was recorded
    assert (placements.oldest("s", nbytes=6), placements.oldest("new", nbytes=6)) == (-6, -10)
    placements.forget("r")
    assert placements.oldest("r", nbytes=10) == -10
    assert not placements.holders("c")
    assert list(placements.holders("a")) == ["s"]


def test_uses_are_those_of_a_life_in_memory() -> None:
    placements = Placements(capacity_bytes=10)
    for _ in range(3):
        placements.record("a", "r", nbytes=5)
    assert placements.uses("a") == pytest.approx(6)  # half of the memory is filled, so twice as many are to come
    placements.record("a", "s", nbytes=5)
    assert placements.uses("a") == pytest.approx(4)
    placements.drop("a", "s")
    assert placements.uses("a") == pytest.approx(4)  # a copy that goes takes its share with it
    for i in range(200):  # every fourth request, in a memory where entries live for eight
        placements.record("a" if i % 4 == 0 else f"other-{i}", "r", nbytes=1)
    assert 1 < placements.uses("a") < 4


def test_refuses_what_makes_no_sense() -> None:
    for field, value in (
        ("repay", -1.0),
        ("repay", math.nan),
        ("homes", 0),
        ("bound", 0.5),
        ("bound", math.nan),
        ("slack", -1.0),
    ):
        with pytest.raises(InvalidRequest, match=field):
            RoutingPolicy(**{field: value})
    with pytest.raises(InvalidRequest, match="capacity_bytes"):
        Placements(capacity_bytes=0)
    with pytest.raises(InvalidRequest, match="fetch_seconds"):
        decide(waits={}, fetch_seconds=-1.0)
