"""Which replica a request goes to: one that holds its references, unless waiting there costs more than a prefill elsewhere.

Owns the order of homes of a key, what is believed to be where, and the choice between replicas. Knows nothing of Ray,
HTTP, clocks, threads or how a queue is measured: the caller says how many seconds of work wait at a replica and what a
prefill would take. Standard library alone, no randomness: equal inputs give equal choices.

Ideas, and what is taken of them:

- *Rendezvous hashing* (Thaler and Ravishankar 1998, "Using name-based mappings to increase hit rates"): each pair of key
  and replica has a score, and a key's homes are the replicas in order of score. Routers that never speak to each other
  agree on it, and when a replica joins or leaves, only keys that have it in front move.
- *Bounded loads* (Mirrokni, Thorup and Zadimoghaddam 2016, "Consistent hashing with bounded loads", arXiv:1608.01350):
  what does not fit at the home goes to the next home and not to a random replica, so a hot key has few copies, and
  always at the same places. The bound here is of seconds of waiting work.
- *The power of d choices* (Mitzenmacher 2001, "The power of two choices in randomized load balancing"): the least of a
  few candidates is nearly as good as the least of all, and needs no view of all queues.
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
    """64 bits of a name, the same in every process (`hash` of a string is not)."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def _scores(seed: int, replicas: dict[str, int]) -> list[tuple[int, str]]:
    """Score and name of each replica for the key of this seed: the finalizer of MurmurHash3, 64 bits, without its last
    shift. Both inputs are digests already; what counts is that the order of one key says nothing of the next one's."""
    return [
        (((x := (seed ^ own) * 0xFF51AFD7ED558CCD & _MASK) ^ x >> 33) * 0xC4CEB9FE1A85EC53 & _MASK, name)
        for name, own in replicas.items()
    ]


