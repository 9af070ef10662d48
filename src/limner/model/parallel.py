"""One transformer on several devices: what each process keeps and computes, and what they tell each other.

All processes make the same calls with the same inputs and get the same results. Two ways to divide the work:

- ``tensor``: each process has 1/n of the heads and of the MLP. Projections are cut by output features, those back to the
  stream by input features, and what they give is summed over the processes: four sums a double-stream block and one a
  single-stream block, each as large as the tokens that it is of. K/V of references are those of the process's heads, so
  each keeps 1/n of them. Modulation, embedders and the last layer are whole everywhere.
- ``sequence``: each process has all weights and 1/n of the text and image tokens. Keys and values of a layer are gathered
  before its attention; no other part of a block sees more than one token. References are divided in the same way while they
  are prefilled, and their K/V, gathered for attention anyway, are whole everywhere.

Weights are cut by `parallelize_module` with a style of our own, since its column style cuts a matrix in one piece and the
matrices here are several in one: a gated MLP has two halves, and a single-stream block q, k, v and both halves. What is cut
is plain tensors and not DTensors: products of parts, int8 and the kernels in C take nothing else.

Shapes: B batch, S sequence, H heads, D head dimension, weight (N, K). Knows torch and the geometry; who starts processes
is elsewhere (`limner.ranks`). Records no gradients.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from limner.config import TransformerConfig
from limner.errors import InvalidRequest, RemoteError
from limner.model.arithmetic import Linear, fast_dtype
from limner.model.attention import choose_kernel
from limner.model.int8 import Int8Linear
from limner.model.lora import Kronecker, LowRank, Update
from limner.model.rope import Rope
from limner.model.transformer import Transformer

__all__ = ["MODES", "Cut", "Parallel", "TokenSlices", "agree_on_arithmetic", "asking", "check_mode", "cuts", "divide"]

MODES = ("tensor", "sequence")
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where a matrix (N, K) is cut: along N or K, each of the blocks that stand in it by itself."""

    dim: int
    blocks: tuple[int, ...]

    def of(self, x: Tensor, *, rank: int, size: int) -> Tensor:
        """The part of process `rank` of `size`, contiguous: a view where it is one piece of rows, else a copy."""
        parts = [block.chunk(size, self.dim)[rank] for block in torch.split(x, list(self.blocks), self.dim)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)).contiguous()


def cuts(config: TransformerConfig) -> dict[str, Cut]:
    """The matrices that are cut in tensor mode, by patterns of their names; all others are whole everywhere."""
    width, mlp = config.width, config.mlp_width
    rows, columns = Cut(dim=0, blocks=(width,)), Cut(dim=1, blocks=(width,))
    double = {
        "attn": dict.fromkeys(("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"), rows)
        | dict.fromkeys(("to_out.0", "to_add_out"), columns)
    }
    for name in ("ff", "ff_context"):
        double[name] = {"linear_in": Cut(dim=0, blocks=(mlp, mlp)), "linear_out": Cut(dim=1, blocks=(mlp,))}
    found = {f"transformer_blocks.*.{part}.{name}": cut for part, of in double.items() for name, cut in of.items()}
    single = "single_transformer_blocks.*.attn"
    found[f"{single}.to_qkv_mlp_proj"] = Cut(dim=0, blocks=(width, width, width, mlp, mlp))
    found[f"{single}.to_out"] = Cut(dim=1, blocks=(width, mlp))
    return found


