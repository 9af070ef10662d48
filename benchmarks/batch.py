"""A batch that is killed at random moments and run again: every row has to be written once, and every list of references
prefilled once.

Draws rows over many lists of the sample pictures with the bundled model, sends SIGKILL when a random share of the rows
is done, and runs the same command again, until the last run ends by itself. Each run notes its prefills on disk, and
these are counted. A prefill that a kill interrupts before its K/V are stored runs again, and counts again. The last
line is one JSON object; the exit code is 1 if a row is missing, doubled, or drawn again though it was recorded.

    .venv/bin/python benchmarks/batch.py -o benchmarks/results/batch.json
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from limner import bench

SAMPLES = Path(__file__).parents[1] / "src" / "limner" / "assets" / "samples"
PROMPTS = ("make the sticker bigger", "make the sticker blue", "put image 1 on a meadow", "turn image 1 upside down")


def reference_sets(number: int) -> list[list[str]]:
    """Different ordered lists of one to three sample pictures."""
    names = sorted(str(path) for path in SAMPLES.glob("*.png"))
    found = [list(chosen) for length in (1, 2, 3) for chosen in itertools.permutations(names, length)]
    if number > len(found):
        raise SystemExit(f"--sets: {number} is over {len(found)}, which is all that the samples give")
    return found[:number]


def manifest(path: Path, *, rows: int, sets: int, side: int) -> list[str]:
    """Write rows whose lists of references take turns; return their ids."""
    lists = reference_sets(sets)
    lines = [
        {
            "id": f"row-{i:05d}",
            "prompt": PROMPTS[i // sets % len(PROMPTS)],
            "references": lists[i % sets],
            "seed": i,
            "size": f"{side}x{side}",
        }
        for i in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [str(line["id"]) for line in lines]


def recorded(out: Path) -> dict[str, dict[str, Any]]:
    """Return the records of the rows that were drawn, as a kill left them."""
    lines: list[bytes] = []
    for path in [out / "results.jsonl", *sorted((out / ".limner-batch").glob("journal-*.jsonl"))]:
        lines += path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {row["id"]: row for row in rows if row.get("status") == "ok"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--sets", type=int, default=50)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="draw with Ray on this machine, with so many processes")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    rng, problems, start = random.Random(args.seed), [], time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out = folder / "out"
        ids = manifest(folder / "rows.jsonl", rows=args.rows, sets=args.sets, side=args.side)
        command = [sys.executable, "-m", "limner", "batch", str(folder / "rows.jsonl"), "-o", str(out), "--json"]
        command += ["--ray", "local", "--workers", str(args.workers)] if args.workers else []
        done: dict[str, dict[str, Any]] = {}
        killed_at = []
        for stop in sorted(rng.sample(range(1, args.rows), args.kills)):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            while process.poll() is None and len(recorded(out)) < max(stop, len(done) + 1):
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
            process.wait()
            now = recorded(out)
            problems += [f"{id} was drawn again" for id in done if now[id] != done[id]]
            done = now
            killed_at.append(len(done))
            print(f"killed with {len(done)} of {args.rows} rows", file=sys.stderr, flush=True)
        last = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if last.returncode:
            raise SystemExit(f"the last run ended with {last.returncode}")
        summary = json.loads(last.stdout)
        rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        problems += [] if [row["id"] for row in rows] == ids else ["the results are not the rows, each once, in order"]
        for row in rows:
            if hashlib.sha256((out / row["file"]).read_bytes()).hexdigest() != row["sha256"]:
                problems.append(f"{row['id']}: its file is not the one that was written")
            if row["id"] in done and row != done[row["id"]]:
                problems.append(f"{row['id']} was drawn again")
        files = len(list(out.glob("*.png")))
    report = {
        "benchmark": "batch",
        **bench.machine(torch.device("cpu")),
        "command": shlex.join(sys.argv),
        "rows": args.rows,
        "sets": args.sets,
        "side": args.side,
        "killed_at": killed_at,
        "rows_in_results": len(rows),
        "files": files,
        "prefills": summary["prefills_in_all"],
        "drawn_by_the_last_run": summary["drawn"],
        "images_per_second": summary["images_per_second"],
        "seconds": round(time.monotonic() - start, 1),
        "problems": problems,
    }
    line = json.dumps(report)
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(line)
    return int(bool(problems) or files != args.rows)


if __name__ == "__main__":
    raise SystemExit(main())
