"""Keeps the weights of networks within a limit of memory: which pages of their files stay, and when the others leave.

Weights that are mapped from files take memory where their pages were touched, and the system counts them as the process's.
Under a limit only the network that works keeps its pages; if even these are too many, its first layers stay and the others
leave as soon as they have run, while the next are read ahead. Nothing is copied and no bit changes: a page that left comes
back from the file.

Pages that were written to (a LoRA merged in place) are the process's own and would come back as they were in the file, so a
tensor with such pages is left alone. Linux tells (`PAGEMAP_SCAN`, or /proc/self/pagemap before 6.7); elsewhere nothing
can be released, and a limit is refused. Knows modules and tensors, no pipeline.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import logging
import mmap
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from torch import Tensor, nn

from limner.errors import CapacityError, InvalidRequest
from limner.memory import LIBRARIES, show_bytes
from limner.model.int8 import Int8Linear

__all__ = ["Residency", "can_release", "file_backed", "release", "resident"]

_logger = logging.getLogger("limner")
_PAGE = mmap.PAGESIZE
_SCAN = (3 << 30) | (96 << 16) | (ord("f") << 8) | 16
_SPARE = 128 << 20
"""With less room than this beside all weights, pages that were read once leave at once."""
_FILE, _PRESENT, _SWAPPED = 1 << 2, 1 << 3, 1 << 4


def can_release() -> bool:
    """Whether this system can drop pages of mapped files and tell which were written to."""
    return sys.platform == "linux" and Path("/proc/self/pagemap").exists() and Path("/proc/self/smaps_rollup").exists()


def resident() -> tuple[int, int]:
    """Resident bytes of this process, and those of them that are anonymous."""
    found = {"Rss": 0, "Anonymous": 0}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in found:
            found[name] = int(rest.split()[0]) << 10
    return found["Rss"], found["Anonymous"]


def release(tensor: Tensor) -> bool:
    """Drops a mapped tensor's pages; False where they cannot be dropped without loss. Borders shared with others stay."""
    span = _span(tensor)
    if span is None or not _clean(*span):
        return False
    _advise(*span, mmap.MADV_DONTNEED)
    return True


def read_ahead(tensor: Tensor) -> None:
    """Tells the system that a mapped tensor's pages are wanted soon; returns at once."""
    if (span := _span(tensor)) is not None:
        _advise(*span, mmap.MADV_WILLNEED)


