"""K/V of layers on their way to a device."""

from __future__ import annotations

import torch
from tests.support.references import references


def test_staged_layers_are_the_same_layers() -> None:
    from limner.model.kv import quantize_layer
    from limner.model.transfer import on_device

    layers = references().layers
    assert all(a is b for a, b in zip(on_device(layers, torch.device("cpu")), layers, strict=True))
    narrow = [quantize_layer(layer, "int8") for layer in layers]
    wide = [layer.dense(torch.bfloat16) for layer in on_device(narrow, torch.device("cpu"))]
    assert {x.dtype for layer in wide for x in layer} == {torch.bfloat16}
    assert [layer.k.device.type for layer in on_device(layers, torch.device("meta"))] == ["meta"] * 3
