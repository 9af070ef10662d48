"""Bytes of the parts of a call: weights, K/V and activations, as pure functions of geometry, formats and workload.

Does not know which of them are in memory at the same time (`limner.memory.plan`). Imports no torch and reads no files.

The counts of live tensors in activations (`_LIVE_*`) are those of the code in `limner.model`, checked against measured
peaks (benchmarks/full_size.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from limner.config import WHOLE_PIXELS, AutoencoderConfig, ModelGeometry, TextConfig, TransformerConfig
from limner.grid import PIXELS, num_tokens

__all__ = [
    "Formats",
    "Workload",
    "activations",
    "autoencoder_bytes",
    "call_bytes",
    "download_bytes",
    "encode_bytes",
    "kv_bytes",
    "least_resident",
    "num_embedding_weights",
    "num_matrix_weights",
    "text_bytes",
    "text_layer_weights",
    "tile_space",
    "transformer_bytes",
]

_LIVE_ENCODE = 5
_LIVE_DECODE = 6
"""Feature maps of the widest full-resolution stage that are alive at once when the autoencoder runs on whole pictures."""
_LIVE_STRIPS = 2
"""The same when it runs in strips."""
_STRIP_SCRATCH = (1 << 15) * 4 * 6
"""Scratch bytes of a strip for each channel: six float32 maps of its pixels."""
_TILE_SLAB, _TILE_ROWS, _TILE_FEATURES, _TILE_WIDE_FEATURES = 1536 * 12288, 384, 384, 256
"""Of products with tiles (`native/tiles.c`): bytes of rows that are laid out at a time; rows and features for which a
thread has sums; features of which it has a copy in bfloat16 (in int8 as many as sums)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """The sizes of one call: (width, height) in pixels, of references after their processing.

    `joint`: references are tokens of every step (`limner.kinds`), not K/V that are kept. `guides` and `guides_references`:
    a further forward in each step, with negative prompts and without references. `reuses`: K/V of joint references are
    kept from the first step on. `canvas_pixels` are those of all canvases together, `result_pixels` those of all results
    that are put back into them; `preserves`: what the edits left alone is looked for.
    """

    size: tuple[int, int]
    references: tuple[tuple[int, int], ...] = ()
    batch: int = 1
    num_text: int = 512
    joint: bool = False
    guides: bool = False
    guides_references: bool = False
    reuses: bool = False
    canvas_pixels: int = 0
    result_pixels: int = 0
    preserves: bool = False

    @property
    def num_ref(self) -> int:
        return num_tokens(*self.references)

    @property
    def num_own(self) -> int:
        return num_tokens(self.size) + self.num_text


@dataclass(frozen=True, kw_only=True, slots=True)
class Formats:
    """The formats of weights and K/V: bytes of a value (`itemsize`), int8 or not, and which weights no file backs.

    `quantize` is of the transformer, `quantize_text` of the text encoder. How a CPU multiplies int8: `packed`, products
    read a second copy of the matrices, in another layout; `tile_threads`, they read the matrices as stored, and so many
    threads have working space (in bfloat16 too); neither: matrices are widened. `anonymous` names the networks
    ("text_encoder", "transformer", "autoencoder") whose weights are converted or quantized while loading.
    """

    itemsize: int = 2
    quantize: str | None = None
    quantize_text: bool = False
    kv: str | None = None
    packed: bool = True
    tile_threads: int = 0
    anonymous: frozenset[str] = frozenset()

    @property
    def widened(self) -> bool:
        """True if int8 matrices are widened for their products."""
        return not (self.packed or self.tile_threads)


def _block_weights(config: TransformerConfig) -> int:
    """Count the weights in the matrices of a single-stream block, or of one stream of a double-stream block."""
    return 4 * config.width**2 + 3 * config.width * config.mlp_width


def num_matrix_weights(config: TransformerConfig) -> int:
    """Count the weights in the matrices of all blocks, which int8 quantizes."""
    return (2 * config.num_double_blocks + config.num_single_blocks) * _block_weights(config)


