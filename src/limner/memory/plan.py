"""Memory of a call by phase, and the cheapest way to keep it within a limit.

The one owner of these numbers: admission, `memory_limit` and `limner plan` use them. Imports no torch and reads no files.

Memory is of two kinds. Weights that are mapped from their files in the dtype in which they are used are *file-backed*: the
system can drop their pages and read them again. Everything else is *anonymous*: activations, K/V of references, weights
that were converted or quantized while loading, int8 weights packed for the products of a CPU without AMX. On a device
other than the CPU, all bytes of a phase are the device's.

`Staging` says how weights stay in memory: "whole", all of them all the time; "parts", those of one network at a time;
"layers", also a network's layers by turns, where one network alone exceeds the limit. On a GPU weights that are not
there are in page-locked host memory; what the transformer has besides its blocks is there all the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from limner.config import WHOLE_PIXELS, ModelGeometry, TextConfig
from limner.errors import CapacityError
from limner.memory.amounts import show_bytes
from limner.memory.components import (
    Formats,
    Workload,
    autoencoder_bytes,
    kv_bytes,
    least_resident,
    num_embedding_weights,
    num_matrix_weights,
    text_bytes,
    text_layer_weights,
    transformer_bytes,
)
from limner.memory.control import held_bytes, phase_bytes, reused_bytes

__all__ = ["DEVICE_BASE", "LIBRARIES", "MemoryPlan", "Phase", "Staging", "cheapest", "make_plan"]

Staging = Literal["whole", "parts", "layers"]

_BASE_ANONYMOUS = 210 << 20
LIBRARIES = 130 << 20
"""A process that drew has 175 MiB of anonymous memory and 110 MiB of libraries besides the model. One whose model needs
classes of diffusers or transformers has up to 150 and 250 MiB more."""
DEVICE_BASE = 500 << 20
"""The context of a CUDA process and the workspaces of its libraries."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A part of a call and its peak in bytes: anonymous (on another device: all of the device's bytes) and file-backed."""

    name: str
    anonymous: int
    file_backed: int

    @property
    def total(self) -> int:
        return self.anonymous + self.file_backed


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Memory of a call. `components` are bytes by name.

    Phases count the bytes on `device`. `host` is what the process needs in host memory where `device` is another.
    """

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
            "quantize_text": self.formats.quantize_text,
            "kv_cache_dtype": self.formats.kv,
            "components": dict(self.components),
            "phases": {
                p.name: {"anonymous": p.anonymous, "file_backed": p.file_backed, "total": p.total} for p in self.phases
            },
            "peak": self.peak,
            "peak_anonymous": self.peak_anonymous,
            "host": self.host,
        }


def make_plan(
    geometry: ModelGeometry,
    workload: Workload,
    *,
    formats: Formats,
    device: str = "cpu",
    staging: Staging = "whole",
    limit: int | None = None,
    whole_pixels: int = WHOLE_PIXELS,
) -> MemoryPlan:
    """Plan the memory of a call. With `staging` "layers" a network's pages take what `limit` leaves, no more."""
    size, config = formats.itemsize, geometry.transformer
    weights = {
        "text_encoder": text_bytes(geometry.text_encoder, formats),
        "transformer": transformer_bytes(config, formats),
        "autoencoder": autoencoder_bytes(geometry.autoencoder, itemsize=size),
    }
    packs = formats.packed and device == "cpu"
    packed = num_matrix_weights(config) if formats.quantize and packs else 0
    packed_text = _packed_text(geometry.text_encoder, staging) if formats.quantize_text and packs else 0
    kept_kv = kv_bytes(config, workload.num_ref, itemsize=size, kv=formats.kv, joint=workload.joint)
    embeds = workload.batch * workload.num_text * config.text_width * size
    working = phase_bytes(geometry, workload, formats=formats, whole_pixels=whole_pixels)
    held, put_back = held_bytes(workload), working.pop("put back", 0)
    if workload.reuses:
        working["denoise"] += reused_bytes(config, workload, formats=formats)
    if put_back and device == "cpu":  # elsewhere canvases are the host's
        working["put back"] = put_back
    owner = {
        "encode text": "text_encoder",
        "encode references": "autoencoder",
        "decode": "autoencoder",
        "put back": "autoencoder",
    }
    started = {"encode text": 0, "encode references": embeds}
    on_device = device != "cpu"
    files = {part: 0 if part in formats.anonymous else nbytes for part, nbytes in weights.items()}
    base = DEVICE_BASE if on_device else _BASE_ANONYMOUS + held + sum(weights.values()) - sum(files.values())
    phases = []
    for name, own in working.items():
        part = owner.get(name, "transformer")
        anonymous = base + started.get(name, embeds + kept_kv) + own
        anonymous += packed if name in ("prefill", "denoise", "decode", "put back") else 0
        anonymous += packed_text if staging == "whole" or part == "text_encoder" else 0
        if on_device:
            smallest = _least_on_device(geometry, formats)
            phases.append(
                Phase(
                    name=name,
                    anonymous=anonymous + _weights_on_device(weights, smallest, part, staging, limit, anonymous),
                    file_backed=0,
                )
            )
            continue
        resident = sum(files.values())
        if staging != "whole":
            # products read the packed copies; pages are read one layer at a time, to pack them
            resident = least_resident(geometry, formats, part) if packed and part == "transformer" else files[part]
            if part == "text_encoder" and resident:  # only a few rows of the embedding are read
                resident -= num_embedding_weights(geometry.text_encoder) * size
        if staging == "layers" and part not in formats.anonymous:
            least = least_resident(geometry, formats, part)
            resident = min(resident, max(least, 0 if limit is None else limit - anonymous - LIBRARIES))
        phases.append(Phase(name=name, anonymous=anonymous, file_backed=LIBRARIES + min(resident, sum(files.values()))))
    components = {
        **{f"{name} weights": value for name, value in weights.items()},
        **({"int8 weights as packed for this CPU": packed + packed_text} if packed + packed_text else {}),
        "K/V of references": kept_kv,
        "prompt": embeds,
        "activations": max(working.values()),
        **({"canvases": held} if held else {}),
        "process": _BASE_ANONYMOUS + LIBRARIES,
    }
    host = _BASE_ANONYMOUS + LIBRARIES + held + put_back if on_device else 0
    host += sum(weights.values()) if on_device and staging != "whole" else 0
    return MemoryPlan(
        device=device, staging=staging, formats=formats, components=components, phases=tuple(phases), host=host
    )


