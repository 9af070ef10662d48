"""A bar of the parts of a call, for people: on a terminal, and in notebooks. Knows no pipeline."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from limner.pipeline.progress import Progress, silent

__all__ = ["LOADING", "ProgressBar", "reporting"]

_PARTS = {"text": 1, "references": 1, "step": 4, "decode": 1}
"""Parts of a call in their order, and their length on a bar. That of "step" is replaced by the number of steps."""
LOADING = {"load": 3, **_PARTS}
"""Those of a call that loads its model first."""


class ProgressBar:
    """One bar over all parts; it is cleared when it is closed."""

    def __init__(self, parts: Mapping[str, int] = _PARTS) -> None:
        self._parts = dict(parts)
        self._bar: Any = _bar_class()(total=sum(self._parts.values()), leave=False)

    def __call__(self, part: str, done: int, of: int) -> None:
        if part == "step" and of != self._parts["step"]:
            self._parts["step"] = of
            self._bar.total = sum(self._parts.values())
        names = list(self._parts)
        before = sum(self._parts[name] for name in names[: names.index(part)])
        self._bar.set_description(part, refresh=False)
        self._bar.n = before + self._parts[part] * done // max(of, 1)
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


def _is_notebook() -> bool:
    return "ipykernel" in sys.modules


def _bar_class() -> Any:
    if _is_notebook() and importlib.util.find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm
    else:
        from tqdm import tqdm  # type: ignore[assignment]
    return tqdm


@contextlib.contextmanager
def reporting(progress: Progress | bool | None, *, parts: Mapping[str, int] = _PARTS) -> Iterator[Progress]:
    """Give what a call reports to: the caller's own; a bar for True, and for None where somebody looks; else nothing."""
    if callable(progress):
        yield progress
    elif progress is False or (progress is None and not (_is_notebook() or sys.stderr.isatty())):
        yield silent
    else:
        with contextlib.closing(ProgressBar(parts)) as bar:
            yield bar
