"""A server that is killed under load, again and again: every job that it accepted has to end, once.

Each round starts the server on the same folder, lets clients submit edits, and sends SIGKILL at a random moment. After the
last round a server finishes what is left. A job is lost if its id was answered and it does not end as Ready or Error. It is
doubled if its final status, end time or picture ever changes, or if an idempotency key has two jobs. The last line
is one JSON object.

    .venv/bin/python benchmarks/serve_kills.py -o benchmarks/results/serve_kills.json

With `--data postgresql://...`, an empty database, jobs are there; and its sessions are ended at random moments too, between
two statements of a transaction as elsewhere. A request may then be answered with 503, and is sent again.

    .venv/bin/python benchmarks/serve_kills.py --data postgresql://limner@127.0.0.1/kills \\
        -o benchmarks/results/serve_kills_postgres.json
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from service import MANY, Server, as_text, free_port, machine, reference_sets

RESTART = ("--requests-per-minute", "1e9", "--concurrent", "100000", "--unsafe-no-checks")
"""With the usual number of requests that may wait."""
OPTIONS = (*MANY, "--unsafe-no-checks", "--keep-results", "100000")


class Watch:
    """What was accepted, and what became of it as far as anybody saw."""

    def __init__(self) -> None:
        self.accepted: dict[str, str] = {}
        self.ended: dict[str, tuple[str, float, str]] = {}
        self.problems: list[str] = []
        self.cuts = self.unavailable = 0

    def accept(self, key: str, id_: str) -> None:
        if self.accepted.setdefault(key, id_) != id_:
            self.problems.append(f"{key} has two jobs: {self.accepted[key]} and {id_}")

    def end(self, id_: str, state: tuple[str, float, str]) -> None:
        if state[0] != "Ready":
            self.problems.append(f"{id_} ended as {state[0]}")
        if self.ended.setdefault(id_, state) != state:
            self.problems.append(f"{id_} ended twice: {self.ended[id_]} and {state}")


async def submit(client: httpx.AsyncClient, watch: Watch, number: int, rng: random.Random, sets: list[Any]) -> None:
    """One job; sent again under its key where no answer came, as a careful client does."""
    key = f"key-{number}"
    names = ("input_image", "input_image_2", "input_image_3")
    body = {"prompt": "make the sticker bigger", "seed": number, "output_format": "png"}
    body |= dict(zip(names, map(as_text, sets[number % len(sets)]), strict=False))
    for _ in range(rng.choice((1, 2))):
        try:
            answer = await client.post("/v1/edit", json=body, headers={"Idempotency-Key": key})
        except httpx.TransportError:
            continue
        if answer.status_code == 200:
            watch.accept(key, answer.json()["id"])
        elif answer.status_code == 503 and watch.cuts:
            watch.unavailable += 1
        else:
            watch.problems.append(f"{key}: {answer.status_code} {answer.text[:200]}")


async def look(client: httpx.AsyncClient, watch: Watch, id_: str) -> str:
    answer = await client.get("/v1/get_result", params={"id": id_})
    if answer.status_code == 503 and watch.cuts:
        watch.unavailable += 1
        return "Pending"
    found = answer.json()
    if found["status"] in ("Ready", "Error"):
        digest = ""
        if found["status"] == "Ready":
            sample = await client.get(found["result"]["sample"])
            if sample.status_code == 503 and watch.cuts:
                watch.unavailable += 1
                return "Pending"
            digest = hashlib.sha256(sample.content).hexdigest()
            if sample.status_code != 200:
                watch.problems.append(f"{id_} is Ready and its picture is not there")
        watch.end(id_, (found["status"], (found["result"] or {}).get("end_time", 0.0), digest))
    return str(found["status"])


def end_sessions(url: str) -> None:
    """Ends the connections of a database, whatever they do."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as db:
        db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid != pg_backend_pid()"
        )


async def load(
    server: Server,
    watch: Watch,
    rng: random.Random,
    numbers: Any,
    seconds: float,
    sets: list[Any],
    database: str | None,
) -> None:
    """Submits and looks until the server is killed; connections to its database, if there is one, are cut meanwhile."""

    async def work(client: httpx.AsyncClient) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and server.process.poll() is None:
            await submit(client, watch, next(numbers), rng, sets)
            known = list(watch.accepted.values())
            if known:
                try:
                    await look(client, watch, rng.choice(known))
                except httpx.TransportError:
                    return
            await asyncio.sleep(rng.uniform(0, 0.3))

    async def kill() -> None:
        await asyncio.sleep(rng.uniform(0.05, seconds))
        server.kill()

    async def cut() -> None:
        while database is not None and server.process.poll() is None:
            await asyncio.sleep(rng.uniform(0.05, 1.0))
            watch.cuts += 1
            await asyncio.to_thread(end_sessions, database)

    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        await asyncio.gather(kill(), cut(), *(work(client) for _ in range(4)))


