"""A server under load: clients at once, requests mixed over both dialects and a few reference sets; nothing may get lost.

First one client sends edits one after another beside the bare pipeline in this process: the difference of the medians is
what the service adds, with and without safety checks. Then all clients at once. Memory is the server's resident set. The
last line is one JSON object.

    .venv/bin/python benchmarks/serve_load.py -o benchmarks/results/serve_load.json
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from limner import Pipeline
from service import MANY, Server, as_text, machine, reference_sets

PROMPTS = ("use the background of image 2", "make the sticker bigger", "remove the sticker", "move the sticker left")


def bare_seconds(references: Sequence[bytes], rounds: int) -> float:
    """Median seconds of an edit with kept references in this process."""
    pipe = Pipeline.from_pretrained()
    taken = []
    for i in range(rounds + 3):
        start = time.perf_counter()
        pipe(PROMPTS[i % 4], image=list(references), generator=torch.Generator().manual_seed(i))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[3:])


def service_seconds(url: str, references: Sequence[bytes], rounds: int) -> tuple[float, float]:
    """Median seconds of such an edit over HTTP, and of what of them was not on the device."""
    taken, beside = [], []
    with httpx.Client(base_url=url, timeout=120) as client:
        for i in range(rounds + 3):
            files = [("image[]", (f"{n}.png", data, "image/png")) for n, data in enumerate(references)]
            start = time.perf_counter()
            answer = client.post("/v1/images/edits", data={"prompt": PROMPTS[i % 4], "seed": i}, files=files)
            seconds = time.perf_counter() - start
            answer.raise_for_status()
            taken.append(seconds)
            beside.append(seconds - answer.json()["limner"]["ran"])
    return statistics.median(taken[3:]), statistics.median(beside[3:])


class Load:
    """What clients saw."""

    def __init__(self) -> None:
        self.statuses: collections.Counter[str] = collections.Counter()
        self.lost: list[str] = []
        self.seconds: list[float] = []
        self.beside: list[float] = []
        self.caches: collections.Counter[str] = collections.Counter()

    def answered(self, response: httpx.Response) -> None:
        self.statuses[str(response.status_code)] += 1

    def done(self, seconds: float, told: dict[str, Any]) -> None:
        self.seconds.append(seconds)
        self.beside.append(seconds - told["ran"] - told["waited"])
        self.caches[told["reference_cache"]] += 1


async def hosted(client: httpx.AsyncClient, load: Load, body: dict[str, Any]) -> None:
    start = time.perf_counter()
    answer = await client.post("/v1/flux-2-klein-9b-preview", json=body)
    load.answered(answer)
    answer.raise_for_status()
    id_ = answer.json()["id"]
    while True:
        await asyncio.sleep(0.2)
        answer = await client.get("/v1/get_result", params={"id": id_})
        load.answered(answer)
        found = answer.json()
        if found["status"] != "Pending":
            break
    if found["status"] != "Ready":
        load.lost.append(f"{id_}: {found['status']} {found['details']}")
        return
    load.done(time.perf_counter() - start, found["result"]["limner"])
    sample = await client.get(found["result"]["sample"])
    load.answered(sample)
    if not sample.content.startswith(b"\xff\xd8"):
        load.lost.append(f"{id_}: its picture is not there")


async def openai(client: httpx.AsyncClient, load: Load, fields: dict[str, Any], files: Sequence[bytes]) -> None:
    start = time.perf_counter()
    parts = [("image[]", (f"{n}.png", data, "image/png")) for n, data in enumerate(files)]
    answer = await client.post("/v1/images/edits", data=fields, files=parts)
    load.answered(answer)
    answer.raise_for_status()
    found = answer.json()
    if len(found["data"]) != 1 or not found["data"][0]["b64_json"]:
        load.lost.append(f"an answer without a picture: {str(found)[:200]}")
    load.done(time.perf_counter() - start, found["limner"])


async def run(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    load, rng = Load(), random.Random(args.seed)
    sets = reference_sets(args.reference_sets)
    process = psutil.Process(server.process.pid)
    memory: list[tuple[int, float]] = []
    numbers = iter(range(args.requests))

    async def work(client: httpx.AsyncClient) -> None:
        for number in numbers:
            references, prompt = rng.choice(sets), rng.choice(PROMPTS)
            try:
                if rng.random() < 0.5:
                    names = ("input_image", *(f"input_image_{i}" for i in range(2, 9)))
                    body = dict(zip(names, map(as_text, references), strict=False))
                    await hosted(client, load, {"prompt": prompt, "seed": number, **body})
                else:
                    await openai(client, load, {"prompt": prompt, "seed": str(number)}, references)
            except (httpx.HTTPError, KeyError, ValueError) as error:
                load.lost.append(f"request {number}: {error!r}")
            if number % 50 == 49:
                memory.append((number + 1, process.memory_info().rss / 2**20))
                print(f"{number + 1} of {args.requests}, {memory[-1][1]:.0f} MiB", file=sys.stderr, flush=True)

    start = time.perf_counter()
    limits = httpx.Limits(max_connections=args.clients, max_keepalive_connections=args.clients)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
        await asyncio.gather(*(work(client) for _ in range(args.clients)))
    seconds = time.perf_counter() - start
    metrics = server.metrics()
    after = [mib for number, mib in memory if number >= min(200, args.requests)]
    return {
        "clients": args.clients,
        "requests": args.requests,
        "reference_sets": len(sets),
        "seconds": round(seconds, 1),
        "images_per_second": round(args.requests / seconds, 2),
        "lost": load.lost,
        "statuses": dict(load.statuses),
        "latency_seconds": {f"p{q}": _quantile(load.seconds, q) for q in (50, 90, 99)},
        "beside_device_and_queue_seconds": {f"p{q}": _quantile(load.beside, q) for q in (50, 90, 99)},
        "prefills": metrics["limner_engine_prefills_total"],
        "batches": metrics["limner_engine_batches_total"],
        "caches": dict(load.caches),
        "mib_after_200": round(after[0], 1) if after else None,
        "mib_at_the_end": round(after[-1], 1) if after else None,
        "mib": [(number, round(mib, 1)) for number, mib in memory],
    }


def _quantile(values: list[float], q: int) -> float:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, len(ordered) * q // 100)], 4) if ordered else -1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--reference-sets", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30, help="edits one after another, for what the service adds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {"benchmark": "serve_load", **machine(), "command": shlex.join(sys.argv)}
    two = reference_sets(10)[5]
    with tempfile.TemporaryDirectory() as folder:
        bare = bare_seconds(two, args.rounds)
        overhead: dict[str, Any] = {"bare_pipeline_seconds": round(bare, 4)}
        for name, options in (("without_checks", ("--unsafe-no-checks",)), ("with_checks", ())):
            server = Server(Path(folder) / name, *MANY, *options)
            server.wait()
            seconds, beside = service_seconds(server.url, two, args.rounds)
            overhead[name] = {
                "seconds": round(seconds, 4),
                "added": round(seconds - bare, 4),
                "beside_device": round(beside, 4),
            }
            server.stop()
        report["one_client"] = overhead
        server = Server(Path(folder) / "load", *MANY)
        try:
            server.wait()
            report |= asyncio.run(run(server, args))
        finally:
            report["exit_code"] = server.stop()
    text = json.dumps(report)
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