class Parallel:
    """This process among those that run a model together: `rank` of `size`, and the talk between them.

    `mode` is one of `MODES`, `mesh` has one axis. Whatever is called here has to be called by all processes, in the same
    order. Raises `RemoteError` if one of the others ended.
    """

    def __init__(self, mode: str, mesh: DeviceMesh) -> None:
        check_mode(mode)
        self.mode, self.mesh = mode, mesh
        self.rank, self.size = mesh.get_local_rank(), mesh.size()

    @property
    def shard(self) -> tuple[int, int] | None:
        """(rank, size) where weights and K/V are cut, else None."""
        return (self.rank, self.size) if self.mode == "tensor" else None

    def check(self, config: TransformerConfig) -> None:
        """Raises `InvalidRequest` unless the model can be cut into so many equal parts."""
        if self.mode != "tensor":
            return
        counts = {"num_heads": config.num_heads, "mlp_width": config.mlp_width}
        for name, value in counts.items():
            if value % self.size:
                common = math.gcd(*counts.values())
                allowed = [str(n) for n in range(1, common + 1) if not common % n]
                raise InvalidRequest(
                    "parallel",
                    f"{name}={value} cannot be divided by {self.size} processes; allowed for tensor: {', '.join(allowed)}; "
                    "start as many (torchrun --nproc-per-node), or use sequence",
                )

    # weights

    def cut(self, name: str, config: TransformerConfig) -> Cut | None:
        """How the matrix of a name is cut; None for what is whole here."""
        if self.mode != "tensor":
            return None
        return next((cut for pattern, cut in cuts(config).items() if fnmatchcase(name, pattern)), None)

    def own(self, name: str, tensor: Tensor, config: TransformerConfig) -> Tensor:
        """This process's part of a tensor of the whole transformer's state dict."""
        module, _, kind = name.rpartition(".")
        cut = self.cut(module, config)
        if cut is None or (kind == "weight_scale" and cut.dim == 1):  # a scale of rows, and rows are whole
            return tensor
        return cut.of(tensor, rank=self.rank, size=self.size)

    def whole_shape(self, name: str, shape: tuple[int, int], config: TransformerConfig) -> tuple[int, int]:
        """The (N, K) of the whole matrix of which this process has a part of `shape`."""
        cut = self.cut(name, config)
        if cut is None:
            return shape
        return (shape[0] * self.size, shape[1]) if cut.dim == 0 else (shape[0], shape[1] * self.size)

    def own_update(self, name: str, update: Update, config: TransformerConfig) -> Update:
        """This process's part of what a LoRA adds to a matrix. Raises `InvalidRequest` for what cannot be cut."""
        cut = self.cut(name, config)
        if cut is None:
            return update
        if isinstance(update, Kronecker):
            raise InvalidRequest(
                "lora",
                f"{name} has a LoKr update, which cannot be cut for parallel='tensor'; use 'sequence', or one process",
            )
        assert isinstance(update, LowRank)
        down, up = update.down, update.up
        if cut.dim == 0:
            up = cut.of(up, rank=self.rank, size=self.size)
        else:
            down = cut.of(down, rank=self.rank, size=self.size)
        return LowRank(down=down, up=up, scale=update.scale)

    # talk

    def told(self, value: _T) -> list[_T]:
        """The value of each process, by rank. For small Python values."""
        found: list[Any] = [None] * self.size
        with asking():
            dist.all_gather_object(found, value, group=self.mesh.get_group())
        return found

    def decided(self, value: _T) -> _T:
        """The value of process 0."""
        return self.told(value)[0]

    def check_same(self, values: Mapping[str, object]) -> None:
        """Raises `InvalidRequest` in every process unless all have equal values, by field; each with a short `repr`."""
        first, *others = self.told(dict(values))
        for rank, other in enumerate(others, start=1):
            for field in first | other:
                if first.get(field) != other.get(field):
                    raise InvalidRequest(
                        field,
                        f"process 0 has {first.get(field)!r}, process {rank} {other.get(field)!r}; give all processes of a "
                        "parallel model the same",
                    )

    def of_first(self, x: Tensor) -> Tensor:
        """The tensor of process 0, of the same shape and dtype everywhere."""
        x = x.contiguous().clone()
        with asking():
            dist.broadcast(x, group=self.mesh.get_group(), group_src=0)
        return x


def check_mode(mode: str) -> None:
    """Raises `InvalidRequest` unless it is one of `MODES`."""
    if mode not in MODES:
        raise InvalidRequest("parallel", f"{mode!r} is not one of None, {', '.join(map(repr, MODES))}")


@contextlib.contextmanager
def asking() -> Iterator[None]:
    """Around talk with other processes: `RemoteError` if one is not there any more."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RemoteError(
            f"parallel: another process of this model ended or cannot be reached ({reason}); see what it said, and start "
            "all again"
        ) from error


class Cutting(ParallelStyle):
    """A style of `parallelize_module` that leaves a `Linear` or `Int8Linear` with this process's part of its weight."""

    def __init__(self, cut: Cut) -> None:
        self.cut = cut

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, (Linear, Int8Linear))
        place = {"rank": device_mesh.get_local_rank(), "size": device_mesh.size()}
        weight = self.cut.of(module.weight.detach(), **place)
        if isinstance(module, Int8Linear):
            module.weight = weight
            if self.cut.dim == 0:
                module.weight_scale = self.cut.of(module.weight_scale, **place)
        else:
            module.weight = nn.Parameter(weight, requires_grad=False)
        module.out_features, module.in_features = weight.shape
        if self.cut.dim == 1:
            group = device_mesh.get_group()

            def total(module: nn.Module, args: Any, product: Tensor) -> Tensor:
                _check_no_gradient(product)
                with asking():
                    dist.all_reduce(product, group=group)
                return product

            module.register_forward_hook(total)
        return module


