"""The service on machines that are cut off: two Ray clusters and a PostgreSQL, each node with its own address.

Nodes are network namespaces of this machine, joined by a bridge (10.9.0.0/24); it needs root, iproute2, and PostgreSQL's
programs. First the link of a worker node is cut while it draws, then that of the head node, whose processes go on without
knowing; another cluster starts over the same database. A job is lost if its id was answered and it does not end as Ready.
The last line is one JSON object.

    .venv/bin/python benchmarks/nodes.py -o benchmarks/results/nodes.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from service import machine

BRIDGE, DATABASE, HEAD, WORKER, OTHER = "limner-br", "10.9.0.1", 2, 3, 4
KEY = "anna-key-0123456789"
PORT, RAY, POSTGRES = 8731, 6379, 5499
BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "LIMNER_KEYS": f"anna:{KEY}",
    "PATH": f"{BIN}:{os.environ['PATH']}",
}


def call(*words: object, check: bool = True, **options: Any) -> None:
    subprocess.run([str(w) for w in words], check=check, stdout=subprocess.DEVNULL, **options)


def address(node: int) -> str:
    return f"10.9.0.{node}"


def link(node: int, state: str) -> None:
    call("ip", "link", "set", f"limner-{node}", state)


@contextlib.contextmanager
def network(*nodes: int) -> Iterator[None]:
    """A namespace for each node, and a bridge of this machine; all processes in them are killed in the end."""
    try:
        call("ip", "link", "add", BRIDGE, "type", "bridge")
        call("ip", "addr", "add", f"{DATABASE}/24", "dev", BRIDGE)
        call("ip", "link", "set", BRIDGE, "up")
        for node in nodes:
            space, inside = f"limner-{node}", ("ip", "netns", "exec", f"limner-{node}", "ip")
            call("ip", "netns", "add", space)
            call("ip", "link", "add", space, "type", "veth", "peer", "name", "eth0", "netns", space)
            call("ip", "link", "set", space, "master", BRIDGE)
            link(node, "up")
            call(*inside, "addr", "add", f"{address(node)}/24", "dev", "eth0")
            for name in ("eth0", "lo"):
                call(*inside, "link", "set", name, "up")
        yield
    finally:
        for node in nodes:
            call("sh", "-c", f"ip netns pids limner-{node} | xargs -r kill -9", check=False)
            call("ip", "netns", "del", f"limner-{node}", check=False)
        call("ip", "link", "del", BRIDGE, check=False)


@contextlib.contextmanager
def database(folder: Path) -> Iterator[str]:
    """The URL of an empty database that the nodes reach."""
    (programs,) = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:]
    shutil.chown(folder, "postgres", "postgres")
    options: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": [], "cwd": folder}
    data = folder / "data"
    call(programs / "initdb", "-D", data, "-U", "limner", "-A", "trust", "--no-sync", **options)
    with (data / "pg_hba.conf").open("a") as file:
        file.write("host all all 10.9.0.0/24 trust\n")
    settings = f"-p {POSTGRES} -h {DATABASE} -k {folder}"
    call(programs / "pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", settings, "start", **options)
    try:
        yield f"postgresql://limner@{DATABASE}:{POSTGRES}/postgres"
    finally:
        call(programs / "pg_ctl", "-D", data, "-w", "-m", "immediate", "stop", check=False, **options)


def start_ray(node: int, folder: Path, *, head: int | None = None) -> None:
    """Start a node of one core: a head, or a worker that joins it."""
    where = ["--head", f"--port={RAY}", f"--temp-dir={folder}/ray{node}"]
    if head is not None:
        where = [f"--address={address(head)}:{RAY}"]
    call(
        "ip",
        "netns",
        "exec",
        f"limner-{node}",
        BIN / "ray",
        "start",
        *where,
        f"--node-ip-address={address(node)}",
        "--num-cpus=1",
        "--object-store-memory=100000000",
        env=ENVIRONMENT,
        stderr=subprocess.DEVNULL,
    )


class Service:
    """`limner deploy` on a node, and the requests to it."""

    def __init__(self, node: int, *, data: str, store: Path, replicas: int, log: Path) -> None:
        words = [
            "ip",
            "netns",
            "exec",
            f"limner-{node}",
            BIN / "limner",
            "deploy",
            "--address",
            f"{address(node)}:{RAY}",
            "--host",
            "0.0.0.0",
            "--port",
            PORT,
            "--replicas",
            replicas,
            "--threads",
            1,
            "--data",
            data,
            "--store",
            f"file://{store}",
            "--requests-per-minute",
            100000,
            "--concurrent",
            1000,
        ]
        with log.open("w") as file:
            self.process = subprocess.Popen([str(w) for w in words], env=ENVIRONMENT, stdout=file, stderr=file)
        self._http = httpx.Client(base_url=f"http://{address(node)}:{PORT}", headers={"x-key": KEY}, timeout=20)

    def wait(self, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while self.status() != 200:
            if time.monotonic() > end or self.process.poll() is not None:
                raise SystemExit("the service did not start")
            time.sleep(0.5)

    def status(self) -> int | None:
        """Of /readyz; None where nobody answers."""
        with contextlib.suppress(httpx.TransportError):
            return self._http.get("/readyz").status_code
        return None

    def submit(self, number: int, *, steps: int) -> str:
        body = {"prompt": "a cat on a beach", "seed": number, "num_inference_steps": steps}
        answer = self._http.post("/v1/edit", json=body)
        answer.raise_for_status()
        return str(answer.json()["id"])

    def ends(self, ids: list[str], seconds: float = 300) -> dict[str, int]:
        """Return the number of jobs by outcome."""
        end, found, left = time.monotonic() + seconds, Counter[str](), list(ids)
        while left and time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                answer = self._http.get("/v1/get_result", params={"id": left[0]})
                if answer.status_code == 200 and (status := answer.json()["status"]) != "Pending":
                    found[status] += 1
                    left.pop(0)
                    continue
            time.sleep(0.2)
        return dict(found + Counter({"not ended": len(left)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=40, help="at each cut")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    start = time.monotonic()
    told: dict[str, Any] = {}

    def say(name: str, value: Any) -> None:
        told[name] = value
        print(f"{time.monotonic() - start:6.1f} s  {name}: {value}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="limner-nodes-") as made, network(HEAD, WORKER, OTHER):
        folder = Path(made)
        folder.chmod(0o755)
        (folder / "postgres").mkdir()
        with database(folder / "postgres") as data:
            start_ray(HEAD, folder)
            start_ray(WORKER, folder, head=HEAD)
            service = Service(HEAD, data=data, store=folder / "kv", replicas=2, log=folder / "first.log")
            service.wait()
            ids = [service.submit(number, steps=20) for number in range(args.jobs)]
            time.sleep(2)
            link(WORKER, "down")
            cut = time.monotonic()
            say("a worker node was cut off", service.ends(ids))
            say("seconds until its jobs had ended", round(time.monotonic() - cut, 1))

            ids = [service.submit(number, steps=50) for number in range(args.jobs)]
            time.sleep(1)
            link(HEAD, "down")
            cut = time.monotonic()
            start_ray(OTHER, folder)
            other = Service(OTHER, data=data, store=folder / "kv", replicas=1, log=folder / "second.log")
            other.wait()
            say("seconds until another cluster was ready", round(time.monotonic() - cut, 1))
            say("the head node was cut off", other.ends(ids))
            link(HEAD, "up")
            time.sleep(15)
            say("status of the first cluster when its link is back", service.status())
            say("one more job of the second", other.ends([other.submit(0, steps=4)]))
            for one in (service, other):
                one.process.kill()
    report = {"benchmark": "nodes", **machine(), "command": shlex.join(sys.argv), "jobs": args.jobs, **told}
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