def _packed_text(config: TextConfig, staging: Staging) -> int:
    """Return the bytes of the text encoder's packed copies: under a limit those of the layer that runs."""
    return text_layer_weights(config) * (config.num_used if staging == "whole" else 1)


def _least_on_device(geometry: ModelGeometry, formats: Formats) -> dict[str, int]:
    """Return the bytes with which each network runs layer by layer on a GPU; of "always", what never leaves it."""
    text, config = geometry.text_encoder, geometry.transformer
    least = {part: least_resident(geometry, formats, part) for part in ("text_encoder", "transformer", "autoencoder")}
    least["text_encoder"] += num_embedding_weights(text) * formats.itemsize
    blocks = num_matrix_weights(config) * (formats.itemsize if formats.quantize is None else 1)
    return {**least, "always": transformer_bytes(config, formats) - blocks}


def _weights_on_device(
    weights: Mapping[str, int], least: Mapping[str, int], part: str, staging: Staging, limit: int | None, other: int
) -> int:
    """Return the bytes of weights that are on a GPU while a network works, beside `other` bytes."""
    if staging == "whole":
        return sum(weights.values())
    always = 0 if part == "transformer" else least["always"]
    if staging == "parts":
        return always + weights[part]
    return always + min(weights[part], max(least[part], 0 if limit is None else limit - other - always))


def _choices(formats: Formats, *, fixed: bool) -> Iterator[tuple[Formats, Staging]]:
    """Yield settings, cheapest first: those that change no bit and cost no time, and slow ones last."""
    kinds = [formats]
    if not fixed:
        kinds += [replace(formats, kv=formats.kv or "int8"), replace(formats, quantize="int8")]
        kinds.append(replace(formats, quantize="int8", kv=formats.kv or "int8"))
        kinds += [replace(kind, quantize_text=True) for kind in kinds[-2:]]
    for kind in kinds:
        yield kind, "whole"
        yield kind, "parts"
    for kind in kinds:
        yield kind, "layers"


def cheapest(
    geometry: ModelGeometry,
    workload: Workload,
    *,
    formats: Formats,
    limit: int,
    device: str = "cpu",
    fixed: bool = False,
    field: str = "memory_limit",
) -> MemoryPlan:
    """Return the cheapest plan within `limit` bytes; `fixed` keeps the formats. Raises `CapacityError` with numbers."""
    smallest: MemoryPlan | None = None
    for kind, staging in _choices(formats, fixed=fixed):
        plan = make_plan(geometry, workload, formats=kind, device=device, staging=staging, limit=limit)
        if plan.peak <= limit:
            return plan
        smallest = plan if smallest is None or plan.peak < smallest.peak else smallest
    assert smallest is not None
    widest = max(smallest.phases, key=lambda phase: phase.total)
    used = smallest.formats
    how = f"quantize={used.quantize}, quantize_text={used.quantize_text}, kv_cache_dtype={used.kv}"
    how += f", staging {smallest.staging}"
    raise CapacityError(
        f"{field}: {show_bytes(limit)} are too little; the least is {show_bytes(smallest.peak)}, while it does "
        f"'{widest.name}' ({how}); use fewer or smaller references, a smaller output, fewer images at once, or more memory"
    )
