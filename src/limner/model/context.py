"""How a transformer runs, and the context that all blocks of one pass share. Knows nothing of weights or steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from limner.model.attention import KeyWeights
from limner.model.rope import Rope
from limner.model.shards import Ranks, TokenSlices
from limner.tokens import TokenLayout

__all__ = ["BlockContext", "Execution", "InPlace", "Staging"]


class Staging(Protocol):
    """Bring the weights of blocks into memory before they run, and take them away after (`limner.memory.residency`)."""

    def visit(self, layers: Iterable[nn.Module], /) -> Iterator[nn.Module]:
        """Yield the layers in order, each with its weights in memory until the next one is asked for."""
        ...


class InPlace:
    """The staging of weights that are always in memory."""

    def visit(self, layers: Iterable[nn.Module], /) -> Iterator[nn.Module]:
        return iter(layers)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a transformer runs: all that its weights do not determine."""

    kernel: str | None = None
    """Attention kernel by name (`limner.model.attention.KERNELS`); None lets the device choose."""
    staging: Staging = field(default_factory=InPlace)
    ranks: Ranks = field(default_factory=Ranks.single)
    """The processes that the model is divided among (`limner.model.divide`)."""
    graphs: Callable[..., Tensor] | None = None
    """Calls the transformer in a step (`limner.model.graphs`); None: it is called itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockContext:
    """Shared by all blocks in one pass over tokens: the places of the tokens, and how attention runs."""

    rope: Rope
    """The rotary table of this process's tokens, in the order of `layout`."""
    layout: TokenLayout
    kernel: str | None
    slices: TokenSlices
    weights: KeyWeights | list[KeyWeights | None] | None = None
    """Weights of the keys of references, of all images or of each; None: all are 1."""
