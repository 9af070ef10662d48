"""Keep the weights of networks within a limit of a GPU's memory: in page-locked host memory, and on the device by turns.

The network that works is on the device; others stay there if there is room. If it is too large, some of its layers stay,
evenly spread, and the others pass through two buffers: one is computed with while the next is copied into the other, on
a stream of its own. The numbers are those of `limner.memory.plan`.

Networks keep their tensors in host memory, where digests and LoRAs find them. What runs is a *shadow*: modules of the
same classes that share everything but their tensors. Knows modules and tensors, and no pipeline.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from limner.errors import CapacityError
from limner.memory.amounts import show_bytes
from limner.memory.plan import DEVICE_BASE
from limner.memory.residency import Residency

__all__ = ["Staged"]

_logger = logging.getLogger("limner")
_CHUNK = 1 << 30
"""Page-locked memory is taken in pieces of this size: torch rounds each up to a power of two."""
_SLACK = 8
"""A part of the layers: so many more may pass than have to, before layers are copied to let fewer pass."""
_ALIGNMENT = 512
"""As the allocator's, so that sums of tensors are what they take."""


@dataclass(eq=False, slots=True)
class _Buffer:
    """Device memory for the tensors of one part. `free`: when the work that read it last is done."""

    memory: Tensor
    free: torch.cuda.Event | None = None
    holds: _Part | None = None


@dataclass(eq=False, slots=True)
class _Part:
    """Tensors that come and go together: of a layer, or of what a network has besides its layers.

    `places` are (shadow, its module, "_parameters" or "_buffers", name). `ready`: when they are on the device.
    """

    shadow: nn.Module
    places: list[tuple[nn.Module, nn.Module, str, str]]
    nbytes: int
    buffer: _Buffer | None = None
    ready: torch.cuda.Event | None = None
    version: tuple[tuple[int, int], ...] = ()
    locked: dict[int, tuple[tuple[int, int], Tensor]] = field(default_factory=dict)

    def sources(self) -> Iterator[Tensor]:
        """The tensors in page-locked memory: themselves, or copies of those that came later, as fused LoRAs."""
        for i, (tensor, version) in enumerate(zip(self.originals(), self.versions(), strict=True)):
            if tensor.is_pinned():
                yield tensor
                continue
            if i not in self.locked or self.locked[i][0] != version:
                self.locked[i] = version, torch.empty_like(tensor, pin_memory=True).copy_(tensor)
            yield self.locked[i][1]

    def originals(self) -> Iterator[Tensor]:
        for _, module, kind, name in self.places:
            yield getattr(module, kind)[name]

    def drop(self) -> None:
        """Let go of the device memory."""
        self.buffer, self.ready = None, None
        for shadow, _, kind, name in self.places:
            getattr(shadow, kind)[name] = None

    def versions(self) -> tuple[tuple[int, int], ...]:
        """Addresses and versions of the tensors in host memory: others mean that the copy is old."""
        return tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in self.originals())


@dataclass(eq=False, slots=True)
class _Network:
    """A network's parts, in the order in which they run. `rest` is None where that always stays on the device."""

    module: nn.Module
    rest: _Part | None
    layers: dict[nn.Module, _Part]
    shadows: dict[str, nn.Module]
    passing: list[_Part] = field(default_factory=list)
    buffers: list[_Buffer] = field(default_factory=list)

    @property
    def parts(self) -> list[_Part]:
        return [*([self.rest] if self.rest else []), *self.layers.values()]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def least(self) -> int:
        """Bytes with which it runs: all but the layers, and two of the largest ones."""
        rest = self.rest.nbytes if self.rest else 0
        return rest + 2 * max((part.nbytes for part in self.layers.values()), default=0)

    @property
    def on_device(self) -> int:
        buffers = {id(part.buffer): part.buffer for part in self.parts if part.buffer is not None}
        buffers |= {id(buffer): buffer for buffer in self.buffers}
        return sum(buffer.memory.nbytes for buffer in buffers.values())


