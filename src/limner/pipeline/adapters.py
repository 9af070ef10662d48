"""LoRAs of one transformer: which are loaded, which are active and how strongly, and their part of the content key.

An active adapter runs alongside the products of its matrices (`Branches`): no weight is copied, a strength changes at once,
and weights may have any format. Fusing replaces a parameter by a sum of weights and keeps the parameter, so unfusing
restores the same tensors. Knows nothing of files and pictures.

Adapters are applied in the order of their digests, so neither names nor the order of loading change a picture. An adapter
of strength 0 is left out. Disabled adapters stay loaded, active and fused in name, and nothing of them acts.

What is *set* acts in every call but those that have LoRAs of their own (`acting`). These count for the thread of the call
alone: other threads see the digests of what is set.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from limner.errors import CheckpointError, InvalidRequest
from limner.model.arithmetic import Linear
from limner.model.int8 import Int8Linear
from limner.model.lora import Branches, Update, added_to
from limner.model.transformer import Transformer
from limner.requests import Loras, check_number, read_loras
from limner.weights.digest import Fingerprint, WeightDigests, fingerprint
from limner.weights.lora import LoraWeights

__all__ = ["Adapters", "AppliedLora", "check_loras", "check_strength"]

_logger = logging.getLogger("limner")


@dataclass(frozen=True, kw_only=True, slots=True)
class AppliedLora:
    """A LoRA: its name, the digest of its tensors, its strength (0: it does not act), and if it is fused."""

    name: str
    digest: str
    strength: float
    fused: bool


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class _Weighted:
    """A loaded LoRA and its strength."""

    name: str
    lora: LoraWeights
    strength: float


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class _Call:
    """A call that runs, in which thread. `loras` are its own; None: those that are set. `branches` are what these add."""

    thread: int
    loras: tuple[tuple[str, float], ...] | None
    branches: Branches | None


class Adapters:
    """The LoRAs of a transformer, shared by all pipelines that use it (`of`). A change that fails leaves all as it was."""

    @classmethod
    def of(cls, transformer: Transformer, digests: WeightDigests) -> Adapters:
        """Return the adapters of a transformer, attaching new ones if it has none. `digests` records fused weights."""
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
        self._fused: list[_Weighted] = []
        self._base: dict[str, tuple[Linear, nn.Parameter]] = {}
        self._base_state: tuple[Fingerprint, str] | None = None
        self._branches: Branches | None = None
        """Of what is set."""
        self._shown: Branches | None = None
        """Those that are attached."""
        self._calls: list[_Call] = []
        """Those that run, the innermost of a thread last."""
        self._lock = threading.Lock()
        """Guards the calls, and what is attached for them."""
        self._last: tuple[tuple[tuple[str, float], ...], Branches] | None = None
        """What was made for the last call with LoRAs of its own."""
        self._disabled: list[_Weighted] | None = None
        """Those that are to be fused again by `enable`; None while adapters are enabled."""

    @property
    def names(self) -> list[str]:
        return list(self._loaded)

    @property
    def active(self) -> list[str]:
        return list(self._active)

    @property
    def fused(self) -> list[str]:
        return [one.name for one in (*self._fused, *(self._disabled or ()))]

    @property
    def loaded(self) -> tuple[AppliedLora, ...]:
        """All that are loaded or in the weights, with the strengths that are set; 0: it does not act."""
        acting = {one.name: one.strength for one in (*self._fused, *self._weighted(self._active, self._strengths))}
        in_weights = {(one.name, one.lora.digest) for one in self._fused}
        loaded = [(name, lora.digest) for name, lora in self._loaded.items()]
        return tuple(
            AppliedLora(name=one[0], digest=one[1], strength=acting.get(one[0], 0.0), fused=one in in_weights)
            for one in dict.fromkeys([*loaded, *sorted(in_weights)])
        )

    @property
    def applied(self) -> tuple[AppliedLora, ...]:
        """Those in effect, with strengths other than 0, fused ones first: of the call of this thread, else those set."""
        self._reattach_if_replaced()
        found = [(one, True) for one in self._fused if one.strength] + [(one, False) for one in self._unfused()]
        return tuple(
            AppliedLora(name=one.name, digest=one.lora.digest, strength=one.strength, fused=fused)
            for one, fused in found
        )

    def weights_digest(self) -> str:
        """Return the digest of the transformer's weights, and of the adapters that run alongside them (as `applied`)."""
        self._reattach_if_replaced()
        weights = self._digests.of(self.transformer)
        unfused = self._unfused()
        return _derived("beside", weights, unfused) if unfused else weights  # the word is part of stored keys

    # calls with LoRAs of their own

    @contextlib.contextmanager
    def acting(self, loras: Loras) -> Iterator[None]:
        """Let these LoRAs act, and no others, while a call of this thread runs; None: those that are set, in a call too.

        What acted before acts again after it, also after errors. Raises `InvalidRequest` for LoRAs that a call cannot
        have (`check_loras`), and while another thread draws with others.
        """
        own, thread = check_loras(loras, loaded=self.loaded), threading.get_ident()
        with self._lock:
            if any(call.thread != thread and call.loras != own for call in self._calls):
                raise InvalidRequest(
                    "loras",
                    "another thread draws with other LoRAs, and a transformer has one set at a time; draw one after "
                    "another, as limner.engine.Engine does",
                )
            same = next((call for call in self._calls if call.loras == own), None)  # what is attached for it stays
            branches = same.branches if same else None if own is None else self._own_branches(own)
            call = _Call(thread=thread, loras=own, branches=branches)
            self._calls.append(call)
            self._show()
        try:
            yield
        finally:
            with self._lock:
                self._calls.remove(call)
                self._show()

    def _show(self) -> None:
        """Attach what the innermost call is to have, or what is set. Setting the same costs nothing."""
        last = self._calls[-1] if self._calls else None
        wanted = self._branches if last is None or last.loras is None else last.branches
        if wanted is not self._shown:
            if self._shown is not None:
                self._shown.remove()
            if wanted is not None:
                wanted.attach()
            self._shown = wanted

    def _own_branches(self, loras: tuple[tuple[str, float], ...]) -> Branches | None:
        """Return what these LoRAs add, not attached unless it is what is set; of those of the last call, made then."""
        self._reattach_if_replaced()
        wanted = self._own(loras)
        there = self._weighted(self._active, self._strengths)
        if [(one.name, one.strength) for one in wanted] == [(one.name, one.strength) for one in there]:
            return self._branches
        if not wanted:
            return None
        if self._last is None or self._last[0] != loras or not self._last[1].are_in(self.transformer):
            self._last = None  # so that it is not in memory beside the new one, unless a call has it
            made = self._made(wanted)
            if made is None:  # of no matrix
                return None
            made.remove()
            self._last = loras, made
        return self._last[1]

    def _own(self, loras: tuple[tuple[str, float], ...]) -> list[_Weighted]:
        """Return LoRAs of a call in the order in which they are applied."""
        return _ordered([_Weighted(name=name, lora=self._loaded[name], strength=value) for name, value in loras])

    def _check_between_calls(self) -> None:
        if any(call.loras is not None for call in self._calls):
            raise InvalidRequest("loras", "a call with LoRAs of its own is drawn; change those that are set after it")

    # loading and activating

    def add(self, lora: LoraWeights, name: str | None) -> None:
        """Register an adapter under a new name and make it the only active one, with strength 1, as diffusers does."""
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
        if self._disabled is not None:
            _logger.info("lora: adapters are disabled, %s too; enable_lora() lets them act", name)
        self._loaded[name] = lora
        try:
            self._attach([name])
        except BaseException:
            del self._loaded[name]
            raise

    def set(self, names: Sequence[str] | str, strengths: object = None) -> None:
        """Make these adapters active, and no others; `strengths` is one for each, one for all, or None for 1."""
        names = [names] if isinstance(names, str) else list(names)
        if len(set(names)) != len(names):
            raise InvalidRequest("adapter_names", f"{names} names an adapter twice; add up its strengths")
        self._check_known(names)
        if bound := [name for name in self.fused if self._is_fused(name)]:
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
        """Remove adapters that are not fused. The last one that is left acts if no other would, as in diffusers."""
        names = [names] if isinstance(names, str) else list(names)
        self._check_known(names)
        for name in names:
            if self._is_fused(name):
                raise InvalidRequest("adapter_names", f"{name!r} is fused; unfuse_lora() first")
        active, left = ([name for name in given if name not in names] for given in (self._active, self._loaded))
        if left and self._active and not active:
            if len(left) > 1:
                raise InvalidRequest(
                    "adapter_names",
                    f"without {names} none of {left} is active, and diffusers would pick one for each matrix; say which "
                    "is to act with set_adapters before",
                )
            _logger.info("lora: %s is active now, the only one that is left", left[0])
            active = left
        self._attach(active)
        for name in set(names):
            del self._loaded[name]
            self._strengths.pop(name, None)
        if not self._loaded:
            self.enable()

    def clear(self) -> None:
        """Remove all adapters. Fused ones stay in the weights, as in diffusers, until `unfuse`."""
        self._attach([])
        self._loaded.clear()
        self._strengths.clear()
        self._disabled = None
        if self._fused:
            _logger.info("lora: %s stay fused; unfuse_lora() takes them out of the weights", self.fused)

    def disable(self) -> None:
        """Let no adapter act, fused or not, until `enable`. One that was fused and then unloaded is part of the weights.

        Calls may have LoRAs of their own meanwhile.
        """
        self._check_between_calls()
        if self._disabled is not None or not self._loaded:
            return
        bound = [one for one in self._fused if self._is_fused(one.name)]
        kept = [one for one in self._fused if one not in bound]
        self._check_bases()
        self._disabled = bound
        try:
            if bound and kept:
                self._fuse(kept)
            elif bound:
                self._restore()
                self._fused = []
            self._attach(self._active)
        except BaseException:
            self._disabled = None
            raise

    def enable(self) -> None:
        """Let adapters act again, those that were fused fused, with the strengths that they have now."""
        self._check_between_calls()
        if self._disabled is None:
            return
        fused, self._disabled = self._disabled, None
        try:
            if fused:
                self._fuse([*self._fused, *fused])
            else:
                self._attach(self._active)
        except BaseException:
            self._disabled = fused
            raise

    # fusing

    def fuse(self, names: Sequence[str] | None, scale: float) -> None:
        """Add adapters, the active ones or `names`, to the weights, with their strength times `scale`.

        Sums start from the weights without any adapter, even if others are fused already.
        """
        self._check_between_calls()
        scale = check_strength(scale, field="lora_scale")
        if self._disabled is not None:
            raise InvalidRequest("fuse_lora", "adapters are disabled; enable_lora() first")
        chosen = self.active if names is None else [names] if isinstance(names, str) else list(names)
        self._check_known(chosen)
        self._check_beside(chosen, scale)
        new = [
            _Weighted(name=name, lora=self._loaded[name], strength=self._strengths.get(name, 1.0) * scale)
            for name in dict.fromkeys(chosen)
            if not self._is_fused(name)
        ]
        if new:
            self._fuse([*self._fused, *new])

    def unfuse(self) -> None:
        """Restore the tensors from before `fuse`; active adapters then run alongside them. Raises `CheckpointError`."""
        self._check_between_calls()
        if self._disabled is not None:
            self._disabled = []
        if self._fused:
            self._check_bases()
            self._restore()
            self._fused = []
            self._attach(self._active)

    def base_weight(self, name: str) -> torch.Tensor:
        """Return the weights of a matrix without any adapter. Raises `InvalidRequest` if they are int8."""
        if name in self._base:
            return self._base[name][1]
        return _matrix(self.transformer, name, needed_by="OFT")[1]

    def _check_beside(self, chosen: Sequence[str], scale: float) -> None:
        """Raise `InvalidRequest` if fusing these would leave others active with which diffusers does something else."""
        beside = [one.name for one in self._unfused() if one.name not in chosen]
        asleep = [name for name in chosen if name not in self._active and not self._is_fused(name)]
        matrices = {target for name in chosen for target in self._loaded[name].updates}
        over = [name for name in beside if matrices & self._loaded[name].updates.keys()]
        if over or (scale != 1 and (beside or asleep)):
            why = (
                f"{over} are active too and would stop acting in diffusers where these are fused"
                if over
                else f"lora_scale={scale} acts on what is active ({self._active}) in diffusers, not on what is fused"
            )
            raise InvalidRequest(
                "fuse_lora",
                f"adapter_names={list(chosen)}: {why}; let exactly those act that are to be fused, with set_adapters",
            )

    def _check_bases(self) -> None:
        for name, (module, _) in self._base.items():
            if _find(self.transformer, name) is not module:
                raise CheckpointError(
                    f"lora: {name} was replaced since fuse_lora, its own weights are not those to give back; "
                    "load the model again"
                )

    @contextlib.contextmanager
    def removed(self) -> Iterator[None]:
        """Detach and unfuse all adapters while the weights move to another device or dtype, and apply them again after."""
        self._check_between_calls()
        fused, active = self._fused, self._active
        self._last = None
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

    def _fuse(self, fused: list[_Weighted]) -> None:
        before = self._base, self._base_state, self._fused
        weights = [(module, module.weight) for module, _ in self._base.values()]
        self._restore()
        try:
            base = fingerprint(self.transformer), self._digests.of(self.transformer)
            updates = _by_matrix(_ordered(fused))
            originals = {name: _matrix(self.transformer, name) for name in updates}
            # all sums are computed before one is used, so that an error changes nothing
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
        """Put back the parameters from before anything was fused."""
        for module, weight in self._base.values():
            module.weight = weight
        if self._base_state is not None:
            state, digest = self._base_state
            self._digests.remember(self.transformer, digest, at=state)  # no effect if they changed meanwhile
        self._base, self._base_state = {}, None

    # attaching

    def _unfused(self) -> list[_Weighted]:
        """Adapters that run alongside the weights in the call of this thread, else those set, as they are applied."""
        thread = threading.get_ident()
        calls = reversed(tuple(self._calls))  # of a list, an iterator ends where another thread shortens it
        own = next((call.loras for call in calls if call.thread == thread), None)
        return self._weighted(self._active, self._strengths) if own is None else self._own(own)

    def _weighted(self, active: Sequence[str], strengths: Mapping[str, float]) -> list[_Weighted]:
        if self._disabled is not None:
            return []
        return _ordered(
            [
                _Weighted(name=name, lora=self._loaded[name], strength=strengths.get(name, 1.0))
                for name in active
                if not self._is_fused(name)
            ]
        )

    def _attach(self, active: Sequence[str], strengths: Mapping[str, float] | None = None) -> None:
        self._check_between_calls()
        strengths = self._strengths if strengths is None else strengths
        made = self._made(self._weighted(active, strengths))
        self._detach()
        self._branches = self._shown = made
        self._active, self._strengths, self._last = list(active), dict(strengths), None

    def _made(self, loras: Sequence[_Weighted]) -> Branches | None:
        """Return what LoRAs add, attached; None if that is nothing."""
        updates = _by_matrix(loras)
        if not updates:
            return None
        device = self.transformer.device  # also where weights are in host memory until they are used
        return Branches(self.transformer, updates, dtype=self.transformer.dtype, device=device)

    def _reattach_if_replaced(self) -> None:
        """Attach again if other modules have taken the places of matrices that have branches."""
        shown = self._branches is self._shown
        if shown and self._branches is not None and not self._branches.are_in(self.transformer):
            self._attach(self._active)

    def _detach(self) -> None:
        if self._branches is not None:
            self._branches.remove()
        self._branches = self._shown = None

    def _is_fused(self, name: str) -> bool:
        fused = (*self._fused, *(self._disabled or ()))
        return any(one.name == name and one.lora is self._loaded.get(name) for one in fused)

    def _check_known(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self._loaded]
        if unknown:
            raise InvalidRequest("adapter_names", f"{unknown} are not loaded; loaded: {self.names}")