def transformer_bytes(config: TransformerConfig, formats: Formats) -> int:
    """Return the bytes of all weights; int8 matrices have a float32 scale for each row."""
    c, m = config.width, config.mlp_width
    wide = config.time_channels * c + c * c + 15 * c * c + 2 * c * c
    wide += c * (config.in_channels + config.out_channels + config.text_width)
    wide += config.head_dim * (4 * config.num_double_blocks + 2 * config.num_single_blocks)
    if formats.quantize is None:
        return (wide + num_matrix_weights(config)) * formats.itemsize
    rows = config.num_double_blocks * 2 * (5 * c + 2 * m) + config.num_single_blocks * (4 * c + 2 * m)
    return wide * formats.itemsize + num_matrix_weights(config) + 4 * rows


def text_layer_weights(config: TextConfig) -> int:
    """Count the weights in the matrices of one layer of the text encoder, which int8 quantizes."""
    heads = config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    return config.width * (heads + 3 * config.mlp_width)


def _text_layer(config: TextConfig, formats: Formats) -> int:
    """Bytes of one layer of the text encoder; int8 matrices have a float32 scale for each row."""
    norms = (2 * config.width + 2 * config.head_dim) * formats.itemsize
    if not formats.quantize_text:
        return text_layer_weights(config) * formats.itemsize + norms
    rows = config.head_dim * (config.num_heads + 2 * config.num_kv_heads) + 2 * config.mlp_width + 2 * config.width
    return text_layer_weights(config) + 4 * rows + norms


def num_embedding_weights(config: TextConfig) -> int:
    """Count the weights of the text encoder's embedding."""
    return config.vocab_size * config.width


def text_bytes(config: TextConfig, formats: Formats) -> int:
    """Return the bytes of the embedding and of the layers in use; the final norm counts if all layers are in use."""
    norm = config.width if config.num_used == config.num_layers else 0
    wide = (num_embedding_weights(config) + norm) * formats.itemsize
    return wide + config.num_used * _text_layer(config, formats)


def download_bytes(geometry: ModelGeometry) -> int:
    """Return the bytes of a model's files in bfloat16: all layers of the text encoder, its norm and its head too."""
    text, formats = geometry.text_encoder, Formats(itemsize=2)
    whole_text = replace(text, num_used=text.num_layers)
    return (
        transformer_bytes(geometry.transformer, formats)
        + text_bytes(whole_text, formats)
        + (2 * num_embedding_weights(text) if text.has_head else 0)
        + autoencoder_bytes(geometry.autoencoder, itemsize=2)
    )


def autoencoder_bytes(config: AutoencoderConfig, *, itemsize: int) -> int:
    """Return the bytes of encoder, decoder and the statistics of the latents."""

    def conv(a: int, b: int, size: int = 3) -> int:
        return a * b * size * size + b

    def resnet(a: int, b: int) -> int:
        return 2 * a + conv(a, b) + 2 * b + conv(b, b) + (conv(a, b, 1) if a != b else 0)

    def middle(c: int) -> int:
        return 2 * resnet(c, c) + (2 * c + 4 * conv(c, c, 1) if config.mid_attention else 0)

    z, total = config.latent_channels, 0
    down, up = config.encoder_channels, config.decoder_channels[::-1]
    for channels, extra, last in ((down, 0, conv(down[-1], 2 * z)), (up, 1, conv(up[-1], 3))):
        before = channels[0]
        for i, width in enumerate(channels):
            total += resnet(before, width) + (config.num_resnets + extra - 1) * resnet(width, width)
            total += conv(width, width) if i + 1 < len(channels) else 0
            before = width
        total += 2 * channels[-1] + last
    total += (
        conv(3, down[0]) + conv(z, up[0]) + middle(down[-1]) + middle(up[0]) + conv(2 * z, 2 * z, 1) + conv(z, z, 1)
    )
    return total * itemsize + 2 * 4 * z * itemsize


