"""This process's place among those that run one model, what they send each other, and which part each of them has.

Two ways to divide a model (`MODES`) are described in `limner.model.divide`. `Ranks` and `TokenSlices` are null objects
for a model in one process: they return their arguments unchanged. `RankGroup` and `SlicedTokens` are for several
processes. All processes make the same calls in the same order.

Shapes: B batch, S sequence, C width, H heads, D head dimension. Knows torch and torch.distributed. Does not know the
transformer, nor who starts processes (`limner.ranks`). Records no gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from limner.errors import InvalidRequest, RemoteError, first_line
from limner.model.kv import LayerKV
from limner.model.rope import Rope

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "MODES",
    "MatrixShard",
    "RankGroup",
    "Ranks",
    "RecordedTokens",
    "SlicedTokens",
    "TokenSlices",
    "check_mode",
    "check_no_gradient",
    "peer_errors",
]

MODES = ("tensor", "sequence")
_T = TypeVar("_T")


class Ranks:
    """The place of a process that runs the whole model alone, and the base of `RankGroup`."""

    mode: str | None = None
    """How the model is divided, one of `MODES`; None: it is whole."""
    rank: int = 0
    size: int = 1

    @classmethod
    def single(cls) -> Ranks:
        """One process with the whole model."""
        return Ranks()

    @property
    def alone(self) -> bool:
        """True if the model is whole in this process."""
        return self.mode is None

    @property
    def shard(self) -> tuple[int, int] | None:
        """(rank, size) where weights and K/V are divided, else None."""
        return (self.rank, self.size) if self.mode == "tensor" else None

    @property
    def arithmetic(self) -> tuple[str, ...]:
        """What the division adds to `Transformer.arithmetic`."""
        return ()

    def token_slices(self, *lengths: int) -> TokenSlices:
        """The tokens of this process, of streams with these lengths."""
        return TokenSlices()

    def all_gather(self, value: _T) -> list[_T]:
        """Return the value of each process, by rank. For small Python values."""
        return [value]

    def broadcast(self, value: _T) -> _T:
        """Return the value of process 0. For small Python values."""
        return value

    def broadcast_tensor(self, x: Tensor) -> Tensor:
        """Return the tensor of process 0; it has the same shape and dtype in all."""
        return x

    def check_same(self, values: Mapping[str, object]) -> None:
        """Raise `InvalidRequest` in every process unless all have equal values, by field; each has a short `repr`."""


class RankGroup(Ranks):
    """One of several processes that run a model together. `mode` is one of `MODES`, `mesh` has one axis.

    Methods raise `RemoteError` if another process ended.
    """

    def __init__(self, mode: str, mesh: DeviceMesh) -> None:
        check_mode(mode)
        self.mode, self.mesh = mode, mesh
        self.rank, self.size = mesh.get_local_rank(), mesh.size()

    @property
    def arithmetic(self) -> tuple[str, ...]:
        return (f"{self.mode} parallel {self.size}",)

    def token_slices(self, *lengths: int) -> TokenSlices:
        return SlicedTokens(self, lengths) if self.mode == "sequence" else TokenSlices()

    def all_gather(self, value: _T) -> list[_T]:
        found: list[Any] = [None] * self.size
        with peer_errors():
            dist.all_gather_object(found, value, group=self.mesh.get_group())
        return found

    def broadcast(self, value: _T) -> _T:
        return self.all_gather(value)[0]

    def broadcast_tensor(self, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        with peer_errors():
            dist.broadcast(x, group=self.mesh.get_group(), group_src=0)
        return x

    def check_same(self, values: Mapping[str, object]) -> None:
        first, *others = self.all_gather(dict(values))
        for rank, other in enumerate(others, start=1):
            for field in first | other:
                if first.get(field) != other.get(field):
                    raise InvalidRequest(
                        field,
                        f"process 0 has {first.get(field)!r}, process {rank} {other.get(field)!r}; give all processes of a "
                        "parallel model the same",
                    )


class TokenSlices:
    """The tokens of a process that has all of them, and the base of `SlicedTokens`."""

    def own(self, x: Tensor, stream: int) -> Tensor:
        """Return this process's tokens (B, S_own, C) of the whole stream (B, S, C) with index `stream`."""
        return x

    def rope(self, rope: Rope) -> Rope:
        """Return the table of this process's tokens, from the table of the whole sequence."""
        return rope

    def gather(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, S, H, D) of all tokens, from those of this process."""
        return k, v

    def whole(self, x: Tensor, stream: int) -> Tensor:
        """Return the whole stream; the inverse of `own`."""
        return x


class RecordedTokens(TokenSlices):
    """The tokens of a process that has all of them; `kept` is called with the K/V of those at `places`, by layer."""

    def __init__(self, places: slice, kept: Callable[[LayerKV], None]) -> None:
        self._places, self._kept = places, kept

    def gather(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        # copies: k and v are views of the projections of all tokens
        self._kept(LayerKV(k[:, self._places].clone(), v[:, self._places].clone()))
        return k, v


class SlicedTokens(TokenSlices):
    """Each process has one contiguous piece of every stream; the first ranks have one token more where it is uneven.

    `lengths` are those of the streams in their order in the sequence: (txt, img), (txt, img, ref), or (ref,). Raises
    `InvalidRequest` for a stream with fewer tokens than processes.
    """

    def __init__(self, ranks: RankGroup, lengths: Sequence[int]) -> None:
        if min(lengths) < ranks.size:
            raise InvalidRequest(
                "parallel",
                f"a stream of {min(lengths)} tokens (all: {', '.join(map(str, lengths))}) cannot be divided among "
                f"{ranks.size} processes; use fewer processes, or tensor",
            )
        self.ranks, self.lengths = ranks, tuple(lengths)
        self._of_stream = [_slices(length, ranks.size) for length in lengths]
        self._mine = [slices[ranks.rank] for slices in self._of_stream]

    def own(self, x: Tensor, stream: int) -> Tensor:
        return x.narrow(1, *self._mine[stream])

    def rope(self, rope: Rope) -> Rope:
        starts = [sum(self.lengths[:i]) for i in range(len(self.lengths))]
        pieces = [(start + mine.start, mine.length) for start, mine in zip(starts, self._mine, strict=True)]
        return Rope(*(torch.cat([table.narrow(0, *piece) for piece in pieces]) for table in rope))

    def gather(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As the base; tokens are ordered by rank, and attention does not depend on the order of keys."""
        lengths = [sum(slices[rank].length for slices in self._of_stream) for rank in range(self.ranks.size)]
        k, v = self._joined(torch.stack([k, v]), lengths, dim=2).unbind(0)
        return k, v

    def whole(self, x: Tensor, stream: int) -> Tensor:
        return self._joined(x, [piece.length for piece in self._of_stream[stream]], dim=1)

    def _joined(self, x: Tensor, lengths: Sequence[int], *, dim: int) -> Tensor:
        """Join the pieces of all processes, which have these lengths along `dim`. Short ones are padded for the message."""
        check_no_gradient(x)
        shape = list(x.shape)
        shape[dim] = max(lengths)
        if x.shape[dim] < shape[dim]:
            padded = x.new_zeros(shape)
            padded.narrow(dim, 0, x.shape[dim]).copy_(x)
            x = padded
        found = [x.new_empty(shape) for _ in lengths]
        with peer_errors():
            dist.all_gather(found, x.contiguous(), group=self.ranks.mesh.get_group())
        return torch.cat([part.narrow(dim, 0, length) for part, length in zip(found, lengths, strict=True)], dim)


