"""Content digests of networks: equal digests mean equal weights.

A digest covers names, dtypes, shapes and bytes of all parameters and buffers. It is cached until a tensor is replaced or
changed in place. A change shows in the tensor's address and version. Writes through `.data` change neither, so samples of
the values are compared too, at least one of each row. Only a write that hits no sample and no version is missed.

Reading all bytes takes seconds for a large model. So digests of networks that were loaded from files are cached on disk
for later processes, by device, inode, size and times of the files, and used only for a network with the same samples.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from limner.errors import OutputError
from limner.files import write_file

__all__ = ["FileStamp", "Fingerprint", "WeightDigests", "digest_tensors", "file_stamp", "fingerprint", "sample"]

Fingerprint = tuple[tuple[tuple[int, int], ...], bytes]
FileStamp = tuple[tuple[str, int, int, int, int, int], ...]
_SETTLED = 2.0
"""Seconds after which a second write gives a file another time, however coarse the filesystem's clock."""


class WeightDigests:
    """Digests of networks, computed on first use and again after a change.

    `after` is called with each tensor that was read: under a memory limit its pages are then released.
    """

    def __init__(self, *, after: Callable[[Tensor], None] | None = None) -> None:
        self.after = after
        self._known: WeakKeyDictionary[nn.Module, tuple[Fingerprint, str]] = WeakKeyDictionary()
        self._loaded: WeakKeyDictionary[nn.Module, tuple[Fingerprint, Path]] = WeakKeyDictionary()
        self._of_whole: WeakKeyDictionary[nn.Module, tuple[Fingerprint, Callable[[], str]]] = WeakKeyDictionary()

    def of(self, module: nn.Module) -> str:
        """Return the SHA-256 in hex of a network's tensors."""
        state = fingerprint(module, after=self.after)
        known = self._known.get(module)
        if known is None or known[0] != state:
            known = self._known[module] = (state, self._find(module, state))
        return known[1]

    def loaded(
        self,
        module: nn.Module,
        source: Path,
        *,
        before: FileStamp | None,
        shard: tuple[int, int] | None = None,
        whole: Callable[[], str] | None = None,
    ) -> None:
        """Report that a network was just loaded from a file or folder, whose `file_stamp` was `before`.

        If it is the shard (rank, size) of a network, its digest is that of the whole network, which `whole` computes.
        """
        if whole is not None:
            self._of_whole[module] = fingerprint(module, after=self.after), whole
        cache = _cache_folder()
        if cache is not None and before is not None and file_stamp(source) == before:
            parts = [before, _layout(module), *([shard] if shard else [])]
            name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
            self._loaded[module] = fingerprint(module, after=self.after), cache / f"{name}.json"

    def remember(self, module: nn.Module, digest: str, *, at: Fingerprint | None = None) -> None:
        """Set the digest of a network that was derived from other digests; with `at` only if that is its state."""
        state = fingerprint(module)
        if at is None or at == state:
            self._known[module] = state, digest

    @contextlib.contextmanager
    def moving(self, module: nn.Module) -> Iterator[None]:
        """Wrap a move to another device, which changes no value: cached digests of the network stay valid."""
        before = fingerprint(module)
        known, loaded = self._known.get(module), self._loaded.get(module)
        yield
        if known is not None and known[0] == before:
            self._known[module] = fingerprint(module), known[1]
        if loaded is not None and loaded[0] == before:
            self._loaded[module] = fingerprint(module), loaded[1]

    def _find(self, module: nn.Module, state: Fingerprint) -> str:
        """Return the digest that another process cached, if the network is unchanged since loading; else compute it."""
        of_shard, whole = self._of_whole.get(module, (None, None))

        def make() -> str:
            if whole is not None and of_shard == state:
                return whole()
            return _digest(module.state_dict(), after=self.after)

        as_loaded, file = self._loaded.get(module, (None, None))
        if file is None or as_loaded != state:
            return make()
        samples = state[1].hex()
        with contextlib.suppress(OSError, ValueError, AttributeError):
            cached = json.loads(file.read_text())
            if cached.get("samples") == samples and re.fullmatch(r"[0-9a-f]{64}", str(cached.get("digest"))):
                return str(cached["digest"])
        digest = make()
        with contextlib.suppress(OSError, OutputError):  # a cache that cannot be written: the next process hashes again
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, json.dumps({"samples": samples, "digest": digest}).encode())
        return digest


@torch.no_grad()
def fingerprint(module: nn.Module, *, after: Callable[[Tensor], None] | None = None) -> Fingerprint:
    """Return address, version and samples of each tensor: cheap to compute, and different after a change."""
    tensors = [
        t for m in module.modules() for own in (m._parameters, m._buffers) for t in own.values() if t is not None
    ]
    samples: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for t in tensors:
        if t.numel():
            some = sample(t)
            if after is not None:
                some = some.clone()
                after(t)
            samples.setdefault((t.dtype, t.device), []).append(some)
    values = hashlib.sha256()
    for alike in samples.values():
        values.update(torch.cat(alike).cpu().view(torch.uint8).numpy().data)
    return tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors), values.digest()


def sample(tensor: Tensor) -> Tensor:
    """Return values of a tensor, at least one of each row, as one axis.

    The step is one less than a row's length, so that each row is sampled in another column.
    """
    step = max(1, tensor.numel() // tensor.shape[0] - 1) if tensor.dim() and tensor.numel() else 1
    flat = tensor if tensor.is_contiguous() else tensor.reshape(-1)
    return flat.as_strided((-(-tensor.numel() // step),), (step,))


def file_stamp(source: Path) -> FileStamp | None:
    """Return what identifies the state of a file or of a folder's files; None if so new that a change might not show."""
    found = []
    try:
        for path in [source] if source.is_file() else sorted(path for path in source.iterdir() if path.is_file()):
            s = path.stat()
            if max(s.st_mtime, s.st_ctime) > time.time() - _SETTLED:
                return None
            found.append((path.name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns))
    except OSError:
        return None
    return tuple(found)


def _cache_folder() -> Path | None:
    """Return `$LIMNER_CACHE`, or `limner` in the user's cache folder; None if the user has no home."""
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return Path(os.environ.get("LIMNER_CACHE") or caches / "limner") / "digests"


def _layout(module: nn.Module) -> list[tuple[str, str, str, list[int]]]:
    return [(name, t.device.type, str(t.dtype), list(t.shape)) for name, t in module.state_dict().items()]


def digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the digest of a network whose tensors come one at a time, in its own order."""
    total = hashlib.sha256()
    for name, tensor in tensors:
        total.update(f"{name}\0".encode() + _digest_tensor(tensor))
    return total.hexdigest()


def _digest(tensors: dict[str, Tensor], *, after: Callable[[Tensor], None] | None = None) -> str:
    def one(tensor: Tensor) -> bytes:
        digest = _digest_tensor(tensor)
        if after is not None:
            after(tensor)
        return digest

    with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter lock
        parts = pool.map(one, tensors.values())
        total = hashlib.sha256()
        for name, part in zip(tensors, parts, strict=True):
            total.update(f"{name}\0".encode() + part)
    return total.hexdigest()


def _digest_tensor(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\0".encode())
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.digest()