def least_resident(geometry: ModelGeometry, formats: Formats, part: str) -> int:
    """Return the bytes of weights that must be resident for a network to run layer by layer.

    These are what is in no layer, the layer that runs and the one that is read ahead (packed matrices are not read ahead).
    """
    if part == "autoencoder":
        return autoencoder_bytes(geometry.autoencoder, itemsize=formats.itemsize)
    if part == "text_encoder":
        text = geometry.text_encoder
        return min(2, text.num_used) * _text_layer(text, formats)
    config, packed = geometry.transformer, formats.quantize is not None and formats.packed
    of_matrix = formats.itemsize if formats.quantize is None else 1
    largest = (2 if config.num_double_blocks else 1) * _block_weights(config) * of_matrix
    whole = transformer_bytes(config, formats)
    return min(whole, whole - num_matrix_weights(config) * of_matrix + (1 if packed else 2) * largest)


def kv_bytes(config: TransformerConfig, num_ref: int, *, itemsize: int, kv: str | None, joint: bool = False) -> int:
    """Return the bytes of K/V of `num_ref` tokens in every layer; `kv` is "int8", "fp8" or None (not quantized).

    Of a joint model, those of the tokens, which are kept instead.
    """
    if joint:
        return num_ref * config.in_channels * itemsize
    row = config.width * itemsize if kv is None else config.width + 4 * config.num_heads
    return num_ref * config.num_layers * 2 * row


def _block_activations(config: TransformerConfig, tokens: int, formats: Formats) -> int:
    """Bytes at the peak of a block: stream, norm, fused projection, rotated q and k, attention output, joined with MLP.

    Of products with tiles also their working space, and of int8 ones the input of the last in int8. Where they make the
    gate too, the projection of the MLP is not there; this is the peak with a LoRA, where it is.
    """
    wide, joined = (
        tokens * (8 * config.width + 3 * config.mlp_width) * formats.itemsize,
        config.width + config.mlp_width,
    )
    narrow, threads = formats.quantize is not None, formats.tile_threads
    if not threads or (not narrow and formats.itemsize != 2):
        return wide
    return wide + tokens * joined * narrow + tile_space(tokens, joined, threads=threads, itemsize=1 if narrow else 2)