@dataclass(frozen=True, kw_only=True)
class MatrixShard:
    """How a matrix (N, K) is divided: along N (`dim` 0) or K (1), each of the `blocks` that it consists of by itself."""

    dim: int
    blocks: tuple[int, ...]

    def part(self, x: Tensor, *, rank: int, size: int) -> Tensor:
        """Return the part of process `rank` of `size`, contiguous: a view where it is one piece of rows, else a copy."""
        parts = [block.chunk(size, self.dim)[rank] for block in torch.split(x, list(self.blocks), self.dim)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)).contiguous()


class _Slice(NamedTuple):
    start: int
    length: int


def _slices(length: int, size: int) -> list[_Slice]:
    """Divide `length` tokens into `size` pieces whose lengths differ by one at most."""
    short, longer = divmod(length, size)
    return [_Slice(rank * short + min(rank, longer), short + (rank < longer)) for rank in range(size)]


def check_mode(mode: str) -> None:
    """Raise `InvalidRequest` unless `mode` is one of `MODES`."""
    if mode not in MODES:
        raise InvalidRequest("parallel", f"{mode!r} is not one of None, {', '.join(map(repr, MODES))}")


def check_no_gradient(x: Tensor) -> None:
    """Raise `InvalidRequest` if a gradient of `x` is recorded: messages between processes have none."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise InvalidRequest("parallel", "a model on several devices records no gradients; use torch.no_grad()")


@contextlib.contextmanager
def peer_errors() -> Iterator[None]:
    """Raise `RemoteError` in place of the error of torch.distributed when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise RemoteError(
            f"parallel: another process of this model ended or cannot be reached ({first_line(error)}); see what it said, "
            "and start all again"
        ) from error
