"""The tensors of a pretended device, and what is counted of each operation on them.

A tensor says `cuda:0` and holds one on the CPU that has its values, or (`with_values=False`) one on "meta", which has
none: then networks of true size run in a second, and their memory is counted. Operations refuse other devices as CUDA
does. Not pretended: kernels of CUDA, their rounding, their scratch memory, and time.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.pretend.guard import load_guard
from tests.support.pretend.streams import Event, Race, Stream, Streams, Uses

__all__ = ["WRITES", "Pretended", "PretendedDevice", "pretended_device", "real"]

_aten = torch.ops.aten
_WAITING = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique_dim", "_unique2"}
"""Operations whose result the host reads, or whose shape depends on values."""
WRITES = "limner-write"
"""How the names of the threads begin that write References to disk (`limner.store.writes`); where they wait ends with it."""
_ALIGNMENT = 512
"""CUDA's allocator hands out multiples of it."""


class Pretended(torch.Tensor):
    """A tensor on a pretended device. `inner` has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    held: _Held

    @staticmethod
    def __new__(cls, inner: torch.Tensor, owner: PretendedDevice, device: torch.device) -> Pretended:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.held = _Held(inner, owner, counted=device == owner.device)
        return made  # type: ignore[no-any-return]

    @property
    def inner(self) -> torch.Tensor:
        return self.held.inner

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def record_stream(self, stream: Any) -> None:
        self.held.memory.uses.recorded.add(stream.number)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretended({self.inner!r}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        owner = next(x for x in _tensors((args, kwargs or {})) if isinstance(x, Pretended)).held.owner
        return owner.run(func, args, kwargs or {})


@dataclass(eq=False)
class _Memory:
    """One allocation, by the tensors that share it. `of_graph`: it was made while a graph was captured, which keeps it."""

    nbytes: int
    uses: Uses
    sharers: int = 0
    of_graph: bool = False


class _Held:
    """Keeps the values of a tensor, and its memory counted, for as long as the tensor is there."""

    def __init__(self, inner: torch.Tensor, owner: PretendedDevice, *, counted: bool) -> None:
        self.inner, self.owner, self.counted = inner, owner, False
        self.memory = owner.allocated(inner) if counted else _Memory(0, Uses())
        self.counted = counted

    def __del__(self) -> None:
        if self.counted:
            self.owner.released(self.inner)


@dataclass(eq=False)
class PretendedDevice:
    """What a pretended device has done: work that was queued, and what made the host or the device wait.

    `launches`: kernels by name. `waits`: where the host waited for the device. `uploads`: where it copied from memory
    that is not page-locked, or waited for a copy. `streamed`: copies, in either direction, that nobody waits for. All by
    the line of the package, or else of a library, that asked. `limit` is its memory in bytes; `live` and `peak` what is
    and was in use.
    """

    kind: str = "cuda"
    with_values: bool = True
    limit: int = 1 << 50
    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    streamed: Counter[str] = field(default_factory=Counter)
    live: int = 0
    peak: int = 0

    def __post_init__(self) -> None:
        self.device = torch.device(self.kind, 0)
        self.streams = Streams(lambda what: self._waited(what))
        self.recording: _Graph | None = None  # the graph that is being captured
        self._memory: dict[int, _Memory] = {}
        self._pinned: dict[int, tuple[torch.Tensor, Uses]] = {}
        self._lock = threading.RLock()

    def clear(self) -> None:
        """Count from here."""
        for counter in (self.launches, self.waits, self.uploads, self.streamed):
            counter.clear()
        self.peak = self.live

    # memory

    def allocated(self, inner: torch.Tensor) -> _Memory:
        with self._lock:
            storage = inner.untyped_storage()
            found = self._memory.get(storage._cdata)
            if found is None:
                nbytes = -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
                if self.live + nbytes > self.limit:
                    raise torch.OutOfMemoryError(
                        f"CUDA out of memory. Tried to allocate {nbytes} bytes. {self.limit - self.live} are free."
                    )
                found = _Memory(nbytes, Uses(owner=self.streams.current), of_graph=self.captures())
                self._memory[storage._cdata] = found
                self.live += nbytes
                self.peak = max(self.peak, self.live)
            found.sharers += 1
            return found

    def released(self, inner: torch.Tensor) -> None:
        with self._lock:
            key = inner.untyped_storage()._cdata
            found = self._memory.get(key)
            if found is None:
                return
            found.sharers -= 1
            if not found.sharers:
                del self._memory[key]
                self.live -= found.nbytes
                with contextlib.suppress(Exception):
                    self.streams.free(found.uses)

    def is_pinned(self, x: torch.Tensor) -> bool:
        return isinstance(x, Pretended) or x.untyped_storage()._cdata in self._pinned

    def on_host(self, module: torch.nn.Module, dtype: torch.dtype | None = None) -> torch.nn.Module:
        """Give a module on "meta" tensors in (page-locked) host memory that have no values."""
        for owner in module.modules():
            for tensors in (owner._parameters, owner._buffers):
                for name, x in tensors.items():
                    if x is not None:
                        cast = x.detach().to(dtype) if dtype is not None and x.is_floating_point() else x.detach()
                        tensors[name] = Pretended(cast, self, torch.device("cpu"))  # type: ignore[assignment]
        return module

    def pin(self, x: torch.Tensor) -> torch.Tensor:
        self._pinned[x.untyped_storage()._cdata] = (x, Uses())
        return x

    # operations

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        try:
            with self._lock:
                return self._run(func, args, kwargs)
        except torch.OutOfMemoryError as error:
            problem = str(error)
        raise torch.OutOfMemoryError(problem)  # as CUDA's, which holds nothing of the operation

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func.overloadpacket.__name__
        tensors = list(_tensors((args, kwargs)))
        here = [x for x in tensors if self._is_here(x)]
        if name == "is_pinned":
            return self.is_pinned(args[0])
        if name in ("_pin_memory", "pin_memory"):
            return self.pin(args[0].clone())
        if name == "copy_" and self._is_here(args[0]) != self._is_here(args[1]):
            return self._copy(args[0], args[1], *args[2:], **kwargs)
        if kwargs.get("device") is not None:
            return self._placed(func, name, args, kwargs)
        if not here:
            return self._on_host(func, name, args, kwargs)
        self._refuse_others(name, tensors)
        if name.startswith("index") and len(here) < len(tensors):
            self._upload(f"{name} by places in host memory")
        chosen = any(x.dtype == torch.bool for x in _tensors(args[1:2])) if name in ("index", "index_put_") else False
        if chosen or name in _WAITING:
            self._waited(name)
            if not self.with_values and name == "_local_scalar_dense":
                return {torch.bool: True}.get(args[0].dtype, 1)
        if name == "_fused_sdp_choice":
            return _EFFICIENT
        call = functools.partial(_ATTENTION.get(name, func), *_map(real, args), **_map(real, kwargs))
        return self._wrap(call, name, tensors, func, args, kwargs)

    def _is_here(self, x: Any) -> bool:
        return isinstance(x, Pretended) and x.device == self.device

    def _refuse_others(self, name: str, tensors: list[torch.Tensor]) -> None:
        others = [x for x in tensors if not self._is_here(x) and x.dim() > 0]
        if others and not name.startswith(("index", "_index_put")):
            shapes = [f"{list(x.shape)} on {x.device}" for x in tensors]
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {', '.join(shapes)}")

    def _wrap(
        self, call: Any, name: str, tensors: list[torch.Tensor], func: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Give results their device, and note who read and wrote which memory."""
        given = {id(real(x)): x for x in tensors}

        def back(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or isinstance(x, Pretended):
                return x
            return given[id(x)] if id(x) in given else Pretended(x, self, self.device)

        made = _map(back, call())
        written = [
            x
            for i, argument in _written(func)
            for x in _tensors(args[i] if i < len(args) else kwargs.get(argument, ()))
        ]
        memory = {id(x.held.memory) for x in tensors if isinstance(x, Pretended)}
        new = [x for x in _tensors(made) if isinstance(x, Pretended) and id(x.held.memory) not in memory]
        if self.kind == "mps" and any(x.dtype == torch.float64 for x in new):
            raise TypeError(f"{name}: MPS has no float64")
        if name.startswith(("empty", "new_empty")):  # queues nothing; what used this memory before may still run
            for x in new if not self.captures() else ():
                x.held.memory.uses.writer = self.streams.current.now
            return made
        if written or new or not list(_tensors(made)):
            self.launches[name] += 1
            read, changed = ([x.held.memory for x in of if _is_counted(x)] for of in (tensors, [*written, *new]))
            if self.captures():
                _given(self.recording).uses.append((name, read, changed))
            else:
                self.use(name, read, changed)
        if self.captures():
            _given(self.recording).calls.append((call, _map(real, made), [x.inner for x in new]))
        return made

    def use(self, name: str, read: list[_Memory], changed: list[_Memory]) -> None:
        """An operation on the present stream reads and changes memory."""
        for memory in read:
            self.streams.read(memory.uses, self.streams.current, name)
        for memory in changed:
            self.streams.write(memory.uses, self.streams.current, name)

    def captures(self) -> bool:
        """Whether a graph captures what this thread queues."""
        return self.recording is not None and self.recording.thread == threading.get_ident()

    def _refuse_while_capturing(self, what: str) -> None:
        if self.captures() or (self.recording is not None and self.recording.mode == "global"):
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")

    def _placed(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Operations with a device of their own: factories, and copies to another device."""
        to_here, pinned = torch.device(kwargs["device"]).type == self.kind, kwargs.pop("pin_memory", False)
        source = args[0] if name == "_to_copy" else None
        if source is not None and self._is_here(source) != to_here:
            dtype = kwargs.get("dtype") or source.dtype
            if to_here:
                moved = source.to(dtype) if dtype != source.dtype else source
                target = self._empty_like(moved, dtype)
                return self._copy(target, moved, kwargs.get("non_blocking", False), pinned_as=source)
            there = Pretended(source.inner, self, self.device) if dtype == source.dtype else source.to(dtype)
            found = torch.empty_like(there.inner, device="cpu")
            if kwargs.get("non_blocking"):
                self.pin(found)
            self._copy(found, there, kwargs.get("non_blocking", False))
            return found
        place = ("cpu" if self.with_values else "meta") if to_here else kwargs["device"]
        call = functools.partial(func, *_map(real, args), **{**_map(real, kwargs), "device": torch.device(place)})
        if to_here:
            return self._wrap(call, name, list(_tensors(args)), func, args, kwargs)
        return self.pin(call()) if pinned else call()

    def _empty_like(self, x: torch.Tensor, dtype: torch.dtype) -> Pretended:
        place = "cpu" if self.with_values else "meta"
        if self.kind == "mps" and dtype == torch.float64:
            raise TypeError("MPS has no float64")
        return Pretended(torch.empty_like(real(x), dtype=dtype, device=place), self, self.device)

    def _copy(
        self, to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False, *, pinned_as: Any = None
    ) -> torch.Tensor:
        """Copy between the host and the device, on the present stream."""
        up = self._is_here(to)
        there, host = (to, source) if up else (source, to)
        host = pinned_as if pinned_as is not None else host
        if self.with_values or (real(to).device.type != "meta" and real(source).device.type != "meta"):
            real(to).copy_(real(source))
        elif not up and real(to).device.type == "cpu":
            real(to).zero_()
        streamed = non_blocking and self.is_pinned(host)
        current, uses = self.streams.current, there.held.memory.uses  # type: ignore[attr-defined]
        (self.streams.write if up else self.streams.read)(uses, current, "copy")
        if not streamed:
            self._refuse_while_capturing("a copy that waits")
        if streamed:
            self.streamed[_site()] += 1
            if host.untyped_storage()._cdata in self._pinned:
                host_uses = self._pinned[host.untyped_storage()._cdata][1]
                (self.streams.read if up else self.streams.write)(host_uses, current, "copy")
        elif up:
            self._upload("copy")
        else:
            self._waited("copy to the host")
            for who, place in current.clock.items():
                self.streams.host[who] = max(self.streams.host.get(who, 0), place)
        return to

    def _on_host(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Operations on the host, which may use page-locked memory only when streams are done with it."""
        pinned = bool(kwargs.get("pin_memory"))
        if pinned:
            kwargs = {**kwargs, "pin_memory": False}
        shadow = next((x.device for x in _tensors((args, kwargs)) if isinstance(x, Pretended)), None)
        if shadow is not None:  # of the host, without values
            out = func(*_map(real, args), **_map(real, kwargs))
            given = {id(real(x)): x for x in _tensors((args, kwargs))}
            return _map(
                lambda x: given.get(id(x), Pretended(x, self, shadow)) if isinstance(x, torch.Tensor) else x, out
            )
        if self._pinned:
            for i, x in enumerate(args):
                if isinstance(x, torch.Tensor) and (known := self._pinned.get(x.untyped_storage()._cdata)):
                    alias = func._schema.arguments[i].alias_info
                    writes = alias is not None and alias.is_write
                    if writes or (func._schema.returns and func._schema.returns[0].alias_info is None):
                        (self.streams.write if writes else self.streams.read)(known[1], None, name)
        out = func(*args, **kwargs)
        return self.pin(out) if pinned else out

    def _upload(self, what: str) -> None:
        self.uploads[f"{what} at {_site()}"] += 1

    def _waited(self, what: str) -> None:
        self._refuse_while_capturing(what)
        name = threading.current_thread().name
        by = f" in {WRITES}" if name.startswith(WRITES) else ""
        self.waits[f"{what} at {_site()}{by}"] += 1

    # standing in for torch.cuda

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replace what Limner and its libraries use of `torch.cuda`, and let threads make tensors here too."""
        cuda, streams = torch.cuda, self.streams

        def waiting(*_: Any) -> None:
            streams.synchronize()

        found: dict[str, Any] = {
            "_lazy_init": lambda: None,
            "device_count": lambda: 1,
            "is_available": lambda: False,
            "is_initialized": lambda: True,
            "get_device_name": lambda *_: "pretended",
            "get_device_capability": lambda *_: (9, 0),
            "get_device_properties": lambda *_: SimpleNamespace(
                name="pretended", total_memory=self.limit, major=9, minor=0, multi_processor_count=1
            ),
            "synchronize": waiting,
            "mem_get_info": lambda *_: (self.limit - self.live, self.limit),
            "memory_allocated": lambda *_: self.live,
            "memory_reserved": lambda *_: self.live,
            "max_memory_allocated": lambda *_: self.peak,
            "reset_peak_memory_stats": lambda *_: setattr(self, "peak", self.live),
            "empty_cache": lambda: None,
            "Stream": _bound(Stream, streams),
            "Event": _bound(Event, streams),
            "current_stream": lambda *_: streams.current,
            "stream": lambda stream: stream,
            "is_current_stream_capturing": self.captures,
            "CUDAGraph": _bound(_Graph, self),
            "graph": lambda graph, **how: graph.capturing(**how),
        }
        if self.kind == "mps":
            monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
            # torch chooses among Metal's kernels before an operation can be seen
            monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", _formula)
        else:
            for name, value in found.items():
                monkeypatch.setattr(cuda, name, value)
            # without CUDA torch takes the formula, whose scores CUDA's kernels never have in memory
            plain = torch.nn.functional.scaled_dot_product_attention
            chosen = functools.partial(_chosen, plain)
            monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", chosen)
        run = threading.Thread.run

        def run_here(thread: threading.Thread) -> None:
            with _Mode(self):
                run(thread)

        monkeypatch.setattr(threading.Thread, "run", run_here)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)


_Call = tuple[Any, Any, list[torch.Tensor]]
"""An operation with its arguments, what it returned, and those of these tensors that have memory of their own."""


class _Graph:
    """As `torch.cuda.CUDAGraph`: what was captured runs again, with the same memory, and nothing else does.

    Capturing runs nothing: results are NaN until the first replay. A replay reads the addresses that were captured, so
    memory that was freed since is refused; what is made while capturing belongs to the graph.
    """

    def __init__(self, owner: PretendedDevice) -> None:
        self._owner, self.calls = owner, list[_Call]()
        self.uses: list[tuple[str, list[_Memory], list[_Memory]]] = []
        self.thread, self.mode = 0, ""

    @contextlib.contextmanager
    def capturing(self, *, stream: Stream | None = None, capture_error_mode: str = "global") -> Iterator[None]:
        """Without a stream torch takes one for all graphs, of the device that was current at the first of them."""
        if stream is None:
            raise RuntimeError("captured on a stream of whichever device was current first; name one of this device")
        self.thread, self.mode = threading.get_ident(), capture_error_mode
        self._owner.recording = self
        try:
            with stream:
                yield
        finally:
            self._owner.recording = None
        for _, _, new in self.calls:
            for x in new:
                if x.is_floating_point():
                    x.fill_(float("nan"))

    def replay(self) -> None:
        self._owner.launches["graph"] += 1
        for name, read, changed in self.uses:
            if any(not memory.sharers and not memory.of_graph for memory in (*read, *changed)):
                raise Race(f"a graph uses memory that was freed after it was captured: {name}")
            self._owner.use(name, read, changed)
        for call, made, _ in self.calls:
            for old, new in zip(_tensors(made), _tensors(call()), strict=True):
                if old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                    old.copy_(new)


class _Mode(TorchDispatchMode):
    """Lets a thread make tensors on a pretended device."""

    def __init__(self, owner: PretendedDevice) -> None:
        super().__init__()
        self.owner = owner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.owner.run(func, args, dict(kwargs or {}))


@contextlib.contextmanager
def pretended_device(
    monkeypatch: pytest.MonkeyPatch, *, kind: str = "cuda", with_values: bool = True
) -> Iterator[PretendedDevice]:
    """A pretended device for this thread and those that it starts. Skips where it cannot be."""
    if (reason := load_guard()) is not None:
        pytest.skip(reason)
    device = PretendedDevice(kind=kind, with_values=with_values)
    only_lift = torch._C._only_lift_cpu_tensors()  # type: ignore[attr-defined]
    torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]  # torch.tensor(..., device=) copies
    try:
        device.patch(monkeypatch)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to() replaces parameters
        with _Mode(device):
            yield device
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        torch._C._set_only_lift_cpu_tensors(only_lift)  # type: ignore[attr-defined]


def _bound(kind: type, owner: Any) -> type:
    """A class without arguments, as libraries name it in annotations when they are imported."""

    def make(self: Any, *_: Any, **__: Any) -> None:
        kind.__init__(self, owner)

    return type(kind.__name__, (kind,), {"__init__": make})


def real(x: Any) -> Any:
    """Return what has the values of a tensor; everything else as it is."""
    return x.inner if isinstance(x, Pretended) else x


def _is_counted(x: Any) -> bool:
    return isinstance(x, Pretended) and x.held.counted


def _given(graph: _Graph | None) -> _Graph:
    assert graph is not None
    return graph


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)


def _map(change: Callable[[Any], Any], tree: Any) -> Any:
    """Change the leaves of arguments or results, lists and tuples in them included."""
    if isinstance(tree, (list, tuple)):
        return type(tree)([_map(change, value) for value in tree])
    if isinstance(tree, dict):
        return {name: _map(change, value) for name, value in tree.items()}
    return change(tree)


@functools.cache
def _written(func: Any) -> list[tuple[int, str]]:
    """The arguments that an operation writes to."""
    arguments = enumerate(func._schema.arguments)
    return [(i, x.name) for i, x in arguments if x.alias_info is not None and x.alias_info.is_write]


def _site() -> str:
    """The innermost line of the package that is running, or else of a library on it."""
    frame: Any = sys._getframe(1)
    other = "?"
    while frame is not None:
        file = frame.f_code.co_filename
        if "/limner/" in file:
            return f"{file.rpartition('/limner/')[2]}:{frame.f_lineno}"
        if other == "?" and ("/transformers/" in file or "/diffusers/" in file):
            other = f"{file.rpartition('site-packages/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return other


# attention kernels of CUDA


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any = None, **options: Any) -> Any:
    """(B, H, S, D): the result and its log-sum-exp in float32, as torch's kernels for CUDA return them."""
    if q.device.type == "meta":
        return torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device="meta")
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, is_causal=bool(options.get("is_causal")), attn_mask=bias, scale=options.get("scale")
    )
    return out, lse.float()


