"""Read a small decoder for previews, as TAEF2, from a safetensors file; its shapes say its layers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from limner.errors import CheckpointError
from limner.model.tiny_decoder import TinyBlock, TinyDecoder, Twice
from limner.weights.files import WIDE, SafetensorsFile

__all__ = ["load_tiny_decoder"]

_NAME = re.compile(
    r"(?P<prefix>(?:taesd_decoder\.|decoder\.)?)(?P<layers>(?:layers\.)?)(?P<index>\d{1,2})\.(?P<rest>.+)"
)
_MAX_WIDTH = 1024
_DOUBLINGS = 3


def load_tiny_decoder(source: Path, *, device: torch.device) -> TinyDecoder:
    """Load the decoder of a file in the names of its makers: a sequence, with or without `decoder.`, or `decoder.layers.`.

    Encoders in the same file are left out. Raises `CheckpointError`.
    """

    def refuse(why: str) -> NoReturn:
        raise CheckpointError(
            f"{source}: {why}; a small decoder for previews, as taef2_decoder.safetensors, is convolutions and blocks that "
            "make colours of latents: give that file, or leave preview_decoder out"
        )

    if not source.is_file():
        raise CheckpointError(f"preview_decoder: {source} is not a file; give the .safetensors file of a small decoder")
    file = SafetensorsFile(source)
    found: dict[int, dict[str, str]] = {}
    for name, info in file.infos.items():
        if match := _NAME.fullmatch(name):
            if info.dtype not in WIDE or any(not 0 < size <= 4 * _MAX_WIDTH for size in info.shape):
                refuse(f"{name} is {info.dtype} {list(info.shape)}")
            found.setdefault(int(match["index"]), {})[match["rest"]] = name
        elif not name.startswith("encoder."):
            refuse(f"holds {name}")
    # A sequence starts with what squeezes latents; in `decoder.layers.` it has no number.
    first = min(found, default=0)
    if not found or first not in (0, 1):
        refuse("has no layers that are known")
    layers: list[nn.Module] = []
    for index in range(first, max(found) + 1):
        tensors = found.get(index)
        shapes = {rest: file.infos[name].shape for rest, name in (tensors or {}).items()}
        layers.append(_layer(shapes) if shapes else nn.ReLU() if index == first + 1 else Twice())
    if sum(isinstance(layer, Twice) for layer in layers) != _DOUBLINGS:
        refuse(f"doubles sides {sum(isinstance(layer, Twice) for layer in layers)} times, latents need {_DOUBLINGS}")
    if not isinstance(layers[0], nn.Conv2d) or not isinstance(layers[-1], nn.Conv2d) or layers[-1].out_channels != 3:
        refuse("does not end in three colours")
    state: dict[str, Tensor] = {
        f"layers.{index - first}.{rest}": file.read(name).float()
        for index, tensors in found.items()
        for rest, name in tensors.items()
    }
    decoder = TinyDecoder(layers)
    try:
        decoder.load_state_dict(state)
    except RuntimeError as error:
        refuse(" ".join(str(error).split())[:300])
    if not all(torch.isfinite(value).all() for value in state.values()):
        refuse("holds values that are not finite")
    return decoder.to(device).requires_grad_(False).eval()


def _layer(shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """Return the layer whose tensors have these shapes; what does not fit shows when they are assigned."""
    block, plain = shapes.get("conv.0.weight", ()), shapes.get("weight", ())
    if len(block) == 4:
        return TinyBlock(block[1], block[0], pooled="pool.0.weight" in shapes)
    if len(plain) == 4:
        return nn.Conv2d(plain[1], plain[0], plain[2], padding=plain[2] // 2, bias="bias" in shapes)
    return nn.Identity()
