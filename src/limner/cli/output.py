"""What commands print: one JSON object or lines, and progress on stderr.

Owns bars and the words around them. Knows nothing of models.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

__all__ = ["BatchProgress", "DrawProgress", "print_result"]


def print_result(args: argparse.Namespace, found: Mapping[str, Any], line: str) -> None:
    """Print one JSON object with --json, else the line."""
    print(json.dumps(found) if args.json else line)


class DrawProgress:
    """One bar over load, text, references, steps and decode; silent unless stderr is a terminal."""

    def __init__(self, *, num_inference_steps: int, references: bool, silent: bool = False) -> None:
        from tqdm import tqdm

        self._weights = {
            "load": 3,
            "text": 1,
            "references": 1 if references else 0,
            "step": num_inference_steps,
            "decode": 1,
        }
        self._bar = tqdm(total=sum(self._weights.values()), disable=silent or not sys.stderr.isatty(), leave=False)

    def __call__(self, part: str, done: int, of: int) -> None:
        names = list(self._weights)
        before = sum(self._weights[name] for name in names[: names.index(part)])
        self._bar.set_description(part)
        self._bar.n = before + self._weights[part] * done // max(of, 1)
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


class BatchProgress:
    """A bar over rows on a terminal; elsewhere a line every `SECONDS`."""

    SECONDS = 10.0

    def __init__(self) -> None:
        self._bar: Any = None
        self._start = self._reported = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, of: int, failed: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._start = done, now
        if sys.stderr.isatty():
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=of, initial=done, unit="row", leave=False)
            self._bar.set_postfix(failed=failed, refresh=False)
            self._bar.n = done
            self._bar.refresh()
        elif now - self._reported >= self.SECONDS:
            self._reported = now
            rate = (done - self._first) / max(now - self._start, 1e-6)
            print(f"limner: {done} of {of} rows, {failed} failed, {rate:.2f} a second", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
