"""Batches of a few rows for tests: a manifest, a run of it in this process, and its results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limner import Pipeline
from limner.batch import Batch, BatchOptions, BatchSummary

ROWS = [
    {"id": "one", "prompt": "make it blue", "references": ["a.png"], "size": "64x64"},
    {"id": "two", "prompt": "put b into a", "references": ["a.png", "b.png"], "size": "64x80", "seed": 7},
    {"id": "three", "prompt": "a dog", "size": "64x64", "steps": 2},
    {"id": "four", "prompt": "make it red", "references": ["same.png"], "size": "64x64"},
    {"id": "five", "prompt": "put b into a, red", "references": ["a.png", "b.png"], "size": "64x64"},
    {"id": "six", "prompt": "put b into a, big", "references": ["a.png", "b.png"], "size": "64x80"},
]


def write(folder: Path, rows: list[dict[str, Any]] | bytes) -> None:
    data = rows if isinstance(rows, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "rows.jsonl").write_bytes(data)


def run(
    folder: Path,
    pipe: Pipeline,
    progress: Callable[[int, int, int], None] | None = None,
    *,
    out: str = "out",
    **options: Any,
) -> BatchSummary:
    options |= {"manifest": folder / "rows.jsonl", "folder": folder / out}
    with Batch(BatchOptions(**options), progress=progress) as batch:
        pipe.store = batch.store
        batch.draw(pipe, batch.plan(pipe))
        return batch.finish()


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]


def stop_after(rows: int) -> Callable[[int, int, int], None]:
    """As a kill between two rows: what is on disk is what was there."""

    def progress(done: int, of: int, failed: int) -> None:
        if done == rows:
            raise KeyboardInterrupt

    return progress
