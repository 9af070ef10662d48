"""Routing on paper: affinity of references against random, round robin and power of two, 8 to 512 replicas, no cluster.

An event-driven simulation, seeded. Requests arrive openly, each names one of many reference sets; a replica runs one batch
at a time and keeps K/V within a budget of bytes, least recently used first out; batches share references as in
`limner.engine`. Service times are the measured ones of benchmarks/results (profile `cpu`) or derived from published
figures (profiles `gpu-512`, `gpu-1024`: see `gpu_profile`). The routing itself is `limner.deploy.routing`, the code that
serves. A table for each question, a plot, and one JSON object as last line.

    .venv/bin/python benchmarks/routing.py -o benchmarks/results/routing
"""

from __future__ import annotations

import argparse
import functools
import heapq
import itertools
import json
import math
import platform
import shlex
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from limner.deploy.routing import AffinityRouter, Homes, RoutingPolicy

RESULTS = Path(__file__).parent / "results"
GiB = 2**30
MAX_BATCH = 8
POLICIES = ("random", "round robin", "power of two", "hash", "ours", "ours + tier", "one cache")


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A replica and the cost of its work in seconds; tuples are indexed by number of references - 1."""

    name: str
    warm_seconds: tuple[float, ...]
    prefill_seconds: tuple[float, ...]
    reference_bytes: int
    extra_image: float
    """Seconds of each further image of a batch, as a share of the first."""
    device_bytes: int
    host_bytes: int
    host_rate: float
    """Bytes a second from host memory to the device; the references of a hit in host memory are copied once."""
    tier_link: float
    """Bytes a second at which one replica reads the shared tier."""
    tier_rate: float
    """Bytes a second of the shared tier for all replicas together."""
    start_seconds: float
    """From the death of a replica to its place being taken by one that holds nothing."""

    @property
    def cache_bytes(self) -> int:
        return self.device_bytes + self.host_bytes


def cpu_profile() -> Profile:
    """Two cores, hidden width 1024, output and references 512x512: benchmarks/results/scaling.json and store.json.

    The prefill is the difference between a request with new references and one with cached ones. A further image costs
    what four images cost over one, by three. The tier's link is the measured rate of a hit on disk, checksums included.
    """
    scaling = json.loads((RESULTS / "scaling.json").read_text())
    store = json.loads((RESULTS / "store.json").read_text())
    rows = {row["case"]["num_references"]: row for row in scaling["references"]}
    warm = tuple(rows[n]["seconds"]["warm"] for n in (1, 2, 3, 4))
    images = {row["case"]["batch"]: row["seconds"]["warm"] for row in scaling["images"]}
    return Profile(
        name="cpu",
        warm_seconds=warm,
        prefill_seconds=tuple(rows[n]["seconds"]["cold"] - rows[n]["seconds"]["warm"] for n in (1, 2, 3, 4)),
        reference_bytes=rows[1]["kept_bytes"],
        extra_image=(images[4] - images[1]) / 3 / images[1],
        device_bytes=2 * GiB,
        host_bytes=0,
        host_rate=20e9,
        tier_link=store["bytes"] / store["disk_hit_seconds"],
        tier_rate=10e9,
        start_seconds=30.0,
    )


PUBLISHED_SPEEDUP = {512: (1.78, 2.16, 2.43, 2.66), 1024: (1.40, 1.77, 1.99, 2.22)}
"""Of K/V caching over standard editing with 1 to 4 references of 1024x1024, by side of the output (the model's card)."""


def gpu_profile(side: int) -> Profile:
    """klein-9B on a GPU of the A100 class, references 1024x1024, output `side`: derived, not measured.

    Base: 2.0 s for 4 steps at 1024x1024 without references (published: 1.8 to 2.2 s on an A100), so 0.5 s a step. With n
    references a cached step does more attention: by operations (24 P tokens + 4 C tokens x keys a layer) it takes
    0.5 s (1 + n 0.104). A published speedup x of K/V caching is 4 s / (s + 3 c), where c is a step with cached K/V
    and s one that computes references too; so c / s = (4 / x - 1) / 3, and the prefill is s - c. Prefills do not depend
    on the output; at 512x512 the table gives c back from them.
    """

    def kept_share(speedup: float) -> float:
        return (4 / speedup - 1) / 3

    width, layers, weights, own, ref = 4096, 32, 9.08e9, 4096 + 512, 4096
    matrices, pair = 2 * weights * own, 4 * width * own * layers
    steps = [0.5 * (matrices + pair * (own + n * ref)) / (matrices + pair * own) for n in (1, 2, 3, 4)]
    prefill = [c * (1 / kept_share(x) - 1) for c, x in zip(steps, PUBLISHED_SPEEDUP[1024], strict=True)]
    kept = [p / (1 / kept_share(x) - 1) for p, x in zip(prefill, PUBLISHED_SPEEDUP[side], strict=True)]
    return Profile(
        name=f"gpu-{side}",
        warm_seconds=tuple(4 * c for c in kept),
        prefill_seconds=tuple(prefill),
        reference_bytes=2 * GiB,
        extra_image=cpu_profile().extra_image,
        device_bytes=24 * GiB,
        host_bytes=128 * GiB,
        host_rate=20e9,
        tier_link=10e9,
        tier_rate=200e9,
        start_seconds=120.0,
    )


PROFILES: dict[str, Callable[[], Profile]] = {
    "cpu": cpu_profile,
    "gpu-512": lambda: gpu_profile(512),
    "gpu-1024": lambda: gpu_profile(1024),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """One simulation: everything that decides its numbers, with the seed."""

    profile: Profile
    policy: str = "ours"
    routing: RoutingPolicy = field(default_factory=RoutingPolicy)
    num_replicas: int = 128
    num_sets: int = 10_000
    zipf: float = 1.1
    load: float = 0.7
    """Work of all requests, were all references kept and nothing batched, over what the replicas can do."""
    num_requests: int = 80_000
    warmup: float = 0.5
    """Share of the requests that fills caches before counting begins."""
    arrivals: str = "poisson"
    """"poisson"; "bursts": sittings of 8 requests over one set, 4 s apart, at a rate that doubles for 10 s of 60; "flash":
    from the middle on, for `flash_seconds`, `flash_share` of the requests name one set that nobody named before."""
    flash_share: float = 0.3
    flash_seconds: float = 60.0
    fail_every: float = 0.0
    """Mean seconds between failures of one replica; 0: none."""
    fail_at_once: float = 0.0
    """Share of the replicas that fail together in the middle."""
    num_routers: int = 1
    """Routers that share nothing, each with a random part of the requests."""
    stale_seconds: float = 0.0
    """Age that the routers' view of queues may have; what a router sent itself it knows."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Sets:
    """Reference sets by popularity: costs in seconds and bytes."""

    probability: np.ndarray
    warm: list[float]
    prefill: list[float]
    nbytes: list[int]


SHARE_OF_COUNT = (0.45, 0.25, 0.15, 0.15)
"""Sets of 1, 2, 3 and 4 references; three of ten sets are of pictures with half the pixels. An assumption."""


def make_sets(profile: Profile, num_sets: int, zipf: float, rng: np.random.Generator) -> Sets:
    counts = rng.choice(4, size=num_sets, p=SHARE_OF_COUNT)
    size = np.where(rng.random(num_sets) < 0.3, 0.5, 1.0)
    weight = np.arange(1, num_sets + 1) ** -zipf
    return Sets(
        probability=weight / weight.sum(),
        warm=np.array(profile.warm_seconds)[counts].tolist(),
        prefill=(np.array(profile.prefill_seconds)[counts] * size).tolist(),
        nbytes=((counts + 1) * profile.reference_bytes * size).astype(int).tolist(),
    )


def make_arrivals(scenario: Scenario, sets: Sets, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Return times, sets, and the start of the flash crowd or mass failure."""
    n = scenario.num_requests
    rate = scenario.load * scenario.num_replicas / float(np.dot(sets.probability, sets.warm))
    names = rng.choice(len(sets.warm), size=n, p=sets.probability)
    if scenario.arrivals == "bursts":
        sitting = 8
        starts = np.cumsum(rng.exponential(sitting / rate, size=n // sitting + 1))
        gaps = rng.exponential(4.0, size=(len(starts), sitting))
        gaps[:, 0] = 0
        times = (starts[:, None] + np.cumsum(gaps, axis=1)).ravel()[:n]
        names = np.repeat(names[: len(starts)], sitting)[:n]
        # a minute has 10 s at twice the rate of its other 50 s: time runs faster then, with the mean kept
        # of each minute, 10 s run at twice the rate of the other 50 s, with the mean kept: 70 parts of work in 60 s
        minute, left = np.divmod(times, 60.0)
        quiet = 60 * 50 / 70
        times = minute * 60 + np.where(left < quiet, left * 50 / quiet, 50 + (left - quiet) * 10 / (60 - quiet))
        order = np.argsort(times, kind="stable")
        times, names = times[order], names[order]
    else:
        times = np.cumsum(rng.exponential(1 / rate, size=n))
    middle = float(times[int(n * (1 + scenario.warmup) / 2)])
    if scenario.arrivals == "flash":
        during = (times >= middle) & (times < middle + scenario.flash_seconds)
        names[during & (rng.random(n) < scenario.flash_share)] = len(sets.warm) - 1
    return times, names, middle


class Replica:
    """One device: a queue, a batch, and K/V in device and host memory (least recently used first out of each)."""

    __slots__ = (
        "alive",
        "batch",
        "device",
        "device_bytes",
        "ends",
        "host",
        "host_bytes",
        "length",
        "name",
        "queue",
        "run",
        "work",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.run = 0  # which run of the device an event belongs to
        self.reset()

    def reset(self) -> None:
        self.queue: deque[tuple[int, float]] = deque()
        self.batch: list[int] = []
        self.length = 0
        self.ends = 0.0
        self.work = 0.0
        self.device: OrderedDict[int, int] = OrderedDict()
        self.host: OrderedDict[int, int] = OrderedDict()
        self.device_bytes = self.host_bytes = 0
        self.run += 1

    def wait(self, now: float) -> float:
        left = self.ends - now
        return self.work + left if left > 0 else self.work

    def find(self, key: int) -> str:
        """ "device", "host" or "no"; what is found becomes the most recent (and is put on the device by `keep`)."""
        if key in self.device:
            self.device.move_to_end(key)
            return "device"
        if key in self.host:
            self.host_bytes -= self.host.pop(key)
            return "host"
        return "no"

    def keep(self, key: int, nbytes: int, profile: Profile) -> None:
        self.device[key] = nbytes
        self.device_bytes += nbytes
        while self.device_bytes > profile.device_bytes:
            old, size = self.device.popitem(last=False)
            self.device_bytes -= size
            if size <= profile.host_bytes:
                self.host[old] = size
                self.host_bytes += size
        while self.host_bytes > profile.host_bytes:
            self.host_bytes -= self.host.popitem(last=False)[1]


@functools.cache
def homes_of(num_replicas: int) -> Homes:
    """Return the order of homes: equal in all simulations with this many replicas and no failure."""
    return Homes(f"replica-{i}" for i in range(num_replicas))


class Simulation:
    """Run one scenario; `report()` has the numbers."""

    def __init__(self, scenario: Scenario) -> None:
        self.s = s = scenario
        self.p = p = scenario.profile
        rng = np.random.default_rng([s.seed, 1])
        self.sets = make_sets(p, s.num_sets, s.zipf, rng)
        times, names, self.middle = make_arrivals(s, self.sets, np.random.default_rng([s.seed, 2]))
        self.times: list[float] = times.tolist()
        self.names: list[int] = names.tolist()
        self.keys = [f"set-{i}" for i in range(s.num_sets)]
        self.rng = np.random.default_rng([s.seed, 3])
        self.draws: list[float] = []
        self.replicas = {f"replica-{i}": Replica(f"replica-{i}") for i in range(s.num_replicas)}
        self.alive = list(self.replicas.values())
        fails = s.fail_every > 0 or s.fail_at_once > 0
        self.homes = Homes(self.replicas) if fails else homes_of(s.num_replicas)
        self.tier = s.policy.endswith("tier")
        self.shared = s.policy == "one cache"
        if self.shared:
            self.p = p = replace(
                p, device_bytes=p.device_bytes * s.num_replicas, host_bytes=p.host_bytes * s.num_replicas
            )
            self.one = Replica("one cache")
        self.routers = [
            AffinityRouter(capacity_bytes=scenario.profile.cache_bytes, policy=s.routing, homes=self.homes)
            for _ in range(s.num_routers)
        ]
        self.views: list[dict[str, float]] = []
        self.seen = -math.inf
        self.mean_wait, self.mean_turn = 0.0, 0
        self.turn = 0
        n = s.num_requests
        self.done = [math.nan] * n
        self.served = [0] * n
        self.hit = [False] * n
        self.tier_keys: dict[int, int] = {}
        self.tier_free = 0.0
        self.prefill_times: list[float] = []
        self.prefill_seconds = 0.0
        self.tier_busy = 0.0
        self.counts = dict.fromkeys(
            ("prefills", "tier_reads", "host_hits", "batches", "retried", "failures", "spread"), 0
        )
        self.bytes = dict.fromkeys(("tier_read", "tier_written", "host_to_device"), 0)
        self.first = int(n * s.warmup)
        self.counting = self.first == 0
        self.busy = 0.0
        self.events: list[tuple[float, int, str, Any]] = []
        self.order = 0

    # choosing

    def draw(self) -> float:
        if not self.draws:
            self.draws = self.rng.random(65536).tolist()
        return self.draws.pop()

    def any(self) -> Replica:
        return self.alive[int(self.draw() * len(self.alive))]

    def fetch_seconds(self, name: int, now: float) -> tuple[float, bool]:
        """Seconds until a replica without the references has them, and whether they come from the tier."""
        prefill = self.sets.prefill[name]
        if self.tier and name in self.tier_keys:
            nbytes = self.sets.nbytes[name]
            read = max(nbytes / self.p.tier_link, self.tier_free - now + nbytes / self.p.tier_rate)
            if read < prefill:
                return read, True
        return prefill, False

    def route(self, name: int, now: float) -> tuple[Replica, float]:
        """The replica, and the seconds of work that the request is expected to bring it."""
        policy, warm = self.s.policy.removesuffix(" + tier"), self.sets.warm[name]
        if policy == "random":
            return self.any(), warm
        if policy == "round robin":
            self.turn += 1
            return self.alive[self.turn % len(self.alive)], warm
        if policy == "power of two":
            a, b = self.any(), self.any()
            return (a if a.length <= b.length else b), warm
        if policy == "hash":
            return self.replicas[self.homes.first(self.keys[name], 1)[0]], warm
        if policy == "one cache":
            start = self.any()
            return (start if not start.batch else min(self.alive, key=lambda r: r.wait(now))), warm
        which = int(self.draw() * self.s.num_routers) if self.s.num_routers > 1 else 0
        router, replicas = self.routers[which], self.replicas
        if self.s.stale_seconds:
            if now - self.seen > self.s.stale_seconds:
                self.seen = now
                self.views = [{r.name: r.wait(now) for r in self.alive} for _ in self.routers]
            view, age = self.views[which], now - self.seen

            def wait(name: str) -> float:
                return max(0.0, view.get(name, 0.0) - age)
        else:

            def wait(name: str) -> float:
                return replicas[name].wait(now)

        if self.mean_turn == 0:  # the mean over all queues moves slowly: it is taken once for as many requests
            self.mean_turn = len(self.alive)
            self.mean_wait = sum(r.wait(now) for r in self.alive) / len(self.alive)
        self.mean_turn -= 1
        fetch, key = self.fetch_seconds(name, now)[0], self.keys[name]
        choice = router.route(
            key,
            nbytes=self.sets.nbytes[name],
            wait=wait,
            mean_wait=self.mean_wait,
            service_seconds=warm,
            fetch_seconds=fetch,
        )
        self.counts["spread"] += choice.reason == "spread" and self.counting
        work = warm if choice.reason == "holder" else warm + fetch
        if self.s.stale_seconds:
            view[choice.replica] = view.get(choice.replica, 0.0) + work
        return replicas[choice.replica], work

    # events

    def push(self, when: float, kind: str, what: Any) -> None:
        self.order += 1
        heapq.heappush(self.events, (when, self.order, kind, what))

    def arrive(self, request: int, now: float) -> None:
        if not self.alive:
            self.push(now + 1.0, "again", request)
            return
        replica, work = self.route(self.names[request], now)
        replica.queue.append((request, work))
        replica.length += 1
        replica.work += work
        if not replica.batch:
            self.start(replica, now)

    def start(self, replica: Replica, now: float) -> None:
        """Run the oldest request and those that can share its batch, as `limner.engine` does."""
        name = self.names[replica.queue[0][0]]
        batch: list[int] = []
        others: list[tuple[int, float]] = []
        while replica.queue and len(batch) < MAX_BATCH:
            request, work = replica.queue.popleft()
            if self.names[request] == name:
                batch.append(request)
                replica.work -= work
            else:
                others.append((request, work))
        replica.queue.extendleft(reversed(others))
        if not replica.queue:
            replica.work = 0.0  # rounding
        replica.batch = batch
        seconds = self.sets.warm[name] * (1 + self.p.extra_image * (len(batch) - 1))
        nbytes = self.sets.nbytes[name]
        cache = self.one if self.shared else replica
        found = cache.find(name)
        if self.counting:
            self.counts["batches"] += 1
        if found == "no":
            fetch, from_tier = self.fetch_seconds(name, now)
            seconds += fetch
            if from_tier:
                self.use_tier(nbytes, now)
                self.count_miss("tier_reads", "tier_read", nbytes)
            else:
                self.prefill_times.append(now)
                if self.counting:
                    self.counts["prefills"] += 1
                    self.prefill_seconds += fetch
                if self.tier and nbytes / self.p.tier_link < fetch and name not in self.tier_keys:
                    self.tier_keys[name] = nbytes
                    self.use_tier(nbytes, now)
                    self.count_miss(None, "tier_written", nbytes)
        elif found == "host" and not self.shared:
            seconds += nbytes / self.p.host_rate
            self.count_miss("host_hits", "host_to_device", nbytes)
        if found != "device":
            cache.keep(name, nbytes, self.p)
        for i, request in enumerate(batch):
            self.hit[request] = found != "no" or i > 0
        if self.counting:
            self.busy += seconds
        replica.ends = now + seconds
        self.push(replica.ends, "end", (replica, replica.run))

    def count_miss(self, what: str | None, moved: str, nbytes: int) -> None:
        if self.counting:
            if what:
                self.counts[what] += 1
            self.bytes[moved] += nbytes

    def use_tier(self, nbytes: int, now: float) -> None:
        """The tier's rate is shared first come, first served."""
        seconds = nbytes / self.p.tier_rate
        self.tier_free = max(self.tier_free, now) + seconds
        if self.counting:
            self.tier_busy += seconds

    def end(self, replica: Replica, now: float) -> None:
        for request in replica.batch:
            self.done[request] = now
            self.served[request] += 1
        replica.length -= len(replica.batch)
        replica.batch = []
        if replica.queue:
            self.start(replica, now)

    def fail(self, replica: Replica, now: float) -> None:
        """Fail the replica: its requests return a second later, and a replica with empty memory takes its place."""
        if not replica.alive:
            return
        lost = [*replica.batch, *(request for request, _ in replica.queue)]
        replica.alive = False
        replica.reset()
        self.alive.remove(replica)
        for router in self.routers:
            router.leave(replica.name)
        for request in lost:
            self.push(now + 1.0, "again", request)
        if self.counting:
            self.counts["failures"] += 1
            self.counts["retried"] += len(lost)
        self.push(now + self.p.start_seconds, "join", replica)

    def join(self, replica: Replica) -> None:
        replica.alive = True
        self.alive.append(replica)
        for router in self.routers:
            router.join(replica.name)

    def run(self) -> Simulation:
        s = self.s
        if s.fail_at_once:
            for replica in list(self.replicas.values())[: round(s.fail_at_once * s.num_replicas)]:
                self.push(self.middle, "fail", replica)
        if s.fail_every:
            rng = np.random.default_rng([s.seed, 4])
            now = 0.0
            while (now := now + rng.exponential(s.fail_every / s.num_replicas)) < self.times[-1]:
                self.push(now, "fail", self.replicas[f"replica-{rng.integers(s.num_replicas)}"])
        events, times, following, n = self.events, self.times, 0, s.num_requests
        self.began = self.times[self.first]
        while following < n or events:
            if following < n and (not events or times[following] <= events[0][0]):
                now = times[following]
                if following == self.first:
                    self.counting = True
                self.arrive(following, now)
                following += 1
                continue
            now, _, kind, what = heapq.heappop(events)
            if kind == "end":
                replica, run = what
                if replica.run == run:
                    self.end(replica, now)
            elif kind == "again":
                self.arrive(what, now)
            elif kind == "fail":
                self.fail(what, now)
            else:
                self.join(what)
        self.finished = now
        return self

    def report(self) -> dict[str, Any]:
        """Counts and percentiles of the requests after the warm-up; every request was served once, or this raises."""
        s = self.s
        if self.served != [1] * s.num_requests:
            raise AssertionError("a request was lost or served twice")
        times, latency = np.array(self.times)[self.first :], (np.array(self.done) - np.array(self.times))[self.first :]
        span = self.times[-1] - self.began
        p50, p99 = np.percentile(latency, [50, 99])
        counted, sizes = len(latency), np.array(self.sets.nbytes)
        found = {
            "profile": s.profile.name,
            "policy": s.policy,
            "replicas": s.num_replicas,
            "load": s.load,
            "requests": counted,
            "requests_per_second": round(counted / span, 2),
            "p50": round(float(p50), 2),
            "p99": round(float(p99), 2),
            "hit_rate": round(float(np.mean(self.hit[self.first :])), 4),
            **self.counts,
            "prefills_avoided": counted - self.counts["prefills"],
            "prefill_seconds": round(self.prefill_seconds, 1),
            "gigabytes": {name: round(value / 1e9, 1) for name, value in self.bytes.items()},
            "busy": round(self.busy / (span * s.num_replicas), 3),
            "tier_busy": round(self.tier_busy / span, 3),
            "kept_share": round(float(s.profile.cache_bytes) * s.num_replicas / float(sizes.sum()), 3),
        }
        if s.fail_at_once or s.arrivals == "flash":
            found["timeline"] = self.timeline(times, latency)
        return found

    def timeline(self, times: np.ndarray, latency: np.ndarray) -> dict[str, list[float | None]]:
        """In windows of 10 s of arrival from a minute before the middle on: p99, and prefills a second."""
        edges = self.middle + np.arange(-60, 301, 10.0)
        starts = np.array(self.prefill_times)
        p99, prefills = [], []
        for low, high in itertools.pairwise(edges):
            part = latency[(times >= low) & (times < high)]
            p99.append(round(float(np.percentile(part, 99)), 2) if len(part) else None)
            prefills.append(round(float(np.sum((starts >= low) & (starts < high))) / (high - low), 2))
        return {"from_second": (edges[:-1] - self.middle).tolist(), "p99": p99, "prefills_per_second": prefills}


def simulate(**settings: Any) -> dict[str, Any]:
    return Simulation(Scenario(**settings)).run().report()


# questions


Row = dict[str, Any]


def against(rows: list[Row]) -> list[Row]:
    """Add to each row its prefills over those of the row of "one cache"."""
    one = next(row["prefills"] for row in rows if row["policy"] == "one cache")
    for row in rows:
        row["times_one_cache"] = round(row["prefills"] / one, 3)
    return rows


def questions(scale: float, replicas: int) -> Iterable[tuple[str, str, Callable[[], list[Row]]]]:
    """Name, column that varies, and what gives the rows; `scale` shortens the simulations."""
    three = ("power of two", "ours", "one cache")
    long, short = int(80_000 * scale), int(40_000 * scale)
    gpu, small = gpu_profile(1024), gpu_profile(512)
    base: dict[str, Any] = {"profile": gpu, "num_replicas": replicas, "num_requests": short}

    def vary(name: str, values: Iterable[tuple[Any, dict[str, Any]]], policies: Iterable[str] = three) -> list[Row]:
        rows = []
        for value, settings in values:
            part = [{name: value, **simulate(**{**base, "policy": policy, **settings})} for policy in policies]
            rows += against(part) if "one cache" in policies else part
        return rows

    yield (
        "target",
        "profile",
        lambda: vary(
            "profile", [(name, {"profile": make(), "num_requests": long}) for name, make in PROFILES.items()], POLICIES
        ),
    )
    yield ("seeds", "seed", lambda: vary("seed", [(x, {"seed": x, "num_requests": long}) for x in (1, 2, 3)]))
    yield (
        "horizon",
        "requests in all",
        lambda: vary(
            "requests in all", [(n, {"num_requests": n}) for n in (long // 4, long, 4 * long)], ("ours", "one cache")
        ),
    )
    yield (
        "load",
        "load",
        lambda: vary("load", [(x, {"load": x, "num_requests": long}) for x in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)], three),
    )
    sizes = (8, 32, 128, 512) if replicas == 128 else (8, replicas)
    yield (
        "replicas",
        "replicas",
        lambda: vary("replicas", [(n, {"num_replicas": n, "num_requests": max(short, 300 * n)}) for n in sizes]),
    )
    shapes: list[tuple[str, dict[str, Any]]] = [(f"Zipf {z}", {"zipf": z}) for z in (0.6, 0.9, 1.1, 1.4)]
    shapes += [("sittings, rate in waves", {"arrivals": "bursts"}), ("flash crowd", {"arrivals": "flash"})]
    yield "popularity", "popularity", lambda: vary("popularity", shapes)
    yield (
        "memory",
        "host GiB",
        lambda: vary("host GiB", [(n, {"profile": replace(gpu, host_bytes=n * GiB)}) for n in (0, 64, 128, 256, 512)]),
    )
    links = [
        (f"{p.name}, {link:g} GB/s", {"profile": replace(p, tier_link=link * 1e9)})
        for p, links in ((cpu_profile(), (0.05, 0.1, 1.5)), (gpu, (3, 6, 12.5, 25)))
        for link in links
    ]
    totals = [
        (
            f"{gpu.name}, 12.5 GB/s, all {total:g} GB/s",
            {"profile": replace(gpu, tier_link=12.5e9, tier_rate=total * 1e9)},
        )
        for total in (10, 25, 50)
    ]
    yield "tier", "link", lambda: vary("link", links + totals, ("power of two + tier", "ours + tier"))
    failing: list[tuple[str, dict[str, Any]]] = [
        ("none", {}),
        ("each every 2 h", {"fail_every": 7200.0}),
        ("each every 20 min", {"fail_every": 1200.0}),
        ("a quarter at once, load 0.5", {"fail_at_once": 0.25, "load": 0.5}),
        ("a quarter at once", {"fail_at_once": 0.25}),
        ("half at once, load 0.5", {"fail_at_once": 0.5, "load": 0.5}),
    ]
    yield "failures", "event", lambda: vary("event", failing, ("power of two", "ours", "ours + tier"))
    views: list[tuple[str, dict[str, Any]]] = [("1 router", {})]
    views += [(f"{n} routers", {"num_routers": n}) for n in (4, 16)]
    views += [
        (f"{n} routers, homes={k}", {"num_routers": n, "routing": RoutingPolicy(homes=k)})
        for n in (4, 16)
        for k in (1, 2)
    ]
    views += [(f"4 routers, queues {x:g} s old", {"num_routers": 4, "stale_seconds": x}) for x in (1.0, 5.0)]
    views += [
        (f"{name}={value:g}", {"routing": RoutingPolicy(**{name: value})})
        for name, value in (
            ("repay", 0),
            ("repay", 64),
            ("repay", 256),
            ("repay", 1024),
            ("homes", 1),
            ("homes", 2),
            ("homes", 16),
            ("slack", 0),
            ("slack", 8),
            ("bound", 1),
            ("bound", 2),
            ("bound", math.inf),
        )
    ]

    def ablation() -> list[Row]:
        one = vary("variant", [("one cache", {})], ("one cache",))
        return against(one + vary("variant", views, ("ours",)))

    yield "variants", "variant", ablation
    yield (
        "other profile, load",
        "load",
        lambda: vary(
            "load",
            [(x, {"profile": p, "load": x, "num_requests": short}) for p in (cpu_profile(), small) for x in (0.5, 0.9)],
        ),
    )


COLUMNS = {
    "profile": "profile",
    "policy": "routing",
    "p50": "p50, s",
    "p99": "p99, s",
    "hit_rate": "hits",
    "prefills": "prefills",
    "times_one_cache": "of one cache",
    "tier_reads": "tier reads",
    "busy": "busy",
    "prefills_avoided": "avoided",
}


def as_table(rows: list[Row], first: str) -> str:
    columns = [first] + [c for c in COLUMNS if c != first and any(row.get(c) for row in rows)]
    lines = [
        "| " + " | ".join(COLUMNS.get(c, c) for c in columns) + " | moved, TB |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in rows:
        moved = sum(row["gigabytes"].values()) / 1e3
        cells = [f"{row[c]:.1%}" if c == "hit_rate" else f"{row.get(c, '')}" for c in columns]
        lines.append("| " + " | ".join(cells) + f" | {moved:.1f} |")
    return "\n".join(lines)


def plot(tables: dict[str, list[Row]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    colors = {"random": "tab:gray", "power of two": "tab:orange", "ours": "tab:blue", "one cache": "tab:green"}

    def lines(axes: Any, rows: list[Row], x: str, y: str) -> None:
        for policy, color in colors.items():
            mine = [row for row in rows if row["policy"] == policy]
            if mine:
                axes.plot([r[x] for r in mine], [r[y] for r in mine], marker="o", color=color, label=policy)

    lines(a, tables["load"], "load", "p99")
    a.set(xlabel="load (work with all references kept / capacity)", ylabel="p99, s", ylim=(0, 30))
    a.legend()
    lines(b, tables["replicas"], "replicas", "hit_rate")
    b.set(xlabel="replicas", ylabel="share of hits", xscale="log", ylim=(0, 1))
    lines(c, tables["memory"], "host GiB", "hit_rate")
    c.set(xlabel="host memory for K/V of each replica, GiB", ylabel="share of hits", ylim=(0, 1))
    for row in tables["popularity"]:
        if row["popularity"] == "flash crowd":
            d.plot(
                row["timeline"]["from_second"],
                row["timeline"]["p99"],
                color=colors[row["policy"]],
                label=f"{row['policy']}, flash crowd",
            )
    for row in tables["failures"]:
        if row["event"] == "a quarter at once" and row["policy"] in colors:
            d.plot(
                row["timeline"]["from_second"],
                row["timeline"]["p99"],
                color=colors[row["policy"]],
                linestyle="--",
                label=f"{row['policy']}, a quarter fails",
            )
    d.set(xlabel="seconds from the event", ylabel="p99 of 10 s, s", ylim=(0, None))
    d.legend()
    figure.suptitle("Simulated routing, 10,000 reference sets, Zipf 1.1, gpu-1024 profile, load 0.7 unless it varies")
    figure.savefig(path, dpi=80)


def device() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="32 replicas, an eighth of the requests, the target alone")
    parser.add_argument("--only", nargs="+", help="names of tables")
    parser.add_argument(
        "-o", "--output", type=Path, help="without suffix: .json, .md and, of a full run, .png are made"
    )
    args = parser.parse_args()
    start = time.perf_counter()
    tables: dict[str, list[Row]] = {}
    text = []
    for name, column, make in questions(1 / 8 if args.quick else 1.0, 32 if args.quick else 128):
        if (args.quick and name != "target" and not args.only) or (args.only and name not in args.only):
            continue
        tables[name] = make()
        text.append(f"### {name}\n\n{as_table(tables[name], column)}\n")
        print(text[-1], flush=True)
    report = {
        "benchmark": "routing",
        "device": device(),
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "command": shlex.join(sys.argv),
        "wall_seconds": round(time.perf_counter() - start, 1),
        "profiles": [asdict(make()) for make in PROFILES.values()],
        "policy": asdict(RoutingPolicy()),
        "tables": tables,
    }
    if args.output:
        args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        args.output.with_suffix(".md").write_text("\n".join(text))
        if not args.quick and not args.only:
            plot(tables, args.output.with_suffix(".png"))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
