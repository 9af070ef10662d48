"""The cost in quality of narrower formats: the evaluation once for each, with the same cases and seeds; a table in docs/numerics.md.

The last line is one JSON object: by format and task, PSNR in dB and success rate.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from evaluate import TASKS

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "numerics.md"
MARKS = ("<!-- quantization -->", "<!-- end of quantization -->")
FORMATS = {
    "float32": (),
    "bfloat16": ("--dtype", "bfloat16"),
    "float32, K/V in int8": ("--kv-cache-dtype", "int8"),
    "float32, K/V in fp8": ("--kv-cache-dtype", "fp8"),
    "bfloat16, K/V in int8": ("--dtype", "bfloat16", "--kv-cache-dtype", "int8"),
    "bfloat16, int8 weights and activations": ("--dtype", "bfloat16", "--quantize", "int8"),
    "the same, K/V in int8": ("--dtype", "bfloat16", "--quantize", "int8", "--kv-cache-dtype", "int8"),
    "bfloat16, int8 text encoder": ("--dtype", "bfloat16", "--quantize-text"),
    "bfloat16, int8 transformer and text encoder": ("--dtype", "bfloat16", "--quantize", "int8", "--quantize-text"),
}


def table(results: dict[str, dict[str, Any]], cases: int) -> str:
    """PSNR and success by task, as Markdown."""
    tasks = list(next(iter(results.values())))
    lines = [
        f"| PSNR in dB / success, {cases} cases a task | " + " | ".join(tasks) + " |",
        "|---" * (len(tasks) + 1) + "|",
    ]
    for name, by_task in results.items():
        cells = [f"{by_task[task]['psnr']:.2f} / {by_task[task]['success']:.0%}" for task in tasks]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200, help="cases a task")
    parser.add_argument("--write", action="store_true", help="put the table into docs/numerics.md")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="-- and more for evaluate.py")
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    more = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    if "--tasks" not in more:
        more = ["--tasks", *TASKS, *more]
    for name, options in FORMATS.items():
        words = [sys.executable, str(HERE / "evaluate.py"), "--cases", str(args.cases), "--nearest", "0", *options]
        done = subprocess.run([*words, *more], stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])["tasks"]
        print(name, {task: (row["psnr"], row["success"]) for task, row in results[name].items()}, flush=True)
    if args.write:
        middle = re.compile(f"{MARKS[0]}.*{MARKS[1]}", re.DOTALL)
        PAGE.write_text(middle.sub(f"{MARKS[0]}\n{table(results, args.cases)}\n{MARKS[1]}", PAGE.read_text()))
    print(json.dumps({"cases": args.cases, "formats": results}))


if __name__ == "__main__":
    main()