def file_backed(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those tensors whose memory is a mapped file."""
    files = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            low, _, high = place.partition("-")
            files.append((int(low, 16), int(high, 16)))
    starts = [low for low, _ in files]

    def mapped(tensor: Tensor) -> bool:
        at = bisect.bisect_right(starts, tensor.data_ptr()) - 1
        return at >= 0 and tensor.data_ptr() + tensor.nbytes <= files[at][1]

    return [tensor for tensor in tensors if tensor.device.type == "cpu" and mapped(tensor)]


def _span(tensor: Tensor) -> tuple[int, int] | None:
    """The whole pages of a tensor on the CPU; None if there are none."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    start = -(-tensor.data_ptr() // _PAGE) * _PAGE
    stop = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
    return (start, stop) if stop > start else None


def _advise(start: int, stop: int, advice: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice):
        _logger.debug("madvise(%d) of %d bytes: errno %d", advice, stop - start, ctypes.get_errno())


def _clean(start: int, stop: int) -> bool:
    """Whether no page of a range is the process's own (anonymous or swapped out)."""
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        with contextlib.suppress(OSError):
            return not _scan(file.fileno(), start, stop)
        file.seek(start // _PAGE * 8)  # a kernel before 6.7: 8 bytes a page; bit 63 present, 62 swapped, 61 of a file
        entries = np.frombuffer(file.read((stop - start) // _PAGE * 8), dtype=np.uint64)
        present, swapped, of_file = (entries >> np.uint64(bit) & np.uint64(1) for bit in (63, 62, 61))
        return not bool(((present & (of_file ^ np.uint64(1))) | swapped).any())


def _scan(pagemap: int, start: int, stop: int) -> int:
    """Number of ranges, 1 at most, with pages that are present or swapped out and of no file (ioctl PAGEMAP_SCAN)."""
    import fcntl

    found = (ctypes.c_uint64 * 3)()
    fields = (96, 0, start, stop, 0, ctypes.addressof(found), 1, 1, _FILE, _FILE, _PRESENT | _SWAPPED, _PRESENT)
    argument = bytearray(b"".join(value.to_bytes(8, "little") for value in fields))
    return int(fcntl.ioctl(pagemap, _SCAN, argument, True))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [
        t.detach()
        for m in module.modules()
        for own in (m._parameters, m._buffers)
        for t in own.values()
        if t is not None
    ]


class Residency:
    """A limit, and the networks that share it. `enter` is called before a network works."""

    def __init__(self, limit: int) -> None:
        if not can_release():
            raise InvalidRequest(
                "memory_limit", f"needs Linux with /proc/self/pagemap, this is {sys.platform}; leave it out"
            )
        self.limit = limit
        whole, anonymous = resident()
        self._libraries = max(whole - anonymous, LIBRARIES)
        self._tight = True
        self._networks: dict[nn.Module, tuple[nn.Module, ...]] = {}
        self._bytes: dict[nn.Module, int] = {}  # of a network's or layer's tensors that are mapped from files
        self._files: dict[nn.Module, int] = {}  # the same of a network, tables included
        self._following: dict[nn.Module, nn.Module] = {}
        self._kept: frozenset[nn.Module] | None = None  # layers that stay while the others leave; None: all stay

    def adopt(
        self,
        network: nn.Module,
        layers: Sequence[nn.Module] = (),
        *,
        tables: Sequence[nn.Module] = (),
        hooks: bool = False,
    ) -> None:
        """Puts a network under the limit. `layers` run one after the other; with `hooks` they are watched from outside.

        Of `tables` a few rows are read; they are not counted.
        """
        known = network in self._networks
        self._networks[network] = tuple(layers)
        mapped = {t.data_ptr() for t in file_backed(_tensors(network))}
        for module in (network, *layers):
            self._bytes[module] = self._bytes_of(module, mapped)
        self._files[network] = self._bytes[network]
        self._bytes[network] -= sum(self._bytes_of(table, mapped) for table in tables)
        weights = sum(self._bytes[other] for other in self._networks)
        self._tight = resident()[1] + self._libraries + weights + _SPARE > self.limit
        self._following |= dict(zip(layers, list(layers)[1:], strict=False))
        if hooks and not known:
            for layer in layers:
                layer.register_forward_pre_hook(self._runs)
                layer.register_forward_hook(self._ran)

    def mapped(self, network: nn.Module) -> bool:
        """Whether most of a network's weights are mapped from files."""
        return 2 * self._files[network] > sum(t.nbytes for t in _tensors(network))

    @staticmethod
    def _bytes_of(module: nn.Module, places: Collection[int]) -> int:
        """Bytes of a module's tensors that are at some addresses."""
        return sum(t.nbytes for t in _tensors(module) if t.data_ptr() in places)

    def after_read(self, tensor: Tensor) -> None:
        """For whoever reads weights once (checks, digests): a tensor's pages leave again, unless all have room."""
        if self._tight:
            release(tensor)

    @contextlib.contextmanager
    def working(self, network: nn.Module, *, growth: int) -> Iterator[None]:
        """Around the work of a network that needs `growth` bytes beside weights. Raises `CapacityError`.

        Its pages stay after it, until another network works: the next phase is often the same one's.
        """
        before = self._kept
        self._kept = None
        try:
            self._enter(network, growth)
            yield
        finally:
            self._kept = before

    def _enter(self, network: nn.Module, growth: int) -> None:
        growth += sum(m.weight.nbytes - m.packed_bytes for m in network.modules() if _packs(m))
        own, packs = self._bytes[network], any(_packs(m) for m in network.modules())
        room = self.limit - resident()[1] - self._libraries - growth
        if not packs and sum(self._bytes[other] for other in self._networks) <= room:
            return
        for other in self._networks:
            if other is not network:
                self.release(other)
        if not packs and own <= room:
            return
        sizes = {layer: self._bytes[layer] for layer in self._networks[network]}
        # products of packed matrices read the packed copies: a layer's pages are read once, to pack them. Else there are
        # the layer that runs and the one that is read ahead.
        room -= own - sum(sizes.values()) + (1 if packs else 2) * max(sizes.values(), default=0)
        if room < 0 or not sizes:
            raise CapacityError(
                f"memory_limit: {show_bytes(self.limit)} are too little for {type(network).__name__}: "
                f"{show_bytes(abs(room))} are missing beside {show_bytes(growth)} of activations and K/V; raise the limit, "
                "or use fewer or smaller references, a smaller output, fewer images at once, or an int8 model (limner "
                "quantize)"
            )
        kept: list[nn.Module] = []
        for layer, size in () if packs else sizes.items():
            room -= size
            if room < 0:
                break
            kept.append(layer)
        self.release(network)
        self._kept = frozenset(kept)
        _logger.info("memory limit: %d of %d layers of %s stay", len(kept), len(sizes), type(network).__name__)

    def release(self, network: nn.Module) -> None:
        """Drops all pages of a network that can be dropped."""
        for tensor in _tensors(network):
            release(tensor)

    def visit(self, layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
        """The layers in order; what has no room leaves after it ran."""
        for layer in layers:
            self._runs(layer)
            yield layer
            self._ran(layer)

    def _runs(self, layer: nn.Module, *_: Any) -> None:
        """Before a layer runs: the next one is on its way, unless it stays or is packed already."""
        following = self._following.get(layer)
        if following is None or self._kept is None or following in self._kept:
            return
        if not any(_packs(m) and m.packed_bytes for m in following.modules()):
            for tensor in _tensors(following):
                read_ahead(tensor)

    def _ran(self, layer: nn.Module, *_: Any) -> None:
        if self._kept is not None and layer not in self._kept:
            for tensor in _tensors(layer):
                release(tensor)


def _packs(module: nn.Module) -> TypeGuard[Int8Linear]:
    """Whether products of a matrix read a copy of it in another layout."""
    return isinstance(module, Int8Linear) and module.multiplies_int8()
