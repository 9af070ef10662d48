"""How much memory a call takes, as a pure function of geometry, formats and request: by component and by phase.

The one owner of these numbers: admission, `memory_limit` and `limner plan` ask here. Imports no torch and reads no files.

Memory is of two kinds. Weights that are mapped from their files in the dtype in which they are used are *file-backed*: the
system can drop their pages and read them again. Everything else is *anonymous*: activations, K/V of references, weights
that were converted or quantized on the way in, int8 weights in the layout of the CPU's products. On another device than the
CPU all of a phase's bytes are the device's.

How weights are kept (`Staging`): "whole", all of them all the time; "parts", those of one network at a time; "layers",
also a network's layers by turns, where a network alone is over the limit.

Staging is for the CPU alone: on another device all weights are there, all the time.

The counts of live tensors in activations (`_LIVE_*`) are those of the code in `model`, checked against measured peaks
(benchmarks/full_size.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from limner.config import WHOLE_PIXELS, AutoencoderConfig, ModelGeometry, TextConfig, TransformerConfig
from limner.errors import CapacityError, InvalidRequest

__all__ = [
    "LIBRARIES",
    "Formats",
    "MemoryPlan",
    "Phase",
    "Request",
    "Staging",
    "activations",
    "autoencoder_bytes",
    "call_bytes",
    "cheapest",
    "kv_bytes",
    "make_plan",
    "parse_bytes",
    "show_bytes",
    "text_bytes",
    "transformer_bytes",
]

Staging = Literal["whole", "parts", "layers"]
_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_TOKEN_PIXELS = 256
_BASE_ANONYMOUS = 330 << 20
LIBRARIES = 370 << 20
"""A process that has imported torch, diffusers and transformers: 323 MiB anonymous and 365 MiB of libraries."""
_DEVICE_BASE = 500 << 20
"""The context of a CUDA process and the workspaces of its libraries."""
_LIVE_ENCODE = 5
_LIVE_DECODE = 6
"""Feature maps of the widest full-resolution stage that are alive at once in the autoencoder, run whole."""
_LIVE_STRIPS = 2
"""The same where it runs in strips."""
_STRIP_SCRATCH = (1 << 15) * 4 * 6
"""Bytes of a strip's scratch for each channel: six float32 maps of its pixels."""


def parse_bytes(value: str | int, *, field: str = "memory_limit") -> int:
    """ "20GiB", "14.5 GB", "512MiB" or a number of bytes. Raises `InvalidRequest`."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise InvalidRequest(field, f'{value!r} is not a number of bytes; give one, or a text as "20GiB"')
    if isinstance(value, int):
        number = float(value)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
        if match is None or match[2].lower() not in _UNITS:
            raise InvalidRequest(
                field, f'{value!r} is not an amount of memory; give it as "20GiB", "14.5GB" or in bytes'
            )
        number = float(match[1]) * _UNITS[match[2].lower()]
    if not 1 <= number < 2**60:
        raise InvalidRequest(field, f"{value!r} is not within 1 byte to 1 EiB")
    return int(number)


def show_bytes(number: int) -> str:
    """Bytes in GiB, for people."""
    return f"{number / 2**30:.2f} GiB"


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is asked of a model: sizes are (width, height) in pixels, references after their processing."""

    size: tuple[int, int]
    references: tuple[tuple[int, int], ...] = ()
    batch: int = 1
    num_text: int = 512

    @property
    def num_ref(self) -> int:
        return sum(w * h for w, h in self.references) // _TOKEN_PIXELS

    @property
    def num_own(self) -> int:
        return self.size[0] * self.size[1] // _TOKEN_PIXELS + self.num_text


