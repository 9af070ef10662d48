"""A forward of the transformer as one CUDA graph for each shape: replaying it is one launch instead of over a thousand.

It pays where queuing takes longer than computing: small pictures on a fast GPU. A graph reads and writes fixed memory, so
inputs are copied into it (K/V of references when they are others than last time), and the result out of it. What a graph
does not cover, as large pictures or weights and K/V in host memory, runs as without. Knows nothing of steps or prompts.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limner.model.context import InPlace
from limner.model.kv import ReferenceKV
from limner.model.rope import Rope
from limner.model.transformer import Transformer

__all__ = ["StepGraphs"]

_logger = logging.getLogger("limner")
_LARGEST = 4096
"""Tokens of a batch and of its references together. Above, a step computes for longer than Python queues it."""
_MOST = 4
"""Graphs that are kept, the last used ones. Each has memory for its activations and a copy of the K/V."""


class StepGraphs:
    """Calls a transformer as it is called, by graphs where they cover it. One call at a time uses them."""

    def __init__(self, *, largest: int = _LARGEST, most: int = _MOST) -> None:
        self._largest, self._most = largest, most
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(
        self,
        transformer: Transformer,
        img_tokens: Tensor,
        txt_tokens: Tensor,
        sigma: Tensor,
        *,
        rope: Rope,
        references: ReferenceKV | None = None,
        ref_tokens: Tensor | None = None,
        ref_weights: Sequence[tuple[int, float]] | None = None,
        kept: Any = None,
        **places: Any,
    ) -> Tensor:
        """Return what `Transformer.forward` returns for the same arguments."""
        how: dict[str, Any] = {"ref_weights": ref_weights, **places}
        given = {"img": img_tokens, "txt": txt_tokens, "sigma": sigma, "cos": rope.cos_SP, "sin": rope.sin_SP}
        if ref_tokens is not None:
            given["ref"] = ref_tokens
        if kept is not None or not self._covers(transformer, given, references):
            velocity: Tensor = transformer(
                img_tokens, txt_tokens, sigma, rope=rope, references=references, ref_tokens=ref_tokens, kept=kept, **how
            )
            return velocity
        tensors, hooks = _state(transformer)
        shapes = tuple((name, x.shape, x.dtype) for name, x in given.items())
        layers = tuple((x.shape, x.dtype) for x in references.kv[0]) if references is not None else ()
        weights = None if ref_weights is None else tuple(ref_weights)
        key = shapes, layers, weights, transformer.kernel, tensors, tuple(map(id, hooks))
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None:
                while len(self._graphs) >= self._most:
                    self._graphs.popitem(last=False)
                graph = self._graphs[key] = _Graph(transformer, given, references, how, hooks)
                _logger.info("CUDA graph of a step: %s", {name: list(x.shape) for name, x in given.items()})
            self._graphs.move_to_end(key)
            return graph(given, references)

    def _covers(self, transformer: Transformer, given: dict[str, Tensor], references: ReferenceKV | None) -> bool:
        execution, (batch, num_img, _) = transformer.execution, given["img"].shape
        own = num_img + given["txt"].shape[1] + (given["ref"].shape[1] if "ref" in given else 0)
        return (
            transformer.device.type == "cuda"
            and isinstance(execution.staging, InPlace)
            and execution.ranks.alone
            and not torch.is_grad_enabled()
            and (references is None or references.device == transformer.device)
            and batch * own + (references.num_tokens if references is not None else 0) <= self._largest
        )


class _Graph:
    """One captured forward, with the memory that it reads and writes."""

    def __init__(
        self,
        transformer: Transformer,
        given: dict[str, Tensor],
        references: ReferenceKV | None,
        how: dict[str, Any],
        hooks: list[Any],
    ) -> None:
        self._hooks = hooks  # held, so that no other hook gets the id of one of them
        self._given = {name: x.clone() for name, x in given.items()}
        self._last: dict[str, Tensor] = {}
        self._references: ReferenceKV | None = None
        self._last_references: weakref.ref[ReferenceKV] | None = None
        if references is not None:
            layers = tuple(type(layer)(*(x.clone() for x in layer)) for layer in references.kv)
            self._references = ReferenceKV(layers=layers)
        own = self._given

        def forward() -> Tensor:
            velocity: Tensor = transformer(
                own["img"],
                own["txt"],
                own["sigma"],
                rope=Rope(own["cos"], own["sin"]),
                references=self._references,
                ref_tokens=own.get("ref"),
                **how,
            )
            return velocity

        self._graph, self._out = _capture(forward, transformer.device)

    def __call__(self, given: dict[str, Tensor], references: ReferenceKV | None) -> Tensor:
        for name, x in given.items():
            if name in ("img", "sigma") or self._last.get(name) is not x:  # the others are the same in all steps
                self._given[name].copy_(x)
        self._last = {name: x for name, x in given.items() if name not in ("img", "sigma")}
        last = self._last_references() if self._last_references is not None else None
        if references is not None and self._references is not None and last is not references:
            for own, layer in zip(self._references.kv, references.kv, strict=True):
                for to, x in zip(own, layer, strict=True):
                    to.copy_(x)
            self._last_references = weakref.ref(references)
        self._graph.replay()
        return self._out.clone()  # the next replay overwrites it


def _capture(call: Callable[[], Tensor], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Return the graph of a call and its result, which is there once the graph was replayed.

    Captured on a stream of that device: torch's own is of whichever device was current first. Other threads, as the one
    that writes references to disk, may wait for the device meanwhile.
    """
    side, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(main)
    with torch.cuda.stream(side):  # libraries take their workspaces, and choose kernels, before
        call()
    main.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        out = call()
    return graph, out


def _state(network: nn.Module) -> tuple[tuple[int, ...], list[Any]]:
    """The addresses that a graph reads weights from, and the hooks that it has in it."""
    addresses: list[int] = []
    hooks: list[Any] = []
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            addresses += [x.data_ptr() for x in tensors.values() if x is not None]
        hooks += module._forward_hooks.values()
    return tuple(addresses), hooks
