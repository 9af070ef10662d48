"""Keep the weights of networks within a limit of memory: which pages of their files stay resident, and when others leave.

Weights that are mapped from files take memory where their pages were touched, and the system counts them as the process's.
Under a limit only the network that works keeps its pages. If even these are too many, its first layers stay, and each of
the others leaves as soon as it has run, while the next one is read ahead. Nothing is copied and no bit changes
(`limner.memory.pages`). Knows modules and tensors, and no pipeline.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from limner.errors import CapacityError, InvalidRequest
from limner.memory.amounts import show_bytes
from limner.memory.free import free_bytes, give_back
from limner.memory.pages import can_release, file_backed, read_ahead, release, resident
from limner.memory.plan import LIBRARIES
from limner.model.int8 import Int8Linear

__all__ = ["Residency"]

_logger = logging.getLogger("limner")
_SPARE = 128 << 20
"""With less room than this on top of all weights, pages that were read once leave at once."""


class Residency:
    """A limit in bytes, and the networks that share it; `Residency.unlimited()` lets all weights stay in memory."""

    def __init__(self, limit: int) -> None:
        if not can_release():
            raise InvalidRequest(
                "memory_limit", f"needs Linux with /proc/self/pagemap, this is {sys.platform}; leave it out"
            )
        self.limit = limit
        whole, anonymous = resident()
        self._libraries = max(whole - anonymous, LIBRARIES)
        self._tight = True  # whether pages that were read once leave at once
        self._networks: dict[nn.Module, tuple[nn.Module, ...]] = {}
        self._bytes: dict[nn.Module, int] = {}  # of a network's or layer's tensors that are mapped from files
        self._files: dict[nn.Module, int] = {}  # the same of a network, tables included
        self._tables: dict[nn.Module, tuple[nn.Module, ...]] = {}
        self._following: dict[nn.Module, nn.Module] = {}
        self._once: set[nn.Module] = set()  # networks that run once a prompt, and their layers
        self._keeps_copies = False  # whether packed copies of these outlast a layer's run
        self._resident: frozenset[nn.Module] | None = None  # layers that stay while the others leave; None: all stay

    @staticmethod
    def unlimited() -> Residency:
        """Return the residency without a limit, which does nothing."""
        return _Unlimited()

    @property
    def is_limited(self) -> bool:
        """True if there is a limit."""
        return True

    def adopt(
        self,
        network: nn.Module,
        layers: Sequence[nn.Module] = (),
        *,
        tables: Sequence[nn.Module] = (),
        hooks: bool = False,
    ) -> None:
        """Put a network under the limit, as its weights are now.

        `layers` run one after the other: `visit` brings them in, or with `hooks` hooks on the modules do. The latter run
        once a prompt, not in every step: unless all networks have room, copies of their int8 weights for the CPU's products
        are made anew each time. Of `tables` a network that works reads only a few rows: they count only where all
        pages stay.
        """
        known = network in self._networks
        self._networks[network], self._tables[network] = tuple(layers), tuple(tables)
        mapped = {t.data_ptr() for t in file_backed(_tensors(network))}
        for module in (network, *layers):
            self._bytes[module] = self._bytes_of(module, mapped)
        self._files[network] = self._bytes[network]
        self._bytes[network] -= sum(self._bytes_of(table, mapped) for table in tables)
        self._tight = sum(self._files.values()) + _SPARE > self._room(0)
        self._following |= dict(zip(layers, list(layers)[1:], strict=False))
        if hooks:
            self._once |= {network, *layers}
        if hooks and not known:
            for layer in layers:
                layer.register_forward_pre_hook(self._before_layer)
                layer.register_forward_hook(self._after_layer)

    def mapped(self, network: nn.Module) -> bool:
        """Return True if most of a network's weights are mapped from files."""
        return 2 * self._files[network] > sum(t.nbytes for t in _tensors(network))

    @staticmethod
    def _bytes_of(module: nn.Module, addresses: Collection[int]) -> int:
        """Return the bytes of a module's tensors that start at some addresses."""
        return sum(t.nbytes for t in _tensors(module) if t.data_ptr() in addresses)

    def free_bytes(self, device: torch.device) -> int:
        """Return the bytes that a call may take on a device now."""
        return free_bytes(device)

    def after_read(self, tensor: Tensor) -> None:
        """Release a tensor that was read once (a check, a digest), unless all weights have room beside what the network
        that worked last made: packed copies, K/V."""
        if self._tight:
            release(tensor)

    @contextlib.contextmanager
    def working(self, network: nn.Module, *, growth: int) -> Iterator[None]:
        """Make room for a network that works, and for `growth` bytes on top of weights. Raises `CapacityError`.

        Its pages stay until another network works: the next phase often uses the same one.
        """
        before = self._resident
        self._resident = None
        try:
            self._enter(network, growth)
            yield
        finally:
            self._resident = before

    def _enter(self, network: nn.Module, growth: int) -> None:
        weights = sum(self._files.values())
        if network in self._once:
            copies = sum(_unpacked_bytes(other) for other in self._networks)
            self._keeps_copies = copies + weights <= self._room(growth)
        growth += self._packed_later(network)
        own = self._bytes[network]
        packs = network not in self._once and any(_packs(m) for m in network.modules())
        room = self._room(growth)
        self._tight = weights + _SPARE > room
        if not packs and weights <= room:
            return
        for other in (*(n for n in self._networks if n is not network), *self._tables[network]):
            self.release(other)
        if not packs and own <= room:
            return
        sizes = {layer: self._bytes[layer] for layer in self._networks[network]}
        # Products of packed matrices read the packed copies: a layer's pages are read once, to pack them. Otherwise the
        # layer that runs and the one that is read ahead are resident.
        needed = own - sum(sizes.values()) + (1 if packs else 2) * max(sizes.values(), default=0)
        if room < needed and self._free_copies(network):
            room = self._room(growth)
        room -= needed
        if room < 0 or not sizes:
            raise CapacityError(
                f"memory_limit: {show_bytes(self.limit)} are too little for {type(network).__name__}: "
                f"{show_bytes(abs(room))} are missing beside {show_bytes(growth)} of activations and K/V; raise the limit, "
                "or use fewer or smaller references, a smaller output, fewer images at once, or an int8 model (limner "
                "quantize)"
            )
        staying: list[nn.Module] = []
        for layer, size in () if packs else sizes.items():
            room -= size
            if room < 0:
                break
            staying.append(layer)
        self.release(network)
        self._resident = frozenset(staying)
        _logger.info("memory limit: %d of %d layers of %s stay", len(staying), len(sizes), type(network).__name__)

    def _packed_later(self, network: nn.Module) -> int:
        """Return the bytes of packed copies that a network makes and does not have yet."""
        if network in self._once and not self._keeps_copies:
            return max(map(_unpacked_bytes, self._networks[network]), default=0)
        return _unpacked_bytes(network)

    def _room(self, growth: int) -> int:
        """Return the bytes that weights may take beside what is anonymous now and `growth`."""
        return self.limit - resident()[1] - self._libraries - growth

    def _free_copies(self, working: nn.Module) -> bool:
        """Free the packed copies of networks that run once a prompt, but for the one that works; True if there were any."""
        others = [other for other in self._networks if other in self._once and other is not working]
        modules = [m for other in others for m in other.modules() if _packs(m) and m.packed_bytes]
        for module in modules:
            module.unpack()
        if modules:
            give_back()
        return bool(modules)

    def release(self, network: nn.Module) -> None:
        """Drop all pages of a network that can be dropped."""
        for tensor in _tensors(network):
            release(tensor)

    def visit(self, layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
        """Yield the layers in order; a layer that has no room leaves after it ran."""
        for layer in layers:
            self._before_layer(layer)
            yield layer
            self._after_layer(layer)

    def _before_layer(self, layer: nn.Module, *_: Any) -> None:
        """Read the next layer ahead, unless it stays resident or is packed already."""
        following = self._following.get(layer)
        if following is None or self._resident is None or following in self._resident:
            return
        if not any(_packs(m) and m.packed_bytes for m in following.modules()):
            for tensor in _tensors(following):
                read_ahead(tensor)

    def _after_layer(self, layer: nn.Module, *_: Any) -> None:
        if layer in self._once and not self._keeps_copies:
            for module in layer.modules():
                if _packs(module):
                    module.unpack()
        if self._resident is not None and layer not in self._resident:
            for tensor in _tensors(layer):
                release(tensor)


class _Unlimited(Residency):
    """All weights stay where they are."""

    def __init__(self) -> None:
        self.limit = sys.maxsize

    @property
    def is_limited(self) -> bool:
        return False

    def adopt(
        self,
        network: nn.Module,
        layers: Sequence[nn.Module] = (),
        *,
        tables: Sequence[nn.Module] = (),
        hooks: bool = False,
    ) -> None:
        pass

    def mapped(self, network: nn.Module) -> bool:
        """Return True: without a limit no plan counts on pages that leave."""
        return True

    def after_read(self, tensor: Tensor) -> None:
        pass

    @contextlib.contextmanager
    def working(self, network: nn.Module, *, growth: int) -> Iterator[None]:
        yield

    def release(self, network: nn.Module) -> None:
        pass

    def visit(self, layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
        return iter(layers)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [
        t.detach()
        for m in module.modules()
        for own in (m._parameters, m._buffers)
        for t in own.values()
        if t is not None
    ]


def _unpacked_bytes(module: nn.Module) -> int:
    """Return the bytes of the packed copies that products of a network or layer will make."""
    return sum(m.weight.nbytes - m.packed_bytes for m in module.modules() if _packs(m))


def _packs(module: nn.Module) -> TypeGuard[Int8Linear]:
    """Return True if products of a matrix read a copy of it in another layout."""
    return isinstance(module, Int8Linear) and module.packs()
