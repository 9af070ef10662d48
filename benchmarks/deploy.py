"""The service on Ray Serve: requests over many reference sets, with the affine router, with Ray's own, and with a kill.

Starts the application on a Ray of this machine, with the bundled model and one core a replica, once for each run:
`affine`, `ray` (Ray's default, the power of two choices) and `kill` (affine; one replica gets SIGKILL, while it draws,
when half of the requests are done). A closed loop of clients requests sets in random order, the same order in every
run. Each replica's memory holds a share of all K/V (`--keep`): with room for all of them, every router ends with all of
them on every replica. A hit is a request without a prefill of its own: hit_rate = 1 - prefills / requests. In the
`kill` run the replica's counts are lost with it, so an answer that says "miss" counts as a prefill. The last line is
one JSON object; the exit code is 1 if a request was lost.

    .venv/bin/python benchmarks/deploy.py -o benchmarks/results/deploy.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shlex
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve

from limner.deploy.cluster import connect, quiet
from limner.deploy.ray import NAME, DeployOptions, app
from limner.errors import LimnerError
from limner.images import prepare_reference
from limner.pipeline import Pipeline
from service import as_text, free_port, machine, reference_sets

PATIENCE = 600.0
"""Seconds after which a request that was accepted and has not ended is lost."""
PROMPTS = ("make the sticker bigger", "make the sticker blue", "put image 1 on a meadow", "turn image 1 upside down")


class Run:
    """One application, its load and the results."""

    def __init__(self, args: argparse.Namespace, kind: str, sets: list[tuple[bytes, ...]], store_memory: int) -> None:
        self.args, self.kind, self.sets, self.store_memory = args, kind, sets, store_memory
        self.ended: dict[str, dict[str, Any]] = {}
        self.seconds: list[float] = []
        self.problems: list[str] = []
        self.killed: dict[str, Any] | None = None

    def __call__(self) -> dict[str, Any]:
        port = free_port()
        with tempfile.TemporaryDirectory(prefix="limner-deploy-") as data, quiet():
            options = DeployOptions.parse(
                {
                    "data": data,
                    "replicas": self.args.replicas,
                    "threads": 1,
                    "store_memory": str(self.store_memory),
                    "router": "ray" if self.kind == "ray" else "affine",
                    "unsafe_no_checks": True,
                    "drain": 5,
                    "requests_per_minute": 1e9,
                    "concurrent": 100_000,
                    "max_waiting": 100_000,
                    "keep_results": 1e5,
                }
            )
            connect("local", option="--address", num_cpus=self.args.replicas)
            try:
                serve.start(http_options={"host": "127.0.0.1", "port": port})
                serve.run(app(options), name=NAME, route_prefix="/")
                self.replicas = serve.get_deployment_handle("Replica", NAME)
                start = time.monotonic()
                asyncio.run(self._load(f"http://127.0.0.1:{port}"))
                wall = time.monotonic() - start
                stats = self.replicas.broadcast("stats").results(timeout_s=60)
            finally:
                ray.shutdown()
        return self._report(wall, stats)

    def _report(self, wall: float, stats: list[Any]) -> dict[str, Any]:
        told = [one["result"]["limner"] for one in self.ended.values() if one["status"] == "Ready"]
        misses = sum(one["reference_cache"] == "miss" for one in told)
        prefills = misses if self.kind == "kill" else sum(engine.prefills for _, engine, _ in stats)
        found = {
            "requests": self.args.requests,
            "ready": len(told),
            "lost": self.args.requests - len(self.ended),
            "prefills": prefills,
            "hit_rate": round(1 - prefills / self.args.requests, 4),
            "answers_that_missed": misses,
            "images_of_replicas": [engine.images for _, engine, _ in stats],
            "requests_per_second": round(len(told) / wall, 3),
            "median_seconds": round(statistics.median(self.seconds), 3),
            "p95_seconds": round(statistics.quantiles(self.seconds, n=20)[-1], 3),
            "mean_batch": round(statistics.mean(one["batch"] for one in told), 2),
            "seconds": round(wall, 1),
            "problems": self.problems[:10],
        }
        return found | ({"killed": self.killed} if self.kind == "kill" else {})

    async def _load(self, url: str) -> None:
        rng = random.Random(self.args.seed)
        numbers = iter([(number, rng.randrange(len(self.sets))) for number in range(self.args.requests)])
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            work = [self._client(client, numbers) for _ in range(self.args.clients)]
            if self.kind == "kill":
                work.append(self._kill())
            await asyncio.gather(*work)

    async def _client(self, client: httpx.AsyncClient, numbers: Any) -> None:
        names = ("input_image", "input_image_2", "input_image_3")
        for number, which in numbers:
            body: dict[str, Any] = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number}
            body |= {"width": self.args.side, "height": self.args.side}
            body |= dict(zip(names, map(as_text, self.sets[which]), strict=False))
            start = time.monotonic()
            answer = await client.post("/v1/edit", json=body)
            if answer.status_code != 200:
                self.problems.append(f"request {number}: {answer.status_code} {answer.text[:200]}")
                continue
            id_ = answer.json()["id"]
            while time.monotonic() - start < PATIENCE:
                found = (await client.get("/v1/get_result", params={"id": id_})).json()
                if found["status"] != "Pending":
                    self.ended[id_] = found
                    self.seconds.append(time.monotonic() - start)
                    if found["status"] != "Ready" or found["result"]["seed"] != number:
                        self.problems.append(f"request {number}: {json.dumps(found)[:200]}")
                    if len(self.ended) % 50 == 0:
                        print(f"{self.kind}: {len(self.ended)} of {self.args.requests}", file=sys.stderr, flush=True)
                    break
                await asyncio.sleep(0.05)

    async def _kill(self) -> None:
        while len(self.ended) < self.args.requests // 2:
            await asyncio.sleep(0.02)
        for _ in range(200):
            for process, engine, _ in await self.replicas.broadcast("stats").results_async(timeout_s=60):
                if engine.running:
                    os.kill(process, signal.SIGKILL)
                    self.killed = {"after": len(self.ended), "running": engine.running, "waiting": engine.waiting}
                    return
            await asyncio.sleep(0.02)
        self.problems.append("no replica was killed: none was seen to draw")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--sets", type=int, default=16, help="lists of references")
    parser.add_argument("--keep", type=float, default=0.75, help="share of all K/V that a replica's memory keeps")
    parser.add_argument("--replicas", type=int, default=2, help="of one core each")
    parser.add_argument("--clients", type=int, default=6, help="requests at once")
    parser.add_argument("--side", type=int, default=128, help="pixels of a side of the pictures")
    parser.add_argument("--runs", nargs="+", choices=("affine", "ray", "kill"), default=["affine", "ray", "kill"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="write the JSON here")
    args = parser.parse_args()
    sets = reference_sets(args.sets)
    pipe = Pipeline.from_pretrained()
    sizes = [
        [prepare_reference(data, policy=pipe.reference_policy).report.processed_size for data in one] for one in sets
    ]
    kv = sum(pipe.kv_bytes(sum(w * h for w, h in one) // 256) for one in sizes)
    report: dict[str, Any] = {
        "benchmark": "deploy",
        **machine(),
        "ray_version": ray.__version__,
        "command": shlex.join(sys.argv),
        "sets": args.sets,
        "kv_bytes": kv,
        "keep": args.keep,
        "replicas": args.replicas,
        "clients": args.clients,
        "side": args.side,
    }
    found = {}
    for kind in args.runs:
        try:
            found[kind] = Run(args, kind, sets, round(args.keep * kv))()
        except LimnerError as error:
            raise SystemExit(str(error)) from error
        report[kind] = found[kind]
        if args.output:  # runs of before stay, so that they may be made one by one
            before = json.loads(args.output.read_text()) if args.output.exists() else {}
            args.output.write_text(json.dumps(before | report, indent=1) + "\n")
    print(json.dumps(report))
    return int(any(one["lost"] or one["problems"] for one in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
