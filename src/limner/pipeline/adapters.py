"""LoRAs of one transformer: which are loaded, which act and how strongly, and their part of the content key.

An adapter that acts runs beside the products of the matrices it is for (`Branches`): nothing is copied, a strength changes
at once, and weights of any format serve. Fusing puts a sum of weights in the place of a parameter and keeps the parameter
itself, so unfusing gives back the very tensors that were there. Knows nothing of files and pictures.

Adapters act in the order of their digests, so neither names nor the order in which they were loaded change a picture, and
an adapter of strength 0 is not there at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import cast

import torch
from torch import nn

from limner.errors import CheckpointError, InvalidRequest
from limner.model.arithmetic import Linear
from limner.model.int8 import Int8Linear
from limner.model.lora import Branches, Update, added_to
from limner.model.transformer import Transformer
from limner.weights.digest import Fingerprint, WeightDigests, fingerprint
from limner.weights.lora import LoraWeights

__all__ = ["Adapters", "AppliedLora"]

_logger = logging.getLogger("limner")


@dataclass(frozen=True, kw_only=True, slots=True)
class AppliedLora:
    """A LoRA that acts: its name, the digest of what it holds, its strength, and whether it is fused."""

    name: str
    digest: str
    strength: float
    fused: bool


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class _Acting:
    name: str
    lora: LoraWeights
    strength: float


class Adapters:
    """The LoRAs of a transformer, one for all who share it (`of`). Every change is made whole or not at all."""

    @classmethod
    def of(cls, transformer: Transformer, digests: WeightDigests) -> Adapters:
        """Those that the transformer has, else none. `digests` remembers what fused weights are made of."""
        found = transformer.attached
        if not isinstance(found, cls) or found.transformer is not transformer:
            found = cls(transformer, digests)
            transformer.attach(found)
        return found

    def __init__(self, transformer: Transformer, digests: WeightDigests) -> None:
        self.transformer = transformer
        self._digests = digests
        self._loaded: dict[str, LoraWeights] = {}
        self._strengths: dict[str, float] = {}
        self._active: list[str] = []
        self._fused: list[_Acting] = []
        self._base: dict[str, tuple[Linear, nn.Parameter]] = {}
        self._base_state: tuple[Fingerprint, str] | None = None
        self._branches: Branches | None = None

    @property
    def names(self) -> list[str]:
        return list(self._loaded)

    @property
    def active(self) -> list[str]:
        return list(self._active)

    @property
    def fused(self) -> list[str]:
        return [one.name for one in self._fused]

    @property
    def applied(self) -> tuple[AppliedLora, ...]:
        """What acts, with strengths other than 0: fused ones first."""
        self._keep_up()
        found = [(one, True) for one in self._fused if one.strength] + [(one, False) for one in self._beside()]
        return tuple(
            AppliedLora(name=one.name, digest=one.lora.digest, strength=one.strength, fused=fused)
            for one, fused in found
        )

    def weights_digest(self) -> str:
        """The digest of what the transformer computes with: that of its tensors, and of what runs beside them."""
        self._keep_up()
        weights = self._digests.of(self.transformer)
        beside = self._beside()
        return _derived("beside", weights, beside) if beside else weights

    # what is loaded and active

    def add(self, lora: LoraWeights, name: str | None) -> None:
        """Loads an adapter under a new name and lets it act alone, with strength 1, as diffusers does."""
        if name is None:
            number = len(self._loaded)
            while (name := f"default_{number}") in self._loaded:
                number += 1
        if not isinstance(name, str) or not name:
            raise InvalidRequest("adapter_name", f"{name!r} is not a name; give a text, or leave it out")
        if name in self._loaded:
            raise InvalidRequest(
                "adapter_name", f"{name!r} is loaded already; choose another, or delete_adapters({name!r})"
            )
        self._loaded[name] = lora
        try:
            self._attach([name])
        except BaseException:
            del self._loaded[name]
            raise

    def set(self, names: Sequence[str] | str, strengths: object = None) -> None:
        """Lets these adapters act, and no others; a strength for each, one for all, or None for 1."""
        names = [names] if isinstance(names, str) else list(names)
        if len(set(names)) != len(names):
            raise InvalidRequest("adapter_names", f"{names} names an adapter twice; add up its strengths")
        self._check_known(names)
        if bound := [one.name for one in self._fused if self._is_fused(one.name)]:
            raise InvalidRequest("adapter_names", f"{bound} are fused, their strengths are fixed; unfuse_lora() first")
        values = list(strengths) if isinstance(strengths, (list, tuple)) else [strengths] * len(names)
        if len(values) != len(names):
            raise InvalidRequest(
                "adapter_weights",
                f"{len(values)} weights for {len(names)} adapters; give one each, or one number for all",
            )
        given = {name: check_strength(value) for name, value in zip(names, values, strict=True)}
        self._attach(names, self._strengths | given)

    def delete(self, names: Sequence[str] | str) -> None:
        """Forgets adapters that are not fused."""
        names = [names] if isinstance(names, str) else list(names)
        self._check_known(names)
        for name in names:
            if self._is_fused(name):
                raise InvalidRequest("adapter_names", f"{name!r} is fused; unfuse_lora() first")
        self._attach([name for name in self._active if name not in names])
        for name in set(names):
            del self._loaded[name]
            self._strengths.pop(name, None)

    def clear(self) -> None:
        """Forgets all adapters; what is fused stays in the weights, as in diffusers, until `unfuse`."""
        self._attach([])
        self._loaded.clear()
        self._strengths.clear()
        if self._fused:
            _logger.info("lora: %s stay fused; unfuse_lora() takes them out of the weights", self.fused)

    # fused

    def fuse(self, names: Sequence[str] | None, scale: float) -> None:
        """Puts adapters, those that are active or `names`, into the weights, with their strength times `scale`.

        Sums are made from the weights without any adapter, also when others are fused already.
        """
        scale = check_strength(scale, field="lora_scale")
        chosen = self.active if names is None else [names] if isinstance(names, str) else list(names)
        self._check_known(chosen)
        new = [
            _Acting(name=name, lora=self._loaded[name], strength=self._strengths.get(name, 1.0) * scale)
            for name in dict.fromkeys(chosen)
            if not self._is_fused(name)
        ]
        if new:
            self._fuse([*self._fused, *new])

    def unfuse(self) -> None:
        """Gives back the tensors that were there before `fuse`, and lets active adapters act beside them."""
        if self._fused:
            for name, (module, _) in self._base.items():
                if _find(self.transformer, name) is not module:
                    raise CheckpointError(
                        f"unfuse_lora: {name} was replaced since fuse_lora, its own weights are not those to give back; "
                        "load the model again"
                    )
            self._restore()
            self._fused = []
            self._attach(self._active)

    @contextlib.contextmanager
    def removed(self) -> Iterator[None]:
        """Takes everything out of the transformer while its weights move to another device or dtype."""
        fused, active = self._fused, self._active
        if not (fused or active):
            yield
            return
        self._detach()
        self._restore()
        self._fused, self._active = [], []
        try:
            yield
        finally:
            if fused:
                self._fuse(fused)
            self._attach(active)

    def _fuse(self, fused: list[_Acting]) -> None:
        before = self._base, self._base_state, self._fused
        weights = [(module, module.weight) for module, _ in self._base.values()]
        self._restore()
        try:
            base = fingerprint(self.transformer), self._digests.of(self.transformer)
            updates = _by_matrix(_ordered(fused))
            originals = {name: _matrix(self.transformer, name) for name in updates}
            # all sums are there before one is used, so that nothing is left half done
            sums = {name: added_to(weight, updates[name]) for name, (_, weight) in originals.items()}
            for name, value in sums.items():
                if not torch.isfinite(value).all():
                    raise InvalidRequest(
                        "fuse_lora",
                        f"the sum for {name} is not finite in {value.dtype}; use smaller strengths or float32",
                    )
            self._fused = fused
            self._attach(self._active)
        except BaseException:
            self._base, self._base_state, self._fused = before
            for module, weight in weights:
                module.weight = weight
            raise
        self._base, self._base_state = originals, base
        for name, (module, _) in originals.items():
            module.weight = nn.Parameter(sums[name], requires_grad=False)
        if originals:
            self._digests.remember(self.transformer, _derived("fused", base[1], _ordered(fused)))

    def _restore(self) -> None:
        """Puts the parameters back that were there before anything was fused."""
        for module, weight in self._base.values():
            module.weight = weight
        if self._base_state is not None:
            state, digest = self._base_state
            self._digests.remember(self.transformer, digest, at=state)  # unless they were changed meanwhile
        self._base, self._base_state = {}, None

    # beside

    def _beside(self) -> list[_Acting]:
        """Adapters that run beside the weights, in the order in which they act."""
        return self._acting(self._active, self._strengths)

    def _acting(self, active: Sequence[str], strengths: Mapping[str, float]) -> list[_Acting]:
        return _ordered(
            [
                _Acting(name=name, lora=self._loaded[name], strength=strengths.get(name, 1.0))
                for name in active
                if not self._is_fused(name)
            ]
        )

    def _attach(self, active: Sequence[str], strengths: Mapping[str, float] | None = None) -> None:
        strengths = self._strengths if strengths is None else strengths
        updates = _by_matrix(self._acting(active, strengths))
        made = Branches(self.transformer, updates, dtype=self.transformer.dtype) if updates else None
        self._detach()
        self._branches, self._active, self._strengths = made, list(active), dict(strengths)

    def _keep_up(self) -> None:
        """Attaches again if other matrices were put in the places of those that branches are beside."""
        if self._branches is not None and not self._branches.are_in(self.transformer):
            self._attach(self._active)

    def _detach(self) -> None:
        if self._branches is not None:
            self._branches.remove()
        self._branches = None

    def _is_fused(self, name: str) -> bool:
        return any(one.name == name and one.lora is self._loaded.get(name) for one in self._fused)

    def _check_known(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self._loaded]
        if unknown:
            raise InvalidRequest("adapter_names", f"{unknown} are not loaded; loaded: {self.names}")


def check_strength(value: object, *, field: str = "adapter_weights") -> float:
    """A strength: a finite number, None for 1; a dict may name the one part that has LoRAs, as in diffusers."""
    if isinstance(value, dict):
        if set(value) != {"transformer"}:
            raise InvalidRequest(field, f"{value!r}: only a weight of the transformer is known; give one number")
        value = value["transformer"]
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise InvalidRequest(field, f"{value!r} is not a finite number")
    return float(value)


def _ordered(acting: Sequence[_Acting]) -> list[_Acting]:
    return sorted((one for one in acting if one.strength), key=lambda one: (one.lora.digest, one.strength))


def _by_matrix(acting: Sequence[_Acting]) -> dict[str, list[tuple[Update, float]]]:
    found: dict[str, list[tuple[Update, float]]] = {}
    for one in acting:
        for name, update in one.lora.updates.items():
            found.setdefault(name, []).append((update, one.strength))
    return found


def _derived(how: str, weights: str, acting: Sequence[_Acting]) -> str:
    parts = ["lora", how, weights, [[one.lora.digest, repr(one.strength)] for one in acting]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _matrix(transformer: nn.Module, name: str) -> tuple[Linear, nn.Parameter]:
    module = transformer.get_submodule(name)
    if isinstance(module, Int8Linear):
        raise InvalidRequest(
            "fuse_lora",
            f"{name} is int8, and rounding a sum to 8 bits again loses what is smaller than half a step; leave adapters "
            "unfused (they act beside int8 weights, unrounded), or load the model without quantize",
        )
    assert isinstance(module, Linear)
    return module, cast("nn.Parameter", module.weight)


def _find(transformer: nn.Module, name: str) -> nn.Module | None:
    try:
        return transformer.get_submodule(name)
    except AttributeError:
        return None
