"""Peak memory and seconds of one call that draws several images over the same references, each engine in a new process.

In a process of its own an engine cannot reuse memory that another left behind. The peak is that of the call, above what
the process held before it (weights, inputs). For `warm` the K/V existed before, so they are added. diffusers repeats
references over the batch; Limner holds them once. The last line is one JSON object.

    .venv/bin/python benchmarks/memory.py -o benchmarks/results/memory.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any


def call(engine: str, args: argparse.Namespace) -> dict[str, Any]:
    """One call in a new process."""
    words = [
        sys.executable,
        "-m",
        "limner",
        "bench",
        "--references",
        args.references,
        "--batch",
        args.batch,
        "--side",
        args.side,
        "--reference-side",
        args.side,
        "--text",
        args.text,
        "--rounds",
        1,
        "--engines",
        engine,
        "--geometry",
        *args.geometry,
        "--device",
        args.device,
    ]
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--geometry", type=int, nargs=3, default=[8, 2, 6], help="heads of 128, double, single blocks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--engines", nargs="+", default=["diffusers_kv", "cold", "warm"])
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in args.engines}
    peaks: dict[str, list[int]] = {name: [] for name in args.engines}
    for _ in range(args.rounds):
        for engine in args.engines:
            report = call(engine, args)
            (case,) = report.pop("cases")
            seconds[engine].append(case["seconds"][engine])
            before = case["kept_bytes"] if "warm" in engine else 0
            peaks[engine].append(case["peak_bytes"][engine] + before)
            print(f"{engine}: {seconds[engine][-1]:.2f} s, {peaks[engine][-1] / 2**20:.0f} MiB", file=sys.stderr)
    result = {key: report[key] for key in ("device", "threads", "versions", "date", "geometry", "dtype")}
    result |= {"benchmark": "memory", "case": case["case"], "kept_bytes": case["kept_bytes"], "all_seconds": seconds}
    result["seconds"] = {name: round(statistics.median(v), 3) for name, v in seconds.items()}
    result["peak_bytes"] = {name: int(statistics.median(v)) for name, v in peaks.items()}
    base = result["peak_bytes"].get("diffusers_kv")
    if base:
        result["share_of_diffusers"] = {name: round(v / base, 3) for name, v in result["peak_bytes"].items()}
        first = result["seconds"]["diffusers_kv"]
        result["times_diffusers_kv"] = {name: round(first / v, 3) for name, v in result["seconds"].items()}
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
