"""The simulation of routing: it loses nothing, repeats itself, orders the policies, and holds the targets when small."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "routing.py"


@pytest.fixture(scope="module")
def routing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_routing", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def settings(routing: ModuleType, **changes: Any) -> dict[str, Any]:
    return {
        "profile": routing.gpu_profile(1024),
        "num_replicas": 32,
        "num_sets": 2500,
        "num_requests": 16_000,
        **changes,
    }


def test_targets(routing: ModuleType) -> None:
    """docs/scale.md at its own size, 128 replicas, 10,000 sets, Zipf 1.1, load 0.7, with half of its requests."""
    full: dict[str, Any] = {"profile": routing.gpu_profile(1024), "num_requests": 40_000}
    ours, two, one = (routing.simulate(**full, policy=name) for name in ("ours", "power of two", "one cache"))
    assert ours["requests"] == two["requests"] == one["requests"] == 20_000
    assert ours["prefills"] <= 1.2 * one["prefills"]
    assert ours["p99"] <= two["p99"]


def test_order_of_policies(routing: ModuleType) -> None:
    found = {name: routing.simulate(**settings(routing, policy=name)) for name in routing.POLICIES}
    prefills = {name: row["prefills"] for name, row in found.items()}
    assert found["one cache"]["p99"] <= found["ours"]["p99"] < found["random"]["p99"] / 2 < found["hash"]["p99"] / 10
    assert prefills["one cache"] < prefills["ours"] < prefills["power of two"] / 2
    assert prefills["ours + tier"] < prefills["ours"]
    assert found["one cache"]["hit_rate"] > found["ours"]["hit_rate"] > found["random"]["hit_rate"] + 0.2
    assert found["ours + tier"]["gigabytes"]["tier_read"] > 0 == found["ours"]["gigabytes"]["tier_read"]


@pytest.mark.parametrize("policy", ["power of two", "ours", "ours + tier"])
def test_every_request_is_served_once(routing: ModuleType, policy: str) -> None:
    """Through failures one by one and of a quarter together, a flash crowd, several routers with old views."""
    quick = routing.replace(
        routing.gpu_profile(1024), start_seconds=1.5
    )  # back before what was running would have ended
    busy = settings(
        routing,
        profile=quick,
        policy=policy,
        num_requests=3000,
        fail_every=600.0,
        fail_at_once=0.25,
        arrivals="flash",
        num_routers=3,
        stale_seconds=1.0,
    )
    simulation = routing.Simulation(routing.Scenario(**busy)).run()
    assert simulation.served == [1] * 3000
    for request, name in enumerate(simulation.names):
        assert simulation.done[request] - simulation.times[request] > simulation.sets.warm[name] - 1e-6
    row = simulation.report()
    assert row["failures"] >= 8
    assert row["retried"] > 0
    # each batch found its references in memory, read them or made them
    assert 0 < row["prefills"] + row["tier_reads"] <= row["batches"] <= row["requests"] + row["retried"]
    assert row["prefills_avoided"] + row["prefills"] == row["requests"] == 1500
    for replica in simulation.replicas.values():
        assert not replica.queue
        assert replica.device_bytes == sum(replica.device.values()) <= busy["profile"].device_bytes
        assert replica.host_bytes == sum(replica.host.values()) <= busy["profile"].host_bytes


def test_seeded(routing: ModuleType) -> None:
    small = settings(routing, num_requests=1500, arrivals="bursts")
    assert routing.simulate(**small) == routing.simulate(**small)
    assert routing.simulate(**small) != routing.simulate(**small, seed=1)


def test_queue_of_one_is_the_textbook_one(routing: ModuleType) -> None:
    """One replica that knows one set of one reference is M/D/1: mean wait = load x service / (2 (1 - load))."""
    profile = routing.replace(routing.gpu_profile(1024), warm_seconds=(1.0,) * 4, extra_image=1.0)
    one = routing.Scenario(profile=profile, num_replicas=1, num_sets=1, num_requests=40_000, load=0.6, policy="random")
    routing.MAX_BATCH, before = 1, routing.MAX_BATCH
    try:
        done = routing.Simulation(one).run()
    finally:
        routing.MAX_BATCH = before
    first = done.first
    mean = sum(d - t for d, t in zip(done.done[first:], done.times[first:], strict=True)) / len(done.done[first:])
    assert mean == pytest.approx(1 + 0.6 / (2 * 0.4), rel=0.05)  # 27,000 requests of a queue: a few percent
    assert done.report()["prefills"] == 0  # made in the warm-up


def test_derived_profile_gives_the_published_table_back(routing: ModuleType) -> None:
    """4 standard steps over one with prefill and 3 kept ones is the published speed-up."""
    for side, published in routing.PUBLISHED_SPEEDUP.items():
        profile = routing.gpu_profile(side)
        for warm, prefill, speedup in zip(profile.warm_seconds, profile.prefill_seconds, published, strict=True):
            assert 4 * (warm / 4 + prefill) / (warm + prefill) == pytest.approx(speedup)


def test_program_ends_in_one_json_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, "--quick", "-o", tmp_path / "routing"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path / "routing.json").read_text())
    rows = report["tables"]["target"]
    assert len(rows) == 3 * 7
    assert (tmp_path / "routing.md").read_text().count("\n|") == 2 + len(rows)
