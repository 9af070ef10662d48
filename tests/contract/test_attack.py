"""The attacks of `make attack`, for a moment each: no job of a bystander is lost or fails. The times are the benchmark's."""

from __future__ import annotations

import importlib
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.support.serving import ANNA, BOB, KEYS, Served

from limner import Pipeline
from limner.outbound.policy import OutboundPolicy
from limner.outbound.urls import Origin
from limner.server.access.limits import LimitPolicy

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL: dict[str, dict[str, int]] = {
    "large_bodies": {"side": 600},
    "large_nonsense": {"size": 2_000_000},
    "large_forms": {"size": 2_000_000},
    "crumbs": {"size": 20_000},
    "slow_bodies": {"number": 80},
    "slow_large_bodies": {"number": 4, "size": 5_000_000},
    "scans": {"side": 512},
    "scans_in_limits": {"side": 512},
    "large_pictures": {"side": 1000},
    "idle_connections": {"number": 100},
    "slow_heads": {"number": 40},
    "idle_streams": {"number": 50},
    "slow_streams": {"number": 10},
    "unread_answers": {"number": 10},
    "references": {"side": 64},
    "uploads": {"side": 64},
}
"""Sizes at which an attack takes no time to prepare."""
NAMES = (
    *("names_twice", "unknown_fields", "large_bodies", "large_nonsense", "large_forms", "crumbs", "slow_bodies"),
    *("slow_large_bodies", "scans", "scans_in_limits", "bombs", "large_pictures", "idle_connections", "slow_heads"),
    *("idle_streams", "slow_streams", "unread_answers", "jobs", "references", "uploads", "cancelled_jobs"),
    *("hanging_webhooks", "heavy_jobs", "hostile_requests", "handshakes"),
)
ELSEWHERE = ("hostile_requests", "handshakes")
"""In test_hostile.py and test_connections.py."""


@pytest.fixture(scope="module")
def attacks() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("attacks.catalog")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def benchmark(attacks: ModuleType) -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("attack")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def hang(attacks: ModuleType) -> Iterator[str]:
    with attacks.hanging() as origin:
        yield origin


@pytest.fixture(scope="module")
def served(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, hang: str) -> Iterator[Served]:
    pipe = Pipeline.from_pretrained(tiny_folder)
    policy = OutboundPolicy(allowed=frozenset({Origin.parse(hang)}))
    folder = tmp_path_factory.mktemp("attack")
    # the limits of a service as it is, but for its rate
    limits = LimitPolicy(requests_per_minute=1e6, burst=10**6)
    with Served(pipe, folder / "data", keys=KEYS, limits=limits, outbound_policy=policy, drain=1.0) as served:
        yield served


def test_all_are_tried(attacks: ModuleType) -> None:
    assert set(NAMES) == set(attacks.ATTACKS)