async def finish(server: Server, watch: Watch, seconds: float) -> None:
    """Waits until every accepted job has ended."""
    end = time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        waiting = list(watch.accepted.values())
        while waiting and time.monotonic() < end:
            waiting = [id_ for id_ in waiting if await look(client, watch, id_) == "Pending"]
            print(f"{len(waiting)} jobs left", file=sys.stderr, flush=True)
            await asyncio.sleep(1)
        for id_ in watch.accepted.values():
            await look(client, watch, id_)


def restart(number: int, folder: Path, sets: list[Any]) -> dict[str, Any]:
    """Start a server over so many jobs that are pending, and say how soon it answers and what it takes."""
    from limner.config import ReferencePolicy
    from limner.images import prepare_reference
    from limner.server.jobs.records import Job
    from limner.server.jobs.store import JobStore

    data = folder / "queued"
    server = Server(data, *OPTIONS, log=folder / "queued.log")
    empty = server.wait()
    before = psutil.Process(server.process.pid).memory_info().rss
    server.stop()
    store = JobStore(data)
    pictures = [[prepare_reference(one, policy=ReferencePolicy()) for one in chosen] for chosen in sets]
    for i in range(number):
        own = pictures[i % len(pictures)]
        reports = tuple(one.report for one in own)
        store.add(Job(owner=f"owner{i % 7}", prompt=f"make it bigger {i}", seeds=(i,), references=reports), own)
    store.close()
    server = Server(data, *RESTART, log=folder / "queued.log")
    ready = server.wait(600)
    process, peak, ended = psutil.Process(server.process.pid), 0, 0.0
    end = time.monotonic() + 60
    while time.monotonic() < end:
        peak, ended = max(peak, process.memory_info().rss), server.metrics()["limner_engine_finished_total"]
        time.sleep(0.5)
    left = server.metrics()["limner_jobs_live"]
    server.kill()
    return {
        "jobs": number,
        "seconds_to_ready": round(ready, 1),
        "seconds_to_ready_without": round(empty, 1),
        "mib_without": round(before / 2**20, 1),
        "peak_mib": round(peak / 2**20, 1),
        "ended_in_a_minute": ended,
        "pending": left,
    }


def num_results(data: str | Path) -> int:
    """Pictures that are kept."""
    if isinstance(data, Path):
        return len(list((data / "results").glob("*.png")))
    import psycopg

    with psycopg.connect(data) as db:
        row = db.execute("SELECT count(*) FROM limner.files WHERE folder = 'results'").fetchone()
    assert row is not None
    return int(row[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=4.0, help="longest time from ready to a kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", metavar="URL", help="a postgresql:// database; default: a folder")
    parser.add_argument("--queued", type=int, metavar="N", help="also start over N jobs that are pending, in a folder")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    rng, watch = random.Random(args.seed), Watch()
    numbers, sets, port = iter(range(10**9)), reference_sets(4), free_port()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        data, log = args.data or Path(folder) / "data", Path(folder) / "server.log"
        for kill in range(1, args.kills + 1):
            server = Server(data, *OPTIONS, port=port, log=log)
            if rng.random() < 0.2:  # also while it starts and takes up jobs
                time.sleep(rng.uniform(1, 8))
                server.kill()
            else:
                server.wait()
                asyncio.run(load(server, watch, rng, numbers, args.seconds, sets, args.data))
            print(
                f"kill {kill}: {len(watch.accepted)} accepted, {len(watch.ended)} seen to end",
                file=sys.stderr,
                flush=True,
            )
        server = Server(data, *OPTIONS, port=port, log=log)
        server.wait()
        asyncio.run(finish(server, watch, 1200))
        code = server.stop()
        queued = {"restart": restart(args.queued, Path(folder), sets)} if args.queued else {}
        lost = sorted(set(watch.accepted.values()) - set(watch.ended))
        files = num_results(data)
    report = {
        "benchmark": "serve_kills",
        **machine(),
        "command": shlex.join(sys.argv),
        "kills": args.kills,
        "seconds": round(time.monotonic() - start, 1),
        "accepted": len(watch.accepted),
        "ended": len(watch.ended),
        "ready": sum(state == "Ready" for state, _, _ in watch.ended.values()),
        "lost": lost,
        "problems": watch.problems,
        "result_files": files,
        "exit_code": code,
        **queued,
        **({"sessions_ended": watch.cuts, "answers_503": watch.unavailable} if args.data else {}),
    }
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
