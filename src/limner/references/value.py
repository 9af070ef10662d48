"""References: what is kept of an ordered list of reference pictures, as an immutable value with an identity.

Checks that layers, reports and key match. Knows nothing of prompts, pipelines or stores; the bytes of a file are
`pack`'s.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner.errors import InvalidRequest
from limner.files import atomic_write
from limner.grid import PIXELS, num_tokens
from limner.images import ReferenceReport
from limner.model.kv import KV_FORMATS, LayerKV, ReferenceKV, quantize_layer
from limner.model.transfer import to_device, to_host
from limner.references.key import reference_key
from limner.references.pack import MALFORMED, DamagedPack, PackIdentity, read_pack, write_pack
from limner.tokens import reference_ids

__all__ = ["References", "position_ids"]


def position_ids(reports: Sequence[ReferenceReport]) -> Tensor:
    """Return the positions (S_ref, 4) of the tokens of references, as processed."""
    sizes = [(report.processed_size, report.origin) for report in reports]
    return reference_ids(
        [(height // PIXELS, width // PIXELS) for (width, height), _ in sizes],
        [(y // PIXELS, x // PIXELS) for _, (x, y) in sizes],
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class References(ReferenceKV):
    """The K/V, or a joint model's tokens, of an ordered list of references, with their identity. Never changed.

    `key` is the content key. `weights` is the digest of the transformer and autoencoder that made it (of tokens: of the
    autoencoder), `kernel` names the arithmetic and `dtype` its dtype. `quantization` is None, "int8" or "fp8".
    `reports` say for each reference how it was processed. `prefill_seconds` is the time that the prefill took. `shard`
    is None for all heads; (rank, size) for one of `size` equal parts of them, in their order, as a process of a tensor
    parallel model holds it.
    """

    key: str
    weights: str
    kernel: str
    dtype: torch.dtype
    quantization: str | None = None
    reports: tuple[ReferenceReport, ...]
    prefill_seconds: float = 0.0
    shard: tuple[int, int] | None = None

    @classmethod
    def make(
        cls,
        kv: ReferenceKV,
        *,
        weights: str,
        kernel: str,
        quantization: str | None,
        reports: tuple[ReferenceReport, ...],
        dtype: torch.dtype | None = None,
        prefill_seconds: float = 0.0,
        shard: tuple[int, int] | None = None,
    ) -> References:
        """Return the result of a prefill as References: quantized if asked for and not done yet, with its content key.

        `kernel` names the arithmetic that computed `kv`; `dtype` is that of K/V before they were quantized, by default
        theirs.
        """
        dtype = dtype or kv.layers[0][0].dtype
        layers = kv.layers
        if quantization is not None:
            layers = tuple(quantize_layer(x, quantization) if isinstance(x, LayerKV) else x for x in kv.kv)
        made = cls(
            layers=layers,
            key="",
            weights=weights,
            kernel=kernel,
            dtype=dtype,
            quantization=quantization,
            reports=reports,
            prefill_seconds=prefill_seconds,
            shard=shard,
        )
        return dataclasses.replace(made, key=made._key(shard))

    def __repr__(self) -> str:
        sizes = ", ".join(f"{width}x{height}" for width, height in self.sizes)
        kind = self.quantization or str(self.dtype).removeprefix("torch.")
        return (
            f"References({sizes}: {self.num_tokens} tokens, {self.nbytes / 2**20:.1f} MiB of {kind} on {self.device}, "
            f"key {self.key[:12]})"
        )

    @property
    def arithmetic(self) -> str:
        """The arithmetic that computed the K/V; another one may differ in the last bits. `kernel` is its older name."""
        return self.kernel

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The processed size (width, height) of each reference, in pixels."""
        return tuple(report.processed_size for report in self.reports)

    @property
    def ids(self) -> Tensor:
        """The positions (S_ref, 4) of all tokens."""
        return position_ids(self.reports)

    def part(self, rank: int, size: int) -> References:
        """Return copies of part `rank` of `size` of the heads, under a key of its own. Raises `InvalidRequest`."""
        if self.tokens is not None:
            raise InvalidRequest("references", "tokens of a joint model have no heads; every process needs all of them")
        num_heads = self.kv[0].k.shape[2]
        if self.shard is not None or num_heads % size:
            held = "all" if self.shard is None else f"part {self.shard[0]} of {self.shard[1]}"
            raise InvalidRequest(
                "references", f"{num_heads} heads ({held}) cannot be cut into {size} parts; prefill the pictures again"
            )
        layers = tuple(type(layer)(*(x.chunk(size, dim=2)[rank].contiguous() for x in layer)) for layer in self.kv)
        return dataclasses.replace(self, layers=layers, shard=(rank, size), key=self._key((rank, size)))

    def to(self, device: torch.device | str) -> References:
        """Return the same values on a device; itself if they are there already."""
        device = torch.device(device)
        if device == self.device:
            return self
        return dataclasses.replace(self, layers=self._layers(to_device(self.layers, device)))

    def to_host(self, *, page_locked: bool) -> References:
        """Return a copy in host memory; from page-locked memory a CUDA device copies without waiting."""
        return dataclasses.replace(self, layers=self._layers(to_host(self.layers, page_locked=page_locked)))

    @staticmethod
    def _layers(layers: Iterable[Any]) -> Any:
        return tuple(layers)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a pack, whole or not at all. Raises `OutputError`."""
        with atomic_write(Path(path)) as temporary:
            self.write_to(temporary)

    def write_to(self, path: Path) -> None:
        """Write a pack to a new file, which is incomplete until this returns. Raises `OSError`."""
        identity = PackIdentity(
            key=self.key,
            weights=self.weights,
            arithmetic=self.kernel,
            dtype=self.dtype,
            quantization=self.quantization,
            num_layers=len(self.layers),
            reports=self.reports,
            prefill_seconds=self.prefill_seconds,
            shard=self.shard,
            joint=self.tokens is not None,
        )
        tensors = {f"{i}.{name}": x for i, layer in enumerate(self.layers) for name, x in layer._asdict().items()}
        write_pack(path, identity, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, page_locked: bool = False) -> References:
        """Read a pack and check every byte; `page_locked`: into memory from which a GPU copies without waiting.

        Whether a pipeline has the same weights is checked where they are used.

        Raises `InvalidRequest` for a file that cannot be read, `DamagedPack`, a subclass, for one that is damaged or no
        pack, and `CapacityError` for a sound one that does not fit in memory.
        """
        identity, tensors = read_pack(path, page_locked=page_locked)
        try:
            kind = identity.kind
            references = cls(
                layers=cls._layers(
                    kind(**{name: tensors[f"{i}.{name}"] for name in kind._fields}) for i in range(identity.num_layers)
                ),
                key=identity.key,
                weights=identity.weights,
                kernel=identity.arithmetic,
                dtype=identity.dtype,
                quantization=identity.quantization,
                reports=identity.reports,
                prefill_seconds=identity.prefill_seconds,
                shard=identity.shard,
            )
            references.check()
        except MALFORMED as error:
            raise DamagedPack(path, f"is damaged or edited ({error})") from error
        return references

    def check(self) -> None:
        """Raise `ValueError` unless layers, reports and key agree with each other."""
        length = num_tokens(*self.sizes)
        if not self.layers or not length:
            raise ValueError("it holds no references")
        stored = self.dtype if self.quantization is None else KV_FORMATS[self.quantization][0]
        if self.tokens is not None and (self.tokens.shape[:2] != (1, length) or self.tokens.dtype != self.dtype):
            raise ValueError(f"tokens of shape {list(self.tokens.shape)} in {self.tokens.dtype}, not [1, {length}, C]")
        heads, head_dim = self.kv[0].k.shape[2:] if self.kv else (0, 0)
        for layer in self.kv:
            for name, x in layer._asdict().items():
                is_scale = name.endswith("_scale")
                shape = (1, length, heads, 1 if is_scale else head_dim)
                dtype = torch.float32 if is_scale else stored
                if tuple(x.shape) != shape or x.dtype != dtype:
                    raise ValueError(
                        f"keys or values of shape {list(x.shape)} in {x.dtype}, not {list(shape)} in {dtype}"
                    )
        if self.key != self._key(self.shard):
            raise ValueError("its key is not that of its contents")

    def _key(self, shard: tuple[int, int] | None) -> str:
        """Return the content key for all heads, or for a part of them."""
        return reference_key(
            weights=self.weights,
            dtype=self.dtype,
            arithmetic=self.kernel,
            digests=[report.digest for report in self.reports],
            quantization=self.quantization,
            shard=shard,
            joint=self.tokens is not None,
        )
