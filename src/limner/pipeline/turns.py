"""Networks in memory by turns, without a number as the limit: what diffusers calls offloading, on a CPU.

The weights that are mapped from files leave memory while another network works, or a layer as soon as it has run.
Nothing is refused for it, and no bit changes. Knows no pipeline.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from limner.memory.residency import Residency

__all__ = ["Turns"]


class Turns(Residency):
    """One network stays in memory at a time; with `by_layer` the layers of that one leave too, one after another."""

    def __init__(self, *, by_layer: bool) -> None:
        super().__init__(sys.maxsize)
        self._by_layer = by_layer

    @contextmanager
    def working(self, network: nn.Module, *, growth: int) -> Iterator[None]:
        """Release what other networks hold, and with `by_layer` let only the layer that runs stay."""
        before = self._resident
        for other in self._networks:
            if other is not network:
                self.release(other)
        self._resident = frozenset() if self._by_layer and self._networks.get(network) else None
        try:
            yield
        finally:
            self._resident = before
