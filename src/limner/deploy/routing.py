"""Which replica a request goes to: one that holds its references, unless waiting there costs more than a prefill elsewhere.

Owns the order of homes of a key, beliefs about which replica holds what, and the choice. Knows nothing of Ray, HTTP,
clocks, threads or how a queue is measured: the caller gives the seconds of work that wait at a replica and the cost of a
prefill. Standard library alone, no randomness: equal inputs give equal choices.

Ideas, and what is used of them:

- *Rendezvous hashing* (Thaler and Ravishankar 1998, "Using name-based mappings to increase hit rates"): each pair of key
  and replica has a score, and a key's homes are the replicas in order of score. Routers agree on it without
  communication, and when a replica joins or leaves, only the keys that have it first move.
- *Bounded loads* (Mirrokni, Thorup and Zadimoghaddam 2016, "Consistent hashing with bounded loads", arXiv:1608.01350):
  what does not fit at the home goes to the next home and not to a random replica, so a hot key has few copies, always
  in the same places. The bound here is in seconds of waiting work.
- *The power of d choices* (Mitzenmacher 2001, "The power of two choices in randomized load balancing"): the least busy of
  a few candidates is nearly as good as the least busy of all, and needs no view of all queues.
- *The price of a copy*, and placing a new key where it evicts the oldest entry, were found by simulation (docs/scale.md).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from limner.errors import InvalidRequest, QueueFull

__all__ = ["AffinityRouter", "Choice", "Homes", "Placements", "RoutingPolicy", "choose"]

_MASK = (1 << 64) - 1


def _digest(name: str) -> int:
    """Return 64 bits of a name, equal in every process (`hash` of a string is not)."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def _scores(seed: int, replicas: dict[str, int]) -> list[tuple[int, str]]:
    """Return the score and name of each replica for the key of this seed.

    The score is the 64-bit finalizer of MurmurHash3 without its last shift. Both inputs are digests already; the orders
    of two keys only have to be independent of each other.
    """
    return [
        (((x := (seed ^ own) * 0xFF51AFD7ED558CCD & _MASK) ^ x >> 33) * 0xC4CEB9FE1A85EC53 & _MASK, name)
        for name, own in replicas.items()
    ]


class Homes:
    """The order in which replicas are homes of a key, by rendezvous hashing.

    When a replica leaves, only its own keys move: each to its next home. One that joins gets about 1 / number of
    replicas of all keys. The orders of the `max_keys` keys used last are cached.
    """

    def __init__(self, replicas: Iterable[str] = (), *, max_keys: int = 65536) -> None:
        self._seeds = {name: _digest(name) for name in replicas}
        self._orders: OrderedDict[str, list[str]] = OrderedDict()
        self._max_keys = max_keys

    def __contains__(self, replica: object) -> bool:
        return replica in self._seeds

    def __len__(self) -> int:
        return len(self._seeds)

    def __iter__(self) -> Iterator[str]:
        return iter(self._seeds)

    def join(self, replica: str) -> None:
        """Add a replica; no effect if it is there already."""
        if replica not in self._seeds:
            self._seeds[replica] = _digest(replica)
            self._orders.clear()

    def leave(self, replica: str) -> None:
        """Remove a replica; no effect if it is not there."""
        if self._seeds.pop(replica, None) is not None:
            for key in [key for key, order in self._orders.items() if replica in order]:
                del self._orders[key]

    def first(self, key: str, count: int) -> list[str]:
        """Return the first `count` homes of a key, all if there are fewer; the first one is *the* home."""
        order = self._orders.get(key)
        wanted = min(count, len(self._seeds))
        if order is None or len(order) < wanted:
            # twice as many as needed now: a key that gets hot needs one more each time it spreads
            ranked = sorted(_scores(_digest(key), self._seeds), reverse=True)
            order = [name for _, name in ranked[: 2 * wanted]]
            self._orders[key] = order
            if len(self._orders) > self._max_keys:
                self._orders.popitem(last=False)
        self._orders.move_to_end(key)
        return order[:wanted]


