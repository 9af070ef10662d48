"""Updates that a LoRA adds to a matrix, and the two ways to add them: a branch alongside the product, or a sum of weights.

Shapes: x (..., K), a matrix (N, K), its product (..., N); R ranks. A branch reads the same activations as its matrix and
adds to the product, whatever the format of the matrix. So it also works with int8 weights, to which small updates cannot
be added. A sum of weights is computed in float32 and rounded once. Knows nothing of files, names of adapters or pipelines.

Every kind of update has `rows`: those of its rows that a part of a fused matrix has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from limner.model.arithmetic import Linear
from limner.model.int8 import Int8Linear, QuantizedRows

__all__ = ["Branches", "Dense", "Hadamard", "Kronecker", "LowRank", "Update", "added_to", "matrix_shapes"]

_ROWS_AT_ONCE = 2048
"""Rows of a Hadamard product that are in memory at a time: in float32, 100 MB of klein-9b's widest matrix."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class LowRank:
    """scale * up @ down, with down (R, K) and up (N, R)."""

    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"down": self.down, "up": self.up}

    def add_to(self, weight: Tensor, strength: float) -> None:
        """Add `strength` times itself to a float32 or float64 matrix (N, K), in place."""
        weight.addmm_(self.up.to(weight) * (strength * self.scale), self.down.to(weight))

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> LowRank:
        """Return the same of other tensors, by their names."""
        return LowRank(**tensors, scale=self.scale)

    def rows(self, first: int, num: int) -> LowRank:
        """Return `num` of its rows, from `first` on and around the end."""
        return replace(self, up=_rows(self.up, first, num))


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Kronecker:
    """scale * rows of kron(left, right), with left (L, M) and right (P, Q), hence (L P, M Q) in all (LoKr).

    The update has `num_rows` rows, from `first_row` on and around the end: its matrix may be a part of a fused one.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0
    first_row: int = 0
    num_rows: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_rows, self.left.shape[1] * self.right.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}

    def add_to(self, weight: Tensor, strength: float) -> None:
        """Add `strength` times itself to a float32 or float64 matrix (N, K), in place."""
        whole = torch.kron(self.left.to(weight) * (strength * self.scale), self.right.to(weight))
        weight.add_(whole.roll(-self.first_row, 0)[: self.num_rows])

    def rows(self, first: int, num: int) -> Kronecker:
        """Return `num` of its rows, from `first` on; around the end only of all of them."""
        return replace(self, first_row=self.first_row + first, num_rows=num)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Hadamard:
    """scale * (up_1 @ down_1) * (up_2 @ down_2), elementwise between the products (LoHa): down (R, K), up (N, R)."""

    down_1: Tensor
    up_1: Tensor
    down_2: Tensor
    up_2: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.up_1.shape[0], self.down_1.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"down_1": self.down_1, "up_1": self.up_1, "down_2": self.down_2, "up_2": self.up_2}

    def add_to(self, weight: Tensor, strength: float) -> None:
        """Add `strength` times itself to a float32 or float64 matrix (N, K), in place."""
        down_1, down_2 = self.down_1.to(weight), self.down_2.to(weight)
        for first in range(0, weight.shape[0], _ROWS_AT_ONCE):
            part = slice(first, first + _ROWS_AT_ONCE)
            one, two = self.up_1[part].to(weight) @ down_1, self.up_2[part].to(weight) @ down_2
            weight[part].addcmul_(one, two, value=strength * self.scale)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Hadamard:
        """Return the same of other tensors, by their names."""
        return Hadamard(**tensors, scale=self.scale)

    def rows(self, first: int, num: int) -> Hadamard:
        """Return `num` of its rows, from `first` on and around the end."""
        return replace(self, up_1=_rows(self.up_1, first, num), up_2=_rows(self.up_2, first, num))


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Dense:
    """A difference of weights (N, K) itself."""

    weight: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def add_to(self, weight: Tensor, strength: float) -> None:
        """Add `strength` times itself to a float32 or float64 matrix (N, K), in place."""
        weight.add_(self.weight.to(weight), alpha=strength * self.scale)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Dense:
        """Return the same of other tensors, by their names."""
        return Dense(**tensors, scale=self.scale)

    def rows(self, first: int, num: int) -> Dense:
        """Return `num` of its rows, from `first` on and around the end."""
        return replace(self, weight=_rows(self.weight, first, num))


def _rows(matrix: Tensor, first: int, num: int) -> Tensor:
    if first + num <= matrix.shape[0]:
        return matrix[first : first + num]
    return matrix.roll(-first, 0)[:num]


Update = LowRank | Kronecker | Hadamard | Dense
Terms = Sequence[tuple[Update, float]]
"""Updates of one matrix, each with its strength."""


def matrix_shapes(transformer: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the matrices that can have updates: name and (N, K)."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in transformer.named_modules()
        if isinstance(module, (Linear, Int8Linear))
    }


@torch.no_grad()
def added_to(weight: Tensor, terms: Terms) -> Tensor:
    """Return a new matrix (N, K): `weight` plus its updates, summed in float32 (or wider) and rounded once."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for update, strength in terms:
        update.add_to(wide, strength)
    return wide.to(weight.dtype)


