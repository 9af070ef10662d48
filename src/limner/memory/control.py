"""Bytes of what a call may ask for beyond prompt and references: canvases, guidance, K/V that are used again.

Pure functions of geometry, formats and workload, beside `limner.memory.components`, which counts the call itself. Imports
no torch and reads no files.
"""

from __future__ import annotations

from limner.config import WHOLE_PIXELS, AutoencoderConfig, ModelGeometry, TransformerConfig
from limner.grid import num_tokens
from limner.memory.components import Formats, Workload, activations, encode_bytes, kv_bytes

__all__ = ["control_bytes", "held_bytes", "phase_bytes", "put_back_bytes", "reused_bytes", "step_bytes"]

_FLOAT32 = 4
_SURROUNDINGS = 5
"""Tensors of a batch's latents that a canvas adds to a step: its tokens, the noise, both mixed, and two products."""
_VELOCITIES = 3
"""The same for each further forward: its velocity, widened, and the difference to the other."""
_PICTURE, _MASK = 4, 1
"""Bytes of a pixel in a picture of Pillow, and in a mask."""
_STITCH = 24
"""Bytes a pixel of a canvas while it is cut, or a result put back: wide masks, scaled parts, the result."""
_PRESERVE = 128
"""Bytes a drawn pixel while what an edit left alone is looked for: two pictures in float32, pyramids, gradients.

Both as measured by `benchmarks/canvas.py`: the growth of the process, 125 bytes a pixel at 2048x2048, 19 at 4096x4096
(24 once; docs/log.md).
"""


_PHASES = ("encode text", "encode references", "prefill", "denoise", "decode", "put back")


def reused_bytes(config: TransformerConfig, workload: Workload, *, formats: Formats) -> int:
    """Return the bytes of K/V that joint references have in one step, for all images and both prompts of guidance."""
    one = kv_bytes(config, workload.num_ref, itemsize=formats.itemsize, kv=formats.kv)
    return (1 + workload.guides) * workload.batch * one


def step_bytes(config: TransformerConfig, workload: Workload, *, formats: Formats) -> int:
    """Return the bytes that canvases and further forwards add to a step, on top of one forward's activations."""
    latents = workload.batch * num_tokens(workload.size) * config.in_channels * _FLOAT32
    found = _SURROUNDINGS * latents if workload.canvas_pixels else 0
    found += _VELOCITIES * latents * (workload.guides + workload.guides_references)
    if workload.guides:  # negative prompts
        found += workload.batch * workload.num_text * config.text_width * formats.itemsize
    return found


def held_bytes(workload: Workload) -> int:
    """Return the bytes of canvases and masks, which are in memory all the time."""
    return workload.canvas_pixels * (_PICTURE + _MASK)


def put_back_bytes(workload: Workload) -> int:
    """Return the bytes that putting results back into their canvases takes, once they are decoded."""
    if not workload.canvas_pixels:
        return 0
    width, height = workload.size
    drawn = width * height * (workload.batch * _PICTURE + (_PRESERVE if workload.preserves else 0))
    return drawn + workload.result_pixels * _PICTURE + workload.canvas_pixels * _STITCH


def phase_bytes(
    geometry: ModelGeometry, workload: Workload, *, formats: Formats, whole_pixels: int = WHOLE_PIXELS
) -> dict[str, int]:
    """Return what `activations` does, with what controls add to each phase of a network, and "put back" with a canvas.

    K/V that are used again are not in it, nor are canvases themselves.
    """
    found = activations(geometry, workload, formats=formats, whole_pixels=whole_pixels)
    found["denoise"] += step_bytes(geometry.transformer, workload, formats=formats)
    if workload.canvas_pixels:
        width, height = workload.size
        encoded = encode_bytes(geometry.autoencoder, width * height, itemsize=formats.itemsize)
        found["encode references"] = max(found.get("encode references", 0), encoded)
        found["put back"] = put_back_bytes(workload)
    return {name: found[name] for name in _PHASES if name in found}


def control_bytes(
    transformer: TransformerConfig,
    autoencoder: AutoencoderConfig,
    workload: Workload,
    *,
    formats: Formats,
    needed: int,
    num_parts: int = 1,
) -> int:
    """Return the bytes that controls add to the `needed` ones of a call; 0 for a call without any.

    `num_parts` are the processes that the heads are divided among.
    """
    found = held_bytes(workload) + step_bytes(transformer, workload, formats=formats)
    if workload.reuses:
        found += reused_bytes(transformer, workload, formats=formats) // num_parts
    others = put_back_bytes(workload)  # done by turns with the rest
    if workload.canvas_pixels:
        width, height = workload.size
        others = max(others, encode_bytes(autoencoder, width * height, itemsize=formats.itemsize))
    return found + max(0, others - needed)
