"""How long a whole `limner edit` with the bundled model takes beside `import torch`, both in processes of their own.

The picture of `make demo` is drawn, 128x128 in 4 steps. Rounds take turns, so that all see the same machine; medians are
shown. `--before FOLDER` also runs the command of an older checkout, with the same Python and libraries. The files were read
before by a round that does not count. The last line is one JSON object.

    git worktree add build/before HASH
    .venv/bin/python benchmarks/start.py --before build/before -o benchmarks/results/start.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from service import machine

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "src" / "limner" / "assets" / "samples"


def seconds(command: Sequence[str], *, source: Path) -> float:
    """Run Python with the packages of a checkout; the time from start to end."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": str(source / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    taken = time.perf_counter() - start
    if done.returncode != 0:
        sys.exit(done.stderr)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path, help="an older checkout")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images = [value for name in ("cat", "beach") for value in ("-i", str(SAMPLES / f"{name}.png"))]
        edit = ["-m", "limner", "edit", "use the background of image 2", *images, "--seed", "1"]
        edit += ["-o", str(Path(folder) / "out.png")]
        cases = {"import torch": (["-c", "import torch"], ROOT), "limner edit": (edit, ROOT)}
        if args.before is not None:
            cases["limner edit before"] = (edit, args.before.resolve())
        taken: dict[str, list[float]] = {name: [] for name in cases}
        for number in range(args.rounds + 1):
            for name, (command, source) in cases.items():
                found = seconds(command, source=source)
                if number:
                    taken[name].append(found)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    for name, value in medians.items():
        print(f"{name:20} {value:6.2f} s {value / medians['import torch']:6.2f}x")
    report = json.dumps(
        {
            "seconds": {name: [round(value, 3) for value in values] for name, values in taken.items()},
            "times_import_torch": {name: round(value / medians["import torch"], 3) for name, value in medians.items()},
            "machine": machine(),
        }
    )
    if args.output is not None:
        args.output.write_text(report + "\n")
    print(report)


if __name__ == "__main__":
    main()