def divide(transformer: Transformer, parallel: Parallel) -> None:
    """Leaves a transformer, perhaps without memory yet, with this process's part. Raises `InvalidRequest`."""
    parallel.check(transformer.config)
    if parallel.mode == "tensor":
        plan = {name: Cutting(cut) for name, cut in cuts(transformer.config).items()}
        parallelize_module(transformer, parallel.mesh, plan)  # type: ignore[arg-type]
    transformer.parallel = parallel


def agree_on_arithmetic(transformer: Transformer, parallel: Parallel) -> None:
    """Gives all processes the attention kernel and the kind of products that process 0 would choose.

    Both may be measured, and machines may differ. A kernel that not all have is none for any.
    """
    device, dtype = transformer.device, transformer.dtype
    found = parallel.told((choose_kernel(device, dtype, transformer.config.head_dim), fast_dtype(device, dtype)))
    kernel, products = found[0]
    if any(other != kernel for other, _ in found):
        kernel = "chunked" if products == dtype else "chunked_float32"
    transformer.kernel = kernel
    transformer.use_arithmetic(products)


class _Slice(NamedTuple):
    start: int
    length: int


class TokenSlices:
    """Which tokens of some streams each process has in sequence mode: of every stream one piece, the first ones the longer.

    `lengths` are those of the streams in their order in the joint sequence: (txt, img), or (ref,). Raises `InvalidRequest`
    for a stream that has not a token for each process.
    """

    def __init__(self, parallel: Parallel, lengths: Sequence[int]) -> None:
        if min(lengths) < parallel.size:
            raise InvalidRequest(
                "parallel",
                f"a stream of {min(lengths)} tokens (all: {', '.join(map(str, lengths))}) cannot be divided among "
                f"{parallel.size} processes; use fewer processes, or tensor",
            )
        self.parallel, self.lengths = parallel, tuple(lengths)
        self._of_stream = [_slices(length, parallel.size) for length in lengths]
        self._mine = [slices[parallel.rank] for slices in self._of_stream]

    def own(self, x: Tensor, stream: int) -> Tensor:
        """This process's tokens (B, S_own, C) of a whole stream (B, S, C)."""
        return x.narrow(1, *self._mine[stream])

    def rope(self, rope: Rope) -> Rope:
        """The table of this process's tokens, of that of the joint sequence."""
        starts = [sum(self.lengths[:i]) for i in range(len(self.lengths))]
        pieces = [(start + mine.start, mine.length) for start, mine in zip(starts, self._mine, strict=True)]
        return Rope(*(torch.cat([table.narrow(0, *piece) for piece in pieces]) for table in rope))

    def gather(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, S, H, D) of all tokens; the own ones of each process stand together, in their order."""
        lengths = [sum(slices[rank].length for slices in self._of_stream) for rank in range(self.parallel.size)]
        k, v = self._joined(torch.stack([k, v]), lengths, dim=2).unbind(0)
        return k, v

    def whole(self, x: Tensor, stream: int) -> Tensor:
        """The inverse of `own`."""
        return self._joined(x, [piece.length for piece in self._of_stream[stream]], dim=1)

    def _joined(self, x: Tensor, lengths: Sequence[int], *, dim: int) -> Tensor:
        """Pieces of these lengths along an axis, in one message each: shorter ones are filled up."""
        _check_no_gradient(x)
        shape = list(x.shape)
        shape[dim] = max(lengths)
        if x.shape[dim] < shape[dim]:
            filled = x.new_zeros(shape)
            filled.narrow(dim, 0, x.shape[dim]).copy_(x)
            x = filled
        found = [x.new_empty(shape) for _ in lengths]
        with asking():
            dist.all_gather(found, x.contiguous(), group=self.parallel.mesh.get_group())
        return torch.cat([part.narrow(dim, 0, length) for part, length in zip(found, lengths, strict=True)], dim)


def _slices(length: int, size: int) -> list[_Slice]:
    """`length` tokens in `size` pieces whose lengths differ by one at most."""
    short, longer = divmod(length, size)
    return [_Slice(rank * short + min(rank, longer), short + (rank < longer)) for rank in range(size)]


def _check_no_gradient(x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise InvalidRequest("parallel", "a model on several devices records no gradients; use torch.no_grad()")