class Staged(Residency):
    """A limit of a device's memory in bytes, and the networks that share it. One call works at a time."""

    def __init__(self, limit: int, device: torch.device) -> None:
        self.limit, self.device = limit, device
        self._staged: dict[nn.Module, _Network] = {}
        self._of_layer: dict[nn.Module, _Network] = {}
        self._working: nn.Module | None = None
        self._growth = 0
        self._lock = threading.RLock()
        self._copies: torch.cuda.Stream | None = None

    def adopt(
        self,
        network: nn.Module,
        layers: Sequence[nn.Module] = (),
        *,
        tables: Sequence[nn.Module] = (),
        hooks: bool = False,
    ) -> None:
        """Put a network under the limit. Its weights move to page-locked host memory.

        Of a network whose layers are visited, everything else moves to the device and stays there.
        """
        visited = bool(layers) and not hooks
        with self._lock:
            if (known := self._staged.get(network)) is not None:
                self._leave(known)
            own = {id(module) for layer in layers for module in layer.modules()}
            _lock_pages([module for module in network.modules() if not visited or id(module) in own])
            if visited:
                for module in network.modules():
                    if id(module) not in own:
                        _move(module, self.device)
            memo: dict[int, nn.Module] = {}
            shadows = {name: _shadow(child, memo, share_hooks=visited) for name, child in network.named_children()}
            parts = {layer: _part(layer, memo) for layer in layers}
            outside = [module for module in network.modules() if id(module) not in own]
            rest = None if visited else _part(network, memo, modules=outside)
            staged = _Network(network, rest, parts, {} if visited else shadows)
            self._staged[network] = staged
            self._of_layer |= dict.fromkeys(layers, staged)
            if hooks:
                for layer, part in parts.items():
                    self._hook(layer, part.shadow)

    def _hook(self, layer: nn.Module, shadow: nn.Module) -> None:
        def before(*_: Any) -> None:  # what a hook returns would replace the layer's input
            self._before(layer)

        def after(*_: Any) -> None:
            self._after(layer)

        shadow.register_forward_pre_hook(before)
        shadow.register_forward_hook(after)

    def mapped(self, network: nn.Module) -> bool:
        """Return True: what is in host memory is no part of this limit."""
        return True

    def after_read(self, tensor: Tensor) -> None:
        """Do nothing: what is read is in host memory."""

    def release(self, network: nn.Module) -> None:
        """Take a network off the device."""
        with self._lock:
            self._leave(self._staged[network])

    def free_bytes(self, device: torch.device) -> int:
        """Return what is left of the limit for a call, beside what every network needs at least."""
        least = max((network.least for network in self._staged.values()), default=0)
        return self.limit - DEVICE_BASE - self._others() - least

    def _others(self) -> int:
        """Bytes on the device that are not of these networks' parts: K/V, what stays of the transformer, pictures."""
        own = sum(network.on_device for network in self._staged.values())
        return int(torch.cuda.memory_allocated(self.device)) - own

    @contextlib.contextmanager
    def working(self, network: nn.Module, *, growth: int) -> Iterator[None]:
        """Have a network on the device, with room for `growth` bytes on top of weights. Raises `CapacityError`."""
        with self._lock:
            staged, before = self._staged[network], (self._working, self._growth)
            if self._working is not network:
                self._bring(staged, growth)
            self._working, self._growth = network, growth
            for name, shadow in staged.shadows.items():
                network.__dict__[name] = shadow  # found before the module of that name, which others may read meanwhile
            try:
                for part in [staged.rest] if staged.rest else []:
                    self._wait_for(part)
                yield
            finally:
                for name in staged.shadows:
                    network.__dict__.pop(name, None)
                self._working, self._growth = before
                if self._working not in (None, network):  # a call within a call
                    self._bring(self._staged[self._working], self._growth)

    def _bring(self, staged: _Network, growth: int) -> None:
        """Decide which layers stay, and begin to copy."""
        room = self.limit - DEVICE_BASE - self._others() - growth
        others = [other for other in self._staged.values() if other is not staged]
        if staged.nbytes + sum(other.on_device for other in others) > room:
            for other in others:
                self._leave(other)
        layers, passing = list(staged.layers.values()), 0
        if staged.nbytes > room:
            if not layers or staged.least > room:
                raise CapacityError(
                    f"memory_limit: {show_bytes(self.limit)} are too little for {type(staged.module).__name__}: "
                    f"{show_bytes(min(staged.least, staged.nbytes) - room)} are missing beside {show_bytes(growth)} of "
                    "activations and K/V; raise the limit, or use fewer or smaller references, a smaller output, fewer "
                    "images at once, or an int8 model (limner quantize)"
                )
            passing = _num_passing([part.nbytes for part in layers], room - (staged.nbytes - _nbytes(layers)))
            _logger.info(
                "memory limit: %d of %d layers of %s stay on %s",
                len(layers) - passing,
                len(layers),
                type(staged.module).__name__,
                self.device,
            )
        chosen, much = _spread(layers, passing), len(layers) // _SLACK
        if staged.buffers and staged.on_device <= room and 0 <= len(staged.passing) - passing <= much:
            chosen = staged.passing  # not worth copying layers again
        self._arrange(staged, chosen)
        self._copy_stream().wait_stream(torch.cuda.current_stream(self.device))  # memory that was just freed is free
        for part in staged.parts:
            if part not in chosen and (part.buffer is None or part.version != part.versions()):
                if part.buffer is None:
                    part.buffer = _Buffer(torch.empty(part.nbytes, dtype=torch.uint8, device=self.device))
                self._copy(part, part.buffer)
        for part, buffer in zip(chosen, staged.buffers, strict=False):
            self._copy(part, buffer)

    def _arrange(self, staged: _Network, passing: list[_Part]) -> None:
        """Free layers that stayed and are now to pass through the buffers, and make these if they are not there."""
        size = max((part.nbytes for part in passing), default=0)
        same = {id(part) for part in passing} == {id(part) for part in staged.passing}
        if staged.on_device and not same:
            torch.cuda.current_stream(self.device).wait_stream(self._copy_stream())
            for part in (*staged.passing, *passing):
                part.drop()
            if not passing or (staged.buffers and staged.buffers[0].memory.nbytes != size):
                staged.buffers = []
        staged.passing = passing
        if passing and not staged.buffers:
            staged.buffers = [_Buffer(torch.empty(size, dtype=torch.uint8, device=self.device)) for _ in range(2)]

    def _leave(self, staged: _Network) -> None:
        """Free what a network has on the device."""
        if staged.on_device:  # copies into its memory come before what uses that next
            torch.cuda.current_stream(self.device).wait_stream(self._copy_stream())
        for part in staged.parts:
            part.drop()
        staged.buffers, staged.passing = [], []

    def _copy_stream(self) -> torch.cuda.Stream:
        if self._copies is None:
            self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return self._copies

    def _copy(self, part: _Part, buffer: _Buffer) -> None:
        """Queue the copy of a part into a buffer, after the work that reads what is there."""
        if buffer.holds is part and part.buffer is buffer and part.version == part.versions():
            return
        if buffer.holds is not None and buffer.holds.buffer is buffer:
            buffer.holds.buffer = None
        side, start = self._copy_stream(), 0
        if buffer.free is not None:
            side.wait_event(buffer.free)
        with torch.cuda.stream(side):
            for (shadow, _, kind, name), source in zip(part.places, part.sources(), strict=True):
                place = buffer.memory[start : start + source.nbytes].view(source.dtype).view(source.shape)
                place.copy_(source, non_blocking=True)
                getattr(shadow, kind)[name] = place
                start += _aligned(source.nbytes)
        part.ready = side.record_event()
        part.buffer, part.version, buffer.holds = buffer, part.versions(), part

    def _wait_for(self, part: _Part) -> None:
        if part.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(part.ready)

    # layer after layer

    def visit(self, layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
        """Yield the shadows of layers in order, each with its weights on the device."""
        for layer in layers:
            network = self._of_layer[layer]
            if self._working is not network.module:
                with self.working(network.module, growth=0):
                    yield self._before(layer)
                    self._after(layer)
            else:
                yield self._before(layer)
                self._after(layer)

    def _before(self, layer: nn.Module) -> nn.Module:
        """Have a layer on the device, and copy the next one that passes through while it runs."""
        network = self._of_layer[layer]
        part = network.layers[layer]
        if part in network.passing:
            at = network.passing.index(part)
            if part.buffer is None:
                self._copy(part, network.buffers[at % 2])
            following = network.passing[(at + 1) % len(network.passing)]
            other = network.buffers[1 - network.buffers.index(_given(part.buffer))]
            if following.buffer is None and following is not part:
                self._copy(following, other)
        self._wait_for(part)
        return part.shadow

    def _after(self, layer: nn.Module) -> None:
        part = self._of_layer[layer].layers[layer]
        _given(part.buffer).free = torch.cuda.current_stream(self.device).record_event()


def _given(buffer: _Buffer | None) -> _Buffer:
    assert buffer is not None
    return buffer


def _num_passing(sizes: Sequence[int], room: int) -> int:
    """Return how many layers have to pass through two buffers of the largest so that the others have room."""
    for passing in range(1, len(sizes)):
        chosen = _spread(list(range(len(sizes))), passing)
        staying = sum(sizes) - sum(sizes[i] for i in chosen)
        if staying + 2 * max(sizes[i] for i in chosen) <= room:
            return passing
    return len(sizes)


def _spread(parts: list[Any], number: int) -> list[Any]:
    """Return `number` of the parts, evenly spread: copying one then takes place while several others run."""
    total = len(parts)
    return [part for i, part in enumerate(parts) if (i + 1) * number // total > i * number // total]


def _nbytes(parts: Iterable[_Part]) -> int:
    return sum(part.nbytes for part in parts)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _tensor_names(module: nn.Module) -> Iterator[tuple[str, str]]:
    for kind in ("_parameters", "_buffers"):
        for name, tensor in getattr(module, kind).items():
            if tensor is not None:
                yield kind, name


def _part(module: nn.Module, memo: dict[int, nn.Module], *, modules: Sequence[nn.Module] | None = None) -> _Part:
    """The tensors of a module, or of some `modules` in it, and where its shadow has them."""
    found = [m for m in (module.modules() if modules is None else modules) if id(m) in memo]
    places = [(memo[id(m)], m, kind, name) for m in found for kind, name in _tensor_names(m)]
    nbytes = sum(_aligned(getattr(m, kind)[name].nbytes) for _, m, kind, name in places)
    return _Part(memo.get(id(module), module), places, nbytes)


def _shadow(module: nn.Module, memo: dict[int, nn.Module], *, share_hooks: bool) -> nn.Module:
    """Return a module of the same class that shares everything but its tensors; with `share_hooks` its hooks too."""
    if id(module) in memo:
        return memo[id(module)]
    made = memo[id(module)] = module.__class__.__new__(module.__class__)
    made.__dict__.update(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        made.__dict__[kind] = dict.fromkeys(module.__dict__[kind])
    if not share_hooks:
        for name, value in module.__dict__.items():
            if "_hooks" in name and isinstance(value, OrderedDict):
                made.__dict__[name] = value.copy()
    made.__dict__["_modules"] = {
        name: None if child is None else _shadow(child, memo, share_hooks=share_hooks)
        for name, child in module._modules.items()
    }
    return made


@torch.no_grad()
def _lock_pages(modules: Iterable[nn.Module]) -> None:
    """Move the tensors of modules to page-locked host memory, from which a device copies without waiting."""
    tensors = [getattr(m, kind)[name] for m in modules for kind, name in _tensor_names(m)]
    tensors = list({id(t): t for t in tensors if not (t.device.type == "cpu" and t.is_pinned())}.values())
    left, chunk, start = sum(_aligned(t.nbytes) for t in tensors), torch.empty(0, dtype=torch.uint8), 0
    for tensor in tensors:
        size = _aligned(tensor.nbytes)
        if start + size > chunk.nbytes:
            chunk = torch.empty(max(size, min(_CHUNK, left)), dtype=torch.uint8, pin_memory=True)
            start = 0
        place = chunk[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        tensor.data = place.copy_(tensor.detach())
        left, start = left - size, start + size


@torch.no_grad()
def _move(module: nn.Module, device: torch.device) -> None:
    """Move the tensors of one module, without those of modules in it."""
    for kind, name in _tensor_names(module):
        tensor = getattr(module, kind)[name]
        moved = tensor.detach().to(device)
        getattr(module, kind)[name] = nn.Parameter(moved, requires_grad=False) if kind == "_parameters" else moved