class Placements:
    """Which keys each replica is believed to hold, from past placements: those used last there.

    A replica's list is as long as `capacity_bytes` allows, which should be the memory of its store (device and host
    together); its store evicts the least recently used, and so does this. Where there are several routers, each sees a
    part of the requests, so a belief may be wrong both ways; that costs a prefill and never a wrong image. Raises
    `InvalidRequest`.
    """

    def __init__(self, *, capacity_bytes: int) -> None:
        if not capacity_bytes > 0:
            raise InvalidRequest(
                "capacity_bytes", f"{capacity_bytes} is not over 0; give the bytes that a replica keeps"
            )
        self._capacity = capacity_bytes
        self._held: dict[str, OrderedDict[str, tuple[int, int]]] = {}  # bytes, and turn of the last use
        self._turn = 0
        self._bytes: dict[str, int] = {}
        self._copies: dict[str, dict[str, None]] = {}
        self._uses: dict[str, tuple[float, int]] = {}  # decayed count, and its turn

    def holders(self, key: str) -> Collection[str]:
        """Return the replicas that are believed to hold a key, or to prefill it, oldest copy first."""
        return self._copies.get(key, {}).keys()

    def uses(self, key: str) -> float:
        """Return the requests that a copy of the key serves while an idle entry stays in memory; 0 without copies.

        The mean over its copies; the past decays at the rate at which memory evicts. Until memory is full, the count is
        divided by the share that is filled.
        """
        copies = self._copies.get(key)
        if not copies:
            return 0.0
        return self._uses[key][0] / len(copies) * self._capacity / self._bytes[next(iter(copies))]

    def oldest(self, replica: str, *, nbytes: int) -> int:
        """Return the turn in which the entry that `nbytes` more would evict from the replica was used last.

        If none would be evicted: minus the free bytes, so that less is better in any case.
        """
        held = self._held.get(replica)
        room = self._capacity - self._bytes.get(replica, 0)
        if not held or nbytes <= room:
            return -room
        return next(iter(held.values()))[1]

    def record(self, key: str, replica: str, *, nbytes: int) -> None:
        """Record that a request for the key went to the replica, which holds it or will do so soon.

        An entry over the whole capacity is not cached there, and not recorded.
        """
        held = self._held.setdefault(replica, OrderedDict())
        self._turn += 1
        if key in held:
            held[key] = held[key][0], self._turn
            held.move_to_end(key)
            self._use(key, held)
            return
        if nbytes > self._capacity:
            return
        held[key] = nbytes, self._turn
        self._bytes[replica] = self._bytes.get(replica, 0) + nbytes
        self._copies.setdefault(key, {})[replica] = None
        self._use(key, held)
        while self._bytes[replica] > self._capacity:
            self.drop(next(iter(held)), replica)

    def drop(self, key: str, replica: str) -> None:
        """Record that the replica does not hold the key."""
        held = self._held.get(replica)
        if held is not None and key in held:
            self._bytes[replica] -= held.pop(key)[0]
            copies = self._copies[key]
            del copies[replica]
            if copies:
                uses, turn = self._uses[key]
                self._uses[key] = uses * len(copies) / (len(copies) + 1), turn
            else:
                del self._copies[key], self._uses[key]

    def forget(self, replica: str) -> None:
        """Record that the replica is gone, with all that it held."""
        for key in list(self._held.get(replica, ())):
            self.drop(key, replica)
        self._held.pop(replica, None)
        self._bytes.pop(replica, None)

    def _use(self, key: str, held: OrderedDict[str, tuple[int, int]]) -> None:
        """Count a use, after dividing the count by e for each lifetime of an entry in `held` since the last use."""
        uses, turn = self._uses.get(key, (0.0, self._turn))
        life = self._turn - next(iter(held.values()))[1]
        if life > 0:
            uses *= math.exp((turn - self._turn) / life)
        self._uses[key] = uses + 1, self._turn


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingPolicy:
    """When a request leaves the replicas that hold its references; the defaults are from simulation (docs/scale.md)."""

    repay: float = 320.0
    """Requests that a copy has to serve while it is in memory to be worth its cost: memory of other keys, and time of
    other requests. A request waits at a holder for up to `prefill x (1 + repay / requests that a copy serves)`, so hot
    keys spread early and rare ones late."""
    bound: float = 4.0
    """A holder whose queue is over `bound` times (mean queue + the request itself) is full: a request waits there only for
    up to the prefill. `math.inf`: no bound."""
    homes: int = 8
    """How many homes are compared for a key without holder and for a further copy: a new entry goes where it evicts the
    least recently used, so that many small memories evict about what one large memory would. Routers that share nothing
    each place by what they have seen themselves: give them 1, so that they agree."""
    slack: float = 2.0
    """Of these homes, only those are candidates where at most `slack` prefills more wait than at the least busy one."""

    def __post_init__(self) -> None:
        for name, least, usual in (("repay", 0, 320), ("bound", 1, 4), ("homes", 1, 8), ("slack", 0, 2)):
            value = getattr(self, name)
            if not value >= least:
                raise InvalidRequest(name, f"{value} is not at least {least}; {usual} is the default")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Where a request goes, and why.

    "holder": the references are there. "home": no replica has them. "spread": those that have them are too busy, so
    there will be one more copy.
    """

    replica: str
    reason: Literal["holder", "home", "spread"]


def choose(
    key: str,
    *,
    homes: Homes,
    holders: Collection[str],
    uses: float,
    wait: Callable[[str], float],
    oldest: Callable[[str], float],
    mean_wait: float,
    service_seconds: float,
    fetch_seconds: float,
    policy: RoutingPolicy,
    avoid: Collection[str] = (),
) -> Choice:
    """Choose a replica for one request; changes nothing.

    `holders` are believed to have the key, and a copy serves `uses` requests in its life (see `Placements.uses`); those
    that are not in `homes`, or are in `avoid` (they refused, or do not answer), are skipped. `wait(replica)` are the
    seconds of work that wait there, `mean_wait` their mean over all replicas, `oldest(replica)` the last use of what a new
    entry would evict there (see `Placements.oldest`), `service_seconds` the request itself with its references at hand,
    `fetch_seconds` a prefill or, if that is less, reading a shared tier. Raises `QueueFull` if no replica is left, and
    `InvalidRequest`.
    """
    if not fetch_seconds >= 0:
        raise InvalidRequest("fetch_seconds", f"{fetch_seconds} is not at least 0; give the seconds of a prefill")
    best, cost, slack = None, math.inf, policy.slack * fetch_seconds
    for name in holders:
        if name in homes and name not in avoid:
            seconds = wait(name)
            if best is None or seconds < cost:
                best, cost = name, seconds
                if seconds <= 0.0:
                    break  # the oldest idle copy: the others age and are evicted
    if best is None:
        order = [name for name in homes.first(key, policy.homes + len(avoid)) if name not in avoid]
        if not order:
            raise QueueFull(f"none of {len(homes)} replicas takes requests; try again later")
        return Choice(replica=_place(order[: policy.homes], wait, oldest, slack), reason="home")
    price = fetch_seconds
    if cost <= policy.bound * (mean_wait + service_seconds):
        price *= 1 + policy.repay / max(1.0, uses)
    if cost > price:
        order = homes.first(key, len(holders) + len(avoid) + policy.homes)
        others = [name for name in order if name not in holders and name not in avoid][: policy.homes]
        if others:
            other = _place(others, wait, oldest, slack)
            if wait(other) + price < cost:
                return Choice(replica=other, reason="spread")
    return Choice(replica=best, reason="holder")


def _place(homes: list[str], wait: Callable[[str], float], oldest: Callable[[str], float], slack_seconds: float) -> str:
    waits = [wait(name) for name in homes]
    limit = min(waits) + slack_seconds
    return min((name for name, seconds in zip(homes, waits, strict=True) if seconds <= limit), key=oldest)


class AffinityRouter:
    """One router: its members, beliefs and policy. Not safe for threads: an event loop has one.

    `capacity_bytes` is the memory of one replica's store. Routers that share nothing may each have one of these.
    """

    def __init__(
        self,
        replicas: Iterable[str] = (),
        *,
        capacity_bytes: int,
        policy: RoutingPolicy | None = None,
        homes: Homes | None = None,
    ) -> None:
        self.policy = RoutingPolicy() if policy is None else policy
        self.homes = Homes() if homes is None else homes
        for name in replicas:
            self.homes.join(name)
        self.placements = Placements(capacity_bytes=capacity_bytes)

    def join(self, replica: str) -> None:
        """Add a replica that is ready. One that was here before is believed to hold nothing."""
        self.homes.join(replica)

    def leave(self, replica: str) -> None:
        """Remove a replica that died or will be stopped, and what it held."""
        self.homes.leave(replica)
        self.placements.forget(replica)

    def route(
        self,
        key: str,
        *,
        nbytes: int,
        wait: Callable[[str], float],
        mean_wait: float,
        service_seconds: float,
        fetch_seconds: float,
        avoid: Collection[str] = (),
    ) -> Choice:
        """Return what `choose` does with the beliefs of this router, and record the key of `nbytes` there. Same errors."""
        choice = choose(
            key,
            homes=self.homes,
            holders=self.placements.holders(key),
            uses=self.placements.uses(key),
            wait=wait,
            oldest=lambda name: self.placements.oldest(name, nbytes=nbytes),
            mean_wait=mean_wait,
            service_seconds=service_seconds,
            fetch_seconds=fetch_seconds,
            policy=self.policy,
            avoid=avoid,
        )
        self.placements.record(key, choice.replica, nbytes=nbytes)
        return choice