class _Branch:
    """The updates of one matrix, prepared for its products: all low-rank updates are joined into one, all differences too.

    A Hadamard product is made again for each use, since as a matrix it would take as much memory as the weights: for
    thousands of tokens that is a small part of the product with them.
    """

    @torch.no_grad()
    def __init__(self, terms: Terms, *, device: torch.device, dtype: torch.dtype) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        low = [(update, strength) for update, strength in terms if isinstance(update, LowRank)]
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self._down_t: Tensor | None = None
        if low:
            # one factor takes strength and scale; it is multiplied in float32 or wider and rounded once
            ups = [u.up.to(torch.promote_types(u.up.dtype, wide)) * (strength * u.scale) for u, strength in low]
            self._down_t = torch.cat([u.down.to(**place) for u, _ in low]).t()
            self._up_t = torch.cat([up.to(**place) for up in ups], dim=1).t()
        self._kronecker = [
            (
                u,
                (u.left.to(torch.promote_types(u.left.dtype, wide)) * (strength * u.scale)).to(**place),
                u.right.to(**place),
            )
            for u, strength in terms
            if isinstance(u, Kronecker)
        ]
        self._hadamard = [
            (u.with_tensors({name: value.to(device) for name, value in u.tensors.items()}), strength)
            for u, strength in terms
            if isinstance(u, Hadamard)
        ]
        self._wide, self._dense = wide, None
        if dense := [(u, strength) for u, strength in terms if isinstance(u, Dense)]:
            whole = torch.zeros(dense[0][0].shape, dtype=wide, device=device)
            for u, strength in dense:
                u.add_to(whole, strength)
            self._dense = whole.to(dtype)

    def add(self, product: Tensor, x: Tensor, rows: slice) -> None:
        """Add the updates to `product`, the rows `rows` of the matrix times x, in place."""
        x, out = x.reshape(-1, x.shape[-1]), product.view(-1, product.shape[-1])
        if self._down_t is not None:
            out.addmm_(x @ self._down_t, self._up_t[:, rows])
        for update, left, right in self._kronecker:
            # kron(A, B) x = A X B^T for x laid out as X (M, Q): far fewer operations than with the whole matrix
            both = left @ (x.reshape(-1, left.shape[1], right.shape[1]) @ right.t())
            whole = both.flatten(1).roll(-update.first_row, 1)[:, : update.num_rows]
            out.add_(whole[:, rows])
        if self._dense is not None:
            out.addmm_(x, self._dense[rows].t())
        for one, strength in self._hadamard:
            first, last, _ = rows.indices(one.shape[0])
            for start in range(first, last, _ROWS_AT_ONCE):
                num = min(_ROWS_AT_ONCE, last - start)
                made = torch.zeros(num, x.shape[-1], dtype=self._wide, device=x.device)
                one.rows(start, num).add_to(made, strength)
                out[:, start - first : start - first + num].addmm_(x, made.to(x.dtype).t())


class Branches:
    """Updates that run alongside the products of a transformer's matrices, until `remove`, and from `attach` on again.

    They are in no state dict.
    """

    def __init__(
        self, transformer: nn.Module, updates: Mapping[str, Terms], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._modules = {name: transformer.get_submodule(name) for name in updates}
        made = {name: _Branch(terms, device=device, dtype=dtype) for name, terms in updates.items()}
        self._hooks = [(self._modules[name], _hook(branch)) for name, branch in made.items()]
        self._handles: list[RemovableHandle] = []
        self.attach()  # last: if memory runs out before, the network is unchanged

    def are_in(self, transformer: nn.Module) -> bool:
        """False if another module has taken the place of a matrix that has a branch."""
        try:
            return all(transformer.get_submodule(name) is module for name, module in self._modules.items())
        except AttributeError:
            return False

    def attach(self) -> None:
        """Run alongside again after `remove`, by the same hooks: what was made for these, as CUDA graphs, is used again."""
        # before the hook that sums products over processes (`limner.model.shard_style`)
        for module, hook in self._hooks:
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))

    def remove(self) -> None:
        """Detach all branches."""
        while self._handles:
            self._handles.pop().remove()


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, (Linear, Int8Linear))
    return module.weight


def _hook(branch: _Branch) -> Callable[..., None]:
    def after(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], product: Tensor) -> None:
        x = args[0].source if isinstance(args[0], QuantizedRows) else args[0]
        rows = args[1] if len(args) > 1 else options.get("rows")
        branch.add(product, x, slice(None) if rows is None else rows)

    return after