def tile_space(rows: int, width: int, *, threads: int, itemsize: int = 1) -> int:
    """Return the bytes of working space of a product with tiles: `rows` of `width` values (`native/tiles.c`)."""
    slab = _TILE_ROWS * min(4, max(1, _TILE_SLAB // (width * itemsize) // _TILE_ROWS))
    laid_out = -(-min(rows, slab) // 32) * 32 * width * itemsize
    copied = (_TILE_FEATURES if itemsize == 1 else _TILE_WIDE_FEATURES) * width * itemsize
    return laid_out + threads * (4 * _TILE_ROWS * _TILE_FEATURES + copied)


def _autoencoder_activations(channels: Sequence[int], pixels: int, live: int, itemsize: int, *, whole: int) -> int:
    widest = max(channels[:2]) if live == _LIVE_DECODE else channels[0]
    if pixels <= whole:
        return live * widest * pixels * itemsize
    return _LIVE_STRIPS * widest * pixels * itemsize + _STRIP_SCRATCH * widest


def encode_bytes(config: AutoencoderConfig, pixels: int, *, itemsize: int) -> int:
    """Return the bytes of activations while a picture of so many pixels is encoded."""
    return _autoencoder_activations(config.encoder_channels, pixels, _LIVE_ENCODE, itemsize, whole=WHOLE_PIXELS)


def _text_activations(config: TextConfig, num_text: int, itemsize: int) -> int:
    """Bytes of the hidden states of all layers (the network keeps them), of those in use joined, and of one layer."""
    hidden = (config.num_used + 1 + 3) * config.width
    layer = 3 * config.mlp_width + config.head_dim * 3 * (config.num_heads + config.num_kv_heads) + 2 * config.width
    return num_text * (hidden + layer) * itemsize + num_text * num_text * 4


def call_bytes(
    transformer: TransformerConfig,
    autoencoder: AutoencoderConfig,
    *,
    num_ref: int,
    num_own: int,
    batch: int,
    formats: Formats,
    whole_pixels: int = WHOLE_PIXELS,
    pixels: int | None = None,
    reference_pixels: int | None = None,
    joint: bool = False,
) -> int:
    """Return the peak bytes of a call on top of the weights. Counts are of tokens of 16x16 pixels.

    `num_ref` counts references to prefill; K/V that are cached are in memory already. Joint references are counted
    always: they are tokens of every image. `pixels` is the size of the output,
    `reference_pixels` that of the largest reference; None: all tokens are those of one picture.
    """
    size = formats.itemsize
    cached = kv_bytes(transformer, num_ref, itemsize=size, kv=formats.kv, joint=joint)
    if formats.kv is not None and not joint:  # computed in full width, then quantized
        cached += kv_bytes(transformer, num_ref, itemsize=size, kv=None)
    pixels = num_own * PIXELS**2 if pixels is None else pixels
    reference_pixels = num_ref * PIXELS**2 if reference_pixels is None else reference_pixels
    tokens = batch * (num_own + num_ref) if joint else max(num_ref, batch * num_own)
    blocks = _block_activations(transformer, tokens, formats)
    encode = encode_bytes(autoencoder, reference_pixels, itemsize=size)
    at_once = min(batch, max(1, WHOLE_PIXELS // max(pixels, 1)))
    decode = at_once * _autoencoder_activations(
        autoencoder.decoder_channels, pixels, _LIVE_DECODE, size, whole=whole_pixels
    )
    return cached + max(blocks, encode, decode) + batch * pixels * 3 * (size + 4)


def activations(
    geometry: ModelGeometry, workload: Workload, *, formats: Formats, whole_pixels: int = WHOLE_PIXELS
) -> dict[str, int]:
    """Return the bytes that each phase takes on top of weights, cached K/V and prompt tokens."""
    size, config, networks = formats.itemsize, geometry.transformer, geometry.autoencoder
    # K/V are computed in full width, then quantized
    wide = kv_bytes(config, workload.num_ref, itemsize=size, kv=None) if formats.kv else 0
    pixels = workload.size[0] * workload.size[1]
    largest = max((w * h for w, h in workload.references), default=0)
    decode = _autoencoder_activations(networks.decoder_channels, pixels, _LIVE_DECODE, size, whole=whole_pixels)
    text = geometry.text_encoder
    found = {"encode text": _text_activations(text, workload.num_text, size)}
    widest = max(text.mlp_width, text.num_heads * text.head_dim)
    if formats.quantize_text and formats.tile_threads:
        found["encode text"] += workload.num_text * widest
        found["encode text"] += tile_space(workload.num_text, widest, threads=formats.tile_threads)
    elif formats.quantize_text and formats.widened:
        found["encode text"] += text.width * widest * (8 + size)
    if workload.references:
        found["encode references"] = encode_bytes(networks, largest, itemsize=size)
        if not workload.joint:
            found["prefill"] = _block_activations(config, workload.num_ref, formats) + wide
    own = workload.num_own + (workload.num_ref if workload.joint else 0)
    found["denoise"] = _block_activations(config, workload.batch * own, formats)
    if formats.quantize is not None and formats.widened:  # the largest matrix, widened for its product
        widened = config.width * (3 * config.width + 2 * config.mlp_width) * (8 + size)
        for name in {"prefill", "denoise"} & found.keys():
            found[name] += widened
    at_once = min(workload.batch, max(1, WHOLE_PIXELS // pixels))
    found["decode"] = at_once * decode + workload.batch * pixels * 3 * (size + 4)
    return found
