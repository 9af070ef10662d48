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

__all__ = ["BatchProgress", "print_result"]


def print_result(args: argparse.Namespace, found: Mapping[str, Any], line: str) -> None:
    """Print one JSON object with --json, else the line."""
    print(json.dumps(found) if args.json else line)


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