def check_strength(value: object, *, field: str = "adapter_weights") -> float:
    """Return a strength: a finite number, 1 for None, or that of "transformer" in a dict, as in diffusers.

    Raises `InvalidRequest` with `field`.
    """
    if isinstance(value, dict):
        if set(value) != {"transformer"}:
            raise InvalidRequest(field, f"{value!r}: only a weight of the transformer is known; give one number")
        value = value["transformer"]
    return 1.0 if value is None else check_number(field, value)


def check_loras(given: Loras, *, loaded: Sequence[AppliedLora]) -> tuple[tuple[str, float], ...] | None:
    """Return the LoRAs of a call as `read_loras` does. Raises `InvalidRequest` for one that is not loaded, or fused."""
    found = read_loras(given)
    if found is None:
        return None
    names = [lora.name for lora in loaded]
    if unknown := [name[:80] for name, _ in found if name not in names]:
        there = f"loaded: {', '.join(names)}" if names else "none is loaded"
        raise InvalidRequest(
            "loras",
            f"{', '.join(map(repr, unknown))} not loaded; {there}; more are loaded with --lora FILE when limner starts, or "
            "with load_lora_weights",
        )
    if fused := [lora.name for lora in loaded if lora.fused]:
        raise InvalidRequest(
            "loras",
            f"{', '.join(fused)} is fused into the weights, and acts in every call with a fixed strength; unfuse_lora() "
            "first, or leave loras out",
        )
    return found


def _ordered(loras: Sequence[_Weighted]) -> list[_Weighted]:
    return sorted((one for one in loras if one.strength), key=lambda one: (one.lora.digest, one.strength))


def _by_matrix(loras: Sequence[_Weighted]) -> dict[str, list[tuple[Update, float]]]:
    found: dict[str, list[tuple[Update, float]]] = {}
    for one in loras:
        for name, update in one.lora.updates.items():
            found.setdefault(name, []).append((update, one.strength))
    return found


def _derived(how: str, weights: str, loras: Sequence[_Weighted]) -> str:
    parts = ["lora", how, weights, [[one.lora.digest, repr(one.strength)] for one in loras]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _matrix(transformer: nn.Module, name: str, *, needed_by: str = "") -> tuple[Linear, nn.Parameter]:
    module = transformer.get_submodule(name)
    if isinstance(module, Int8Linear):
        if needed_by:
            raise InvalidRequest(
                "lora",
                f"{needed_by} rotates the weights of {name}, which are int8, and the exact ones are not there; load "
                "the model without quantize, or use a LoRA",
            )
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
