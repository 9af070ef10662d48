"""Where the memory of a service goes that draws edits with references of their own, one set after another.

A server with the bundled model in this process, without safety checks, and a client in another one that sends edits of
64x64 pictures, each of which is new. What the process grew by is divided into what it says itself (K/V and pictures that it
keeps), what else is in use (objects, mostly those of the entries), and the rest, which has to be pieces that the C library
keeps free: `free` is how much it says to keep, also where no memory is behind it. The last line is one JSON object. Needs
glibc.

    .venv/bin/python benchmarks/resident.py -o benchmarks/results/resident.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from limner import Pipeline
from limner.engine import Engine
from limner.memory.free import give_back
from limner.server.access.keys import KeyRing
from limner.server.access.limits import LimitPolicy
from limner.server.app import create_app
from limner.server.http.settings import ServeSettings
from limner.server.run import make_server
from limner.trust import safety
from service import machine

CLIENT = """
import base64, io, itertools, sys, threading
import httpx, numpy as np
from PIL import Image
url, number = sys.argv[1], int(sys.argv[2])
numbers, lock = iter(range(number)), threading.Lock()
def work():
    with httpx.Client(base_url=url, timeout=120) as client:
        while True:
            with lock:
                i = next(numbers, None)
            if i is None:
                return
            buffer = io.BytesIO()
            pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            files = [("image[]", ("a.png", buffer.getvalue(), "image/png"))]
            data = {"prompt": f"a {i}", "size": "128x128", "num_inference_steps": "1"}
            client.post("/v1/images/edits", data=data, files=files).raise_for_status()
            if i % 250 == 249:
                print(i + 1, flush=True)
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


class _Info(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _resident(engine: Engine, jobs: Any) -> dict[str, float]:
    """MiB that are resident, and what is known of them."""
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _Info
    info = library.mallinfo2()
    kept, pictures = sum(engine.store_stats().nbytes.values()), jobs.picture_bytes
    found = {
        "resident": psutil.Process().memory_info().rss,
        "kv": kept,
        "pictures": pictures,
        "others_in_use": info.uordblks + info.hblkhd - kept - pictures,
        "free": info.fordblks,
    }
    return {name: value / 2**20 for name, value in found.items()}


def _growth(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    grown = {name: round(after[name] - before[name], 1) for name in after}
    rest = grown["resident"] - grown["kv"] - grown["pictures"] - grown["others_in_use"]
    return grown | {"rest": round(rest, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    engine = Engine(Pipeline.from_pretrained())
    with tempfile.TemporaryDirectory() as folder:
        limits = LimitPolicy(requests_per_minute=1e9, burst=10**6, concurrent=10**6)
        settings = ServeSettings(data=Path(folder), limits=limits)
        app = create_app(engine=engine, keyring=KeyRing.open(), checks=safety.no_checks(), settings=settings)
        server = make_server(app, host="127.0.0.1", port=0, drain=30)
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        jobs = app.state.service.jobs
        start, course = _resident(engine, jobs), []
        words = [sys.executable, "-c", CLIENT, url, str(args.requests)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            for line in client.stdout:
                course.append((int(line), _growth(start, _resident(engine, jobs))))
                print(*course[-1], file=sys.stderr, flush=True)
        at_the_end = _growth(start, _resident(engine, jobs))
        give_back()
        given_back = _growth(start, _resident(engine, jobs))
        server.should_exit = True
        thread.join()
    report = {
        "benchmark": "resident",
        **machine(),
        "command": shlex.join(sys.argv),
        "requests": args.requests,
        "mib_grown": at_the_end,
        "mib_grown_after_giving_back": given_back,
        "course": course,
    }
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