def test_a_file_of_several_runs_says_which_is_of_which_and_what_is_not_run(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was aborted looked whole, and what `--add` kept looked as old as the last run."""

    def seen(attack: str, p50: float) -> dict[str, Any]:
        times = {"p50": p50, "worst": p50, "ping_p50": 0.001, "ping_worst": 0.002, "mib_before": 1.0, "mib_after": 1.0}
        return {"attack": attack, "jobs": 3, "problems": [], **times}

    monkeypatch.setattr(sys, "argv", ["attack.py", "--attacks", "crumbs", "jobs"])
    monkeypatch.setattr(benchmark, "machine", lambda: {"device": "a", "date": "2026-01-01"})
    idle = seen("idle", 0.2)
    first = benchmark.summary([benchmark.judge(one, idle) for one in (idle, seen("crumbs", 0.3))], 8.0)
    assert set(first["not_run"]) == set(NAMES) - {"crumbs"}  # aborted before "jobs"
    monkeypatch.setattr(sys, "argv", ["attack.py", "--attacks", "jobs", "--add"])
    monkeypatch.setattr(benchmark, "machine", lambda: {"device": "a", "date": "2026-01-02"})
    idle, late = seen("idle", 0.5), seen("jobs", 2.4)
    old = benchmark.kept(first, ["jobs"])
    added = benchmark.summary([*old, *(benchmark.judge(one, idle) for one in (idle, late))], 8.0)
    told = [tuple(one[name] for name in ("attack", "date", "idle_p50", "missed")) for one in added["attacks"]]
    assert told == [("crumbs", "2026-01-01", 0.2, []), ("idle", "2026-01-02", 0.5, []), ("jobs", "2026-01-02", 0.5, [])]
    assert added["attacks"][0]["command"] == "attack.py --attacks crumbs jobs"
    assert added["date"] == "2026-01-02"
    assert set(added["not_run"]) == set(NAMES) - {"crumbs", "jobs"}
    bare = {**first, "attacks": [{"attack": name, "p50": 0.2, "missed": []} for name in ("idle", "crumbs", "jobs")]}
    assert benchmark.kept(bare, ["jobs"]) == [
        {
            "attack": "crumbs",
            "p50": 0.2,
            "missed": [],
            "command": first["command"],
            "date": "2026-01-01",
            "idle_p50": 0.2,
        }
    ]


class Works:
    """A server that has jobs for so many looks at its metrics, which take a second each; it has a MiB then, else none."""

    def __init__(self, looks: float, clock: list[float]) -> None:
        self.looks, self.clock = looks, clock

    def metrics(self) -> dict[str, float]:
        self.clock[0] += 1
        self.looks -= 1
        return {"limner_jobs_live": float(self.looks > 0), "limner_references_bytes": 0.0, "limner_pictures_bytes": 0.0}


@pytest.mark.parametrize(
    ("looks", "settled", "missed"), [(200, True, []), (1e9, False, ["unsettled"])], ids=["minutes", "forever"]
)
def test_memory_is_that_of_a_server_at_rest(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, looks: float, settled: bool, missed: list[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(benchmark.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(benchmark.time, "sleep", lambda seconds: None)
    attacked = object.__new__(benchmark.Attacked)
    attacked.server = Works(looks, clock)
    attacked._memory = lambda: 1.0
    taken = attacked._settle()
    assert (taken is not None) is settled
    times = {"p50": 0.2, "worst": 0.2, "ping_p50": 0.001, "ping_worst": 0.002, "mib_before": 1.0}
    seen: dict[str, Any] = {"attack": "heavy_jobs", "jobs": 3, "problems": [], "webhook_worst": None, **times}
    after = attacked._memory_after(1.0) if settled else None
    report = benchmark.judge({**seen, "mib_after": after}, {"p50": 0.2, "ping_p50": 0.001})
    assert report["missed"] == missed
    assert "heavy_jobs" in benchmark.line(report)
    begun_late = benchmark.judge({**seen, "mib_before": None, "mib_after": 1.0}, {"p50": 0.2, "ping_p50": 0.001})
    assert begun_late["missed"] == ["unsettled"]


@pytest.mark.filterwarnings("ignore")  # a decoder warns of what it reads; a server logs that
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ELSEWHERE])
def test_a_bystander_loses_nothing(served: Served, attacks: ModuleType, hang: str, name: str) -> None:
    witness = importlib.import_module("attacks.witness")
    stop = threading.Event()
    target = attacks.Target(url=served.url, key=ANNA, stop=stop, hang=hang, size=64)
    problems: list[Any] = []

    def attack() -> None:
        try:
            attacks.ATTACKS[name](target, **SMALL.get(name, {}))
        except Exception as error:
            problems.append(error)

    attacker = threading.Thread(target=attack)
    attacker.start()
    try:
        end = time.monotonic() + 60
        while not target.statuses and attacker.is_alive():  # it has begun
            assert time.monotonic() < end
            time.sleep(0.005)
        bystander = witness.Bystander(served.url, BOB, size=64)
        bystander.run(0.25, every=0.1, least=2)
    finally:
        stop.set()
        attacker.join(60)
    assert problems == []
    assert bystander.seen.problems == []
    assert len(bystander.seen.seconds) >= 2
    assert served.http.get("/readyz", headers={"x-key": BOB}).status_code in (200, 503)
    jobs = served.service.jobs
    mine = jobs.of_owner(KEYS.identify({"x-key": BOB}).id, limit=200)
    assert {job.status for job in mine} == {"ready"}