class Homes:
    """The order in which replicas are homes of a key, by rendezvous hashing.

    A replica that leaves takes only its own keys with it: each goes to its next home. One that joins gets about a
    share of 1 / number of replicas of all keys. Orders are kept for the `max_keys` keys used last.
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
        """Adds a replica; one that is there already changes nothing."""
        if replica not in self._seeds:
            self._seeds[replica] = _digest(replica)
            self._orders.clear()

    def leave(self, replica: str) -> None:
        """Takes a replica out; one that is not there changes nothing."""
        if self._seeds.pop(replica, None) is not None:
            for key in [key for key, order in self._orders.items() if replica in order]:
                del self._orders[key]

    def first(self, key: str, count: int) -> list[str]:
        """The first `count` homes of a key, all if there are fewer; the first one is *the* home."""
        order = self._orders.get(key)
        wanted = min(count, len(self._seeds))
        if order is None or len(order) < wanted:
            # twice as many as asked for: a key that gets hot asks for one more each time it spreads
            ranked = sorted(_scores(_digest(key), self._seeds), reverse=True)
            order = [name for _, name in ranked[: 2 * wanted]]
            self._orders[key] = order
            if len(self._orders) > self._max_keys:
                self._orders.popitem(last=False)
        self._orders.move_to_end(key)
        return order[:wanted]


class Placements:
    """What is believed to be held where, from the placements of the past: for each replica the keys used last there.

    A replica's list is as long as `capacity_bytes` allows, which should be what its store keeps (device and host memory
    together); its store drops what was used least recently, and so does this. Several routers see a part of the requests
    each, so a belief may be wrong both ways; that costs a prefill and never a wrong picture.
    """

    def __init__(self, *, capacity_bytes: int) -> None:
        if not capacity_bytes > 0:
            raise InvalidRequest(
                "capacity_bytes", f"{capacity_bytes} is not over 0; give the bytes that a replica keeps"
            )
        self._capacity = capacity_bytes
        self._held: dict[str, OrderedDict[str, int]] = {}
        self._bytes: dict[str, int] = {}
        self._uses_at: dict[str, dict[str, int]] = {}
        self._uses: dict[str, int] = {}

    def holders(self, key: str) -> Collection[str]:
        """The replicas that are believed to hold a key, or to be making it, oldest copy first."""
        return self._uses_at.get(key, {}).keys()

    def uses(self, key: str) -> float:
        """Requests a copy of the key has served, on average over the copies that are still there; 0 without copies."""
        copies = self._uses_at.get(key)
        return self._uses[key] / len(copies) if copies else 0.0

    def record(self, key: str, replica: str, *, nbytes: int) -> None:
        """A request for the key went to the replica, so it holds the key or is about to.

        An entry over the whole capacity is not kept there, nor believed to be.
        """
        held = self._held.setdefault(replica, OrderedDict())
        if key in held:
            held.move_to_end(key)
            self._uses_at[key][replica] += 1
            self._uses[key] += 1
            return
        if nbytes > self._capacity:
            return
        held[key] = nbytes
        self._bytes[replica] = self._bytes.get(replica, 0) + nbytes
        self._uses_at.setdefault(key, {})[replica] = 1
        self._uses[key] = self._uses.get(key, 0) + 1
        while self._bytes[replica] > self._capacity:
            self.drop(next(iter(held)), replica)

    def drop(self, key: str, replica: str) -> None:
        """The replica does not hold the key, or no longer."""
        held = self._held.get(replica)
        if held is not None and key in held:
            self._bytes[replica] -= held.pop(key)
            self._uses[key] -= self._uses_at[key].pop(replica)
            if not self._uses_at[key]:
                del self._uses_at[key], self._uses[key]

    def forget(self, replica: str) -> None:
        """The replica is gone, with all that it held."""
        for key in list(self._held.get(replica, ())):
            self.drop(key, replica)
        self._held.pop(replica, None)
        self._bytes.pop(replica, None)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingPolicy:
    """When a request leaves the replicas that hold its references; the defaults are from simulation (docs/scale.md)."""

    repay: float = 64.0
    """Requests that a new copy has to serve before it has paid for itself. A copy takes memory from other keys and time
    from other requests; of a key whose copies served few requests so far, another is worth little. Waiting at a holder
    is accepted up to `prefill x (1 + repay / requests served by a copy)`, so hot keys spread early and rare ones late."""
    homes: int = 2
    """How many homes are compared, for a key that nobody holds and for a further copy."""
    bound: float = 1.25
    """A holder whose queue is over `bound` times (mean queue + the request itself) is full: there, waiting is accepted
    only up to the prefill. `math.inf`: no bound."""

    def __post_init__(self) -> None:
        if not 0 <= self.repay < math.inf:
            raise InvalidRequest("repay", f"{self.repay} is not a number of at least 0; 64 is the default")
        if self.homes < 1:
            raise InvalidRequest("homes", f"{self.homes} is not at least 1; 2 is the default")
        if not self.bound >= 1:
            raise InvalidRequest("bound", f"{self.bound} is not at least 1; 1.25 is the default")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Where a request goes, and why.

    "holder": the references are there. "home": nobody has them. "spread": who has them is too busy; one more copy.
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
    mean_wait: float,
    service_seconds: float,
    fetch_seconds: float,
    policy: RoutingPolicy,
    avoid: Collection[str] = (),
) -> Choice:
    """Chooses a replica for one request; changes nothing.

    `holders` are believed to have the key and served `uses` requests each; those that are no members of `homes`, or are
    in `avoid` (they refused, or do not answer), are passed over. `wait(replica)` are the seconds of work that wait there,
    `mean_wait` their mean over all replicas, `service_seconds` the request itself with its references at hand,
    `fetch_seconds` a prefill or, if that is less, reading a shared tier. Raises `QueueFull` if no replica is left.
    """
    if not fetch_seconds >= 0:
        raise InvalidRequest("fetch_seconds", f"{fetch_seconds} is not at least 0; give the seconds of a prefill")
    best, cost = None, math.inf
    for name in holders:
        if name in homes and name not in avoid:
            seconds = wait(name)
            if best is None or seconds < cost:
                best, cost = name, seconds
                if seconds <= 0.0:
                    break  # the oldest idle copy: copies that are not needed age, and leave
    if best is None:
        order = [name for name in homes.first(key, policy.homes + len(avoid)) if name not in avoid]
        if not order:
            raise QueueFull(f"none of {len(homes)} replicas takes requests; try again later")
        return Choice(replica=min(order[: policy.homes], key=wait), reason="home")
    price = fetch_seconds
    if cost <= policy.bound * (mean_wait + service_seconds):
        price *= 1 + policy.repay / max(1.0, uses)
    if cost > price:
        order = homes.first(key, len(holders) + len(avoid) + policy.homes)
        others = [name for name in order if name not in holders and name not in avoid][: policy.homes]
        if others:
            other = min(others, key=wait)
            if wait(other) + price < cost:
                return Choice(replica=other, reason="spread")
    return Choice(replica=best, reason="holder")


class AffinityRouter:
    """One router: members, beliefs and policy; `route` chooses and remembers. Not safe for threads (an event loop has one).

    `capacity_bytes` is what one replica keeps. Routers that share nothing may each have one of these.
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
        """A replica is ready; it is taken to hold nothing."""
        self.placements.forget(replica)
        self.homes.join(replica)

    def leave(self, replica: str) -> None:
        """A replica died or is to be stopped: it gets no more requests, and what it held is held no more."""
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
        """`choose` with what this router knows, which then counts the key of `nbytes` as held there. Same errors."""
        choice = choose(
            key,
            homes=self.homes,
            holders=self.placements.holders(key),
            uses=self.placements.uses(key),
            wait=wait,
            mean_wait=mean_wait,
            service_seconds=service_seconds,
            fetch_seconds=fetch_seconds,
            policy=self.policy,
            avoid=avoid,
        )
        self.placements.record(key, choice.replica, nbytes=nbytes)
        return choice
