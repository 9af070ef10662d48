"""What is kept of references, to and from the device where it is used. Knows nothing of blocks or weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import torch

from limner.model.kv import AnyLayerKV, ReferenceKV

__all__ = ["layer_kv", "on_device", "to_device", "to_host"]


def layer_kv(references: ReferenceKV | None, num_layers: int, *, device: torch.device) -> Iterator[AnyLayerKV | None]:
    """Yield the K/V of each of `num_layers` layers on a device; None for each without references. Raises `ValueError`."""
    if references is None:
        return repeat(None, num_layers)
    if len(references.kv) != num_layers:
        raise ValueError(f"references have {len(references.kv)} layers of K/V, the model {num_layers}")
    return on_device(references.kv, device)


def on_device(layers: Sequence[AnyLayerKV], device: torch.device) -> Iterator[AnyLayerKV]:
    """Yield the layers in order, on `device`; the next one is copied while the current one is used.

    On CUDA, copies from host memory run on a stream of their own (without waiting if the memory is pinned), and at most
    two layers are on the device.
    """
    if not layers or layers[0].k.device == device:
        yield from layers
        return
    if device.type != "cuda":
        for layer in layers:
            yield layer.to(device)
        return
    side, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)  # type: ignore[no-untyped-call]

    def move(layer: AnyLayerKV) -> AnyLayerKV:
        side.wait_stream(main)  # the memory that the copy overwrites is free by then
        with torch.cuda.stream(side):
            return layer.to(device, non_blocking=True)

    following = move(layers[0])
    for i in range(len(layers)):
        current = following
        main.wait_stream(side)
        for x in current:
            x.record_stream(main)
        if i + 1 < len(layers):
            following = move(layers[i + 1])
        yield current


def to_device(layers: Sequence[Any], device: torch.device) -> tuple[Any, ...]:
    """Return layers, or tokens, on a device. To CUDA the host does not wait for copies out of page-locked memory."""
    return tuple(layer.to(device, non_blocking=device.type == "cuda") for layer in layers)


def to_host(layers: Sequence[Any], *, page_locked: bool) -> tuple[Any, ...]:
    """Return copies of layers, or tokens, in host memory. From a device to page-locked memory it waits once, at the end."""

    def copy(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x, device="cpu", pin_memory=page_locked).copy_(x, non_blocking=page_locked)

    made = tuple(type(layer)(*map(copy, layer)) for layer in layers)
    if page_locked and (device := layers[0][0].device).type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return made
