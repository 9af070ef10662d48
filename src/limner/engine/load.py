"""Loads a pipeline in a thread of its own. Knows nothing of how it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from limner.pipeline import Pipeline

__all__ = ["load_in_thread"]


def load_in_thread(load: Callable[[], Pipeline]) -> Pipeline:
    """Return what `load` returns, called in a thread that ends with it: an engine on a CPU should draw with this.

    OpenMP keeps a team of threads for every thread that has computed. Where all teams together have more threads than
    the machine has cores, libgomp's sleep instead of spinning while they wait for work, and small models take twice as
    long (docs/log.md). After the loading thread has ended, the engine's team is the only one.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="limner-load") as executor:
        return executor.submit(load).result()