def _chosen(plain: Any, q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, **options: Any) -> Any:
    """What torch chooses on CUDA for any dtype, mask and heads: the efficient kernel."""
    if not isinstance(q, Pretended):
        return plain(q, k, v, attn_mask, dropout_p, **options)
    if options.get("enable_gqa"):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, float("-inf"))
    causal, scale = bool(options.get("is_causal")), options.get("scale")
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, attn_mask, False, 0.0, causal, scale=scale)[0]


def _formula(q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0, **options: Any) -> Any:
    if options.get("enable_gqa"):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (options.get("scale") or q.shape[-1] ** -0.5)
    if options.get("is_causal"):
        attn_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.softmax(scores, dim=-1) @ v


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **options: Any) -> Any:
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] % 8 or any(x.stride(-1) != 1 for x in (q, k, v)):
        raise RuntimeError(
            f"flash attention takes half precision and heads of multiples of 8, not {q.dtype}, {q.shape}"
        )
    out, lse = _attention(q, k, v, **options)
    none = torch.empty(0, device=out.device)
    return out, lse, none, none, q.shape[2], k.shape[2], none, none, none


def _efficient(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Any:
    none = torch.empty(0, dtype=torch.int64, device=q.device)
    return (*_attention(q, k, v, bias, is_causal=is_causal, **options), none, none)


_EFFICIENT = 2
"""What torch chooses for any dtype and mask, in the numbers of `torch.nn.attention.SDPBackend`."""
_ATTENTION: dict[str, Any] = {
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_efficient_attention": _efficient,
}