@dataclass(frozen=True, kw_only=True, slots=True)
class Formats:
    """In what form weights and K/V are: bytes of a value (`itemsize`), int8 or not, and which weights are no files.

    `packed`: int8 products of this CPU have a layout of their own, a second copy of the matrices. `anonymous` names the
    networks ("text_encoder", "transformer", "autoencoder") whose weights are converted or quantized as they are loaded.
    """

    itemsize: int = 2
    quantize: str | None = None
    kv: str | None = None
    packed: bool = True
    anonymous: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A part of a call and its peak in bytes: anonymous (on a device: there) and file-backed."""

    name: str
    anonymous: int
    file_backed: int

    @property
    def total(self) -> int:
        return self.anonymous + self.file_backed


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """What a request takes. `components` are bytes by name; `device` is where phases are counted, `host` what the process
    has beside another device."""

    device: str
    staging: Staging
    formats: Formats
    components: Mapping[str, int]
    phases: tuple[Phase, ...]
    host: int

    @property
    def peak(self) -> int:
        return max(phase.total for phase in self.phases)

    @property
    def peak_anonymous(self) -> int:
        return max(phase.anonymous for phase in self.phases)

    def as_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "staging": self.staging,
            "quantize": self.formats.quantize,
            "kv_cache_dtype": self.formats.kv,
            "components": dict(self.components),
            "phases": {
                p.name: {"anonymous": p.anonymous, "file_backed": p.file_backed, "total": p.total} for p in self.phases
            },
            "peak": self.peak,
            "peak_anonymous": self.peak_anonymous,
            "host": self.host,
        }


# weights


def _block_weights(config: TransformerConfig) -> int:
    """Weights of a single-stream block, and of one stream of a double-stream block: the matrices alone."""
    return 4 * config.width**2 + 3 * config.width * config.mlp_width


def _matrices(config: TransformerConfig) -> int:
    return (2 * config.num_double_blocks + config.num_single_blocks) * _block_weights(config)


def transformer_bytes(config: TransformerConfig, formats: Formats) -> int:
    """All weights; int8 ones with a float32 scale for each row."""
    c, m = config.width, config.mlp_width
    wide = config.time_channels * c + c * c + 15 * c * c + 2 * c * c
    wide += c * (config.in_channels + config.out_channels + config.text_width)
    wide += config.head_dim * (4 * config.num_double_blocks + 2 * config.num_single_blocks)
    if formats.quantize is None:
        return (wide + _matrices(config)) * formats.itemsize
    rows = config.num_double_blocks * 2 * (5 * c + 2 * m) + config.num_single_blocks * (4 * c + 2 * m)
    return wide * formats.itemsize + _matrices(config) + 4 * rows


def _text_layer(config: TextConfig) -> int:
    heads = config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    return config.width * (heads + 3 * config.mlp_width) + 2 * config.width + 2 * config.head_dim


def _embedding(config: TextConfig) -> int:
    return config.vocab_size * config.width


def text_bytes(config: TextConfig, *, itemsize: int) -> int:
    """The embedding and the layers that are read, without head and (unless all layers are read) final norm."""
    norm = config.width if config.num_used == config.num_layers else 0
    return (_embedding(config) + config.num_used * _text_layer(config) + norm) * itemsize


def autoencoder_bytes(config: AutoencoderConfig, *, itemsize: int) -> int:
    """Encoder, decoder and the statistics of the latents."""

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


# activations


def kv_bytes(config: TransformerConfig, num_ref: int, *, itemsize: int, kv: str | None) -> int:
    """K/V of reference tokens in every layer; `kv` is the narrow format in which they are kept, if any."""
    row = config.width * itemsize if kv is None else config.width + 4 * config.num_heads
    return num_ref * config.num_layers * 2 * row


def _block_activations(config: TransformerConfig, tokens: int, itemsize: int) -> int:
    """The widest moment of a block: stream, norm, fused projection, q and k rotated, the attended, that and MLP joined."""
    return tokens * (8 * config.width + 3 * config.mlp_width) * itemsize


def _autoencoder_activations(channels: Sequence[int], pixels: int, live: int, itemsize: int, *, whole: int) -> int:
    widest = max(channels[:2]) if live == _LIVE_DECODE else channels[0]
    if pixels <= whole:
        return live * widest * pixels * itemsize
    return _LIVE_STRIPS * widest * pixels * itemsize + _STRIP_SCRATCH * widest


def _text_activations(config: TextConfig, num_text: int, itemsize: int) -> int:
    """The hidden states of all layers, which the network keeps, those that are read side by side, and a layer's own."""
    kept = (config.num_used + 1 + 3) * config.width
    layer = 3 * config.mlp_width + config.head_dim * 3 * (config.num_heads + config.num_kv_heads) + 2 * config.width
    return num_text * (kept + layer) * itemsize + num_text * num_text * 4


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
) -> int:
    """What a call takes beside the weights, at its widest moment. Counts are of tokens of 16x16 pixels.

    `num_ref` counts references that are yet to be prefilled: K/V that are kept already are in memory already. Where the
    sizes of the output and of the largest reference are not known, all tokens are taken for one picture.
    """
    size = formats.itemsize
    kept = kv_bytes(transformer, num_ref, itemsize=size, kv=formats.kv)
    if formats.kv is not None:  # made wide, then narrowed
        kept += kv_bytes(transformer, num_ref, itemsize=size, kv=None)
    pixels = num_own * _TOKEN_PIXELS if pixels is None else pixels
    reference_pixels = num_ref * _TOKEN_PIXELS if reference_pixels is None else reference_pixels
    blocks = _block_activations(transformer, max(num_ref, batch * num_own), size)
    encode = _autoencoder_activations(
        autoencoder.encoder_channels, reference_pixels, _LIVE_ENCODE, size, whole=WHOLE_PIXELS
    )
    at_once = min(batch, max(1, WHOLE_PIXELS // max(pixels, 1)))
    decode = at_once * _autoencoder_activations(
        autoencoder.decoder_channels, pixels, _LIVE_DECODE, size, whole=whole_pixels
    )
    return kept + max(blocks, encode, decode) + batch * pixels * 3 * (size + 4)


def activations(
    geometry: ModelGeometry, request: Request, *, formats: Formats, whole_pixels: int = WHOLE_PIXELS
) -> dict[str, int]:
    """What each phase takes beside weights, kept K/V and prompt."""
    size, config, networks = formats.itemsize, geometry.transformer, geometry.autoencoder
    wide = kv_bytes(config, request.num_ref, itemsize=size, kv=None) if formats.kv else 0  # made so, then narrowed
    pixels = request.size[0] * request.size[1]
    largest = max((w * h for w, h in request.references), default=0)
    decode = _autoencoder_activations(networks.decoder_channels, pixels, _LIVE_DECODE, size, whole=whole_pixels)
    found = {"encode text": _text_activations(geometry.text_encoder, request.num_text, size)}
    if request.references:
        found["encode references"] = _autoencoder_activations(
            networks.encoder_channels, largest, _LIVE_ENCODE, size, whole=WHOLE_PIXELS
        )
        found["prefill"] = _block_activations(config, request.num_ref, size) + wide
    found["denoise"] = _block_activations(config, request.batch * request.num_own, size)
    if formats.quantize is not None and not formats.packed:  # the largest matrix, widened for its product
        widened = config.width * (3 * config.width + 2 * config.mlp_width) * (8 + size)
        for name in {"prefill", "denoise"} & found.keys():
            found[name] += widened
    at_once = min(request.batch, max(1, WHOLE_PIXELS // pixels))
    found["decode"] = at_once * decode + request.batch * pixels * 3 * (size + 4)
    return found


# plans


def make_plan(
    geometry: ModelGeometry,
    request: Request,
    *,
    formats: Formats,
    device: str = "cpu",
    staging: Staging = "whole",
    limit: int | None = None,
    whole_pixels: int = WHOLE_PIXELS,
) -> MemoryPlan:
    """The budget of a request. With `staging` "layers" a network's pages take what the limit leaves, no more."""
    size, config = formats.itemsize, geometry.transformer
    weights = {
        "text_encoder": text_bytes(geometry.text_encoder, itemsize=size),
        "transformer": transformer_bytes(config, formats),
        "autoencoder": autoencoder_bytes(geometry.autoencoder, itemsize=size),
    }
    packed = _matrices(config) if formats.quantize and formats.packed and device == "cpu" else 0
    kept_kv = kv_bytes(config, request.num_ref, itemsize=size, kv=formats.kv)
    embeds = request.batch * request.num_text * config.text_width * size
    working = activations(geometry, request, formats=formats, whole_pixels=whole_pixels)
    owner = {"encode text": "text_encoder", "encode references": "autoencoder", "decode": "autoencoder"}
    started = {"encode text": 0, "encode references": embeds}
    on_device = device != "cpu"
    files = {part: 0 if part in formats.anonymous else nbytes for part, nbytes in weights.items()}
    base = _DEVICE_BASE if on_device else _BASE_ANONYMOUS + sum(weights.values()) - sum(files.values())
    phases = []
    for name, own in working.items():
        part = owner.get(name, "transformer")
        anonymous = base + started.get(name, embeds + kept_kv) + own
        anonymous += packed if name in ("prefill", "denoise", "decode") else 0
        if on_device:
            phases.append(Phase(name=name, anonymous=anonymous + sum(weights.values()), file_backed=0))
            continue
        resident = sum(files.values())
        if staging != "whole":
            # the products of packed matrices read the packed copies: one layer's pages at a time are read, to pack them
            resident = least_resident(geometry, formats, part) if packed and part == "transformer" else files[part]
            if part == "text_encoder" and resident:  # of the embedding a few rows are read
                resident -= _embedding(geometry.text_encoder) * size
        if staging == "layers" and part not in formats.anonymous:
            least = least_resident(geometry, formats, part)
            resident = min(resident, max(least, 0 if limit is None else limit - anonymous - LIBRARIES))
        phases.append(Phase(name=name, anonymous=anonymous, file_backed=LIBRARIES + min(resident, sum(files.values()))))
    components = {
        **{f"{name} weights": value for name, value in weights.items()},
        **({"int8 weights as packed for this CPU": packed} if packed else {}),
        "K/V of references": kept_kv,
        "prompt": embeds,
        "activations": max(working.values()),
        "process": _BASE_ANONYMOUS + LIBRARIES,
    }
    host = _BASE_ANONYMOUS + LIBRARIES if on_device else 0
    return MemoryPlan(
        device=device, staging=staging, formats=formats, components=components, phases=tuple(phases), host=host
    )


def least_resident(geometry: ModelGeometry, formats: Formats, part: str) -> int:
    """The smallest share of a network's pages with which it runs: what is in no layer, and the layer that runs with the
    one that is read ahead (of packed matrices no page is read ahead)."""
    if part == "autoencoder":
        return autoencoder_bytes(geometry.autoencoder, itemsize=formats.itemsize)
    if part == "text_encoder":
        text = geometry.text_encoder
        return min(2, text.num_used) * _text_layer(text) * formats.itemsize
    config, packed = geometry.transformer, formats.quantize is not None and formats.packed
    of_matrix = formats.itemsize if formats.quantize is None else 1
    largest = (2 if config.num_double_blocks else 1) * _block_weights(config) * of_matrix
    whole = transformer_bytes(config, formats)
    return min(whole, whole - _matrices(config) * of_matrix + (1 if packed else 2) * largest)


def choices(formats: Formats, *, device: str, fixed: bool) -> Iterator[tuple[Formats, Staging]]:
    """Settings from the cheapest on: what changes no bit and costs no time first, what is slow last."""
    kinds = [formats]
    if not fixed:
        kinds += [replace(formats, kv=formats.kv or "int8"), replace(formats, quantize="int8")]
        kinds.append(replace(formats, quantize="int8", kv=formats.kv or "int8"))
    for kind in kinds:
        yield kind, "whole"
        if device == "cpu":
            yield kind, "parts"
    if device == "cpu":
        for kind in kinds:
            yield kind, "layers"


def cheapest(
    geometry: ModelGeometry,
    request: Request,
    *,
    formats: Formats,
    limit: int,
    device: str = "cpu",
    fixed: bool = False,
    field: str = "memory_limit",
) -> MemoryPlan:
    """The first plan of `choices` that fits. `fixed` keeps the formats. Raises `CapacityError` with the smallest peak."""
    smallest: MemoryPlan | None = None
    for kind, staging in choices(formats, device=device, fixed=fixed):
        plan = make_plan(geometry, request, formats=kind, device=device, staging=staging, limit=limit)
        if plan.peak <= limit:
            return plan
        smallest = plan if smallest is None or plan.peak < smallest.peak else smallest
    assert smallest is not None
    widest = max(smallest.phases, key=lambda phase: phase.total)
    how = f"quantize={smallest.formats.quantize}, kv_cache_dtype={smallest.formats.kv}, staging {smallest.staging}"
    raise CapacityError(
        f"{field}: {show_bytes(limit)} are too little; the least is {show_bytes(smallest.peak)}, while it does "
        f"'{widest.name}' ({how}); use fewer or smaller references, a smaller output, fewer images at once, or more memory"
    )
