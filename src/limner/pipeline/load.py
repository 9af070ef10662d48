"""The parts of a pipeline, loaded from files or taken over from a diffusers pipeline. Does not know calls."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limner.config import ReferencePolicy
from limner.errors import CheckpointError, InvalidRequest
from limner.grid import PIXELS
from limner.kinds import DIFFUSERS_KINDS, ISOLATED, ModelKind
from limner.memory import parse_bytes
from limner.memory.residency import Residency
from limner.memory.staged import Staged
from limner.model.autoencoder import Autoencoder
from limner.model.kv import KV_FORMATS
from limner.model.preview import Preview
from limner.model.text_encoder import TextEncoder
from limner.model.transformer import Transformer
from limner.pipeline.check import check_layers
from limner.pipeline.progress import Progress, silent
from limner.ranks import join
from limner.schedule import Schedule
from limner.weights.digest import FileStamp, WeightDigests, file_stamp
from limner.weights.folder import (
    chosen_kind,
    find_kind,
    kind_of_index,
    load_autoencoder,
    load_text_encoder,
    load_transformer,
    read_json,
    read_settings,
    resolve_model,
    resolve_part,
    transformer_digest,
)
from limner.weights.hub import Hub
from limner.weights.live import share_autoencoder, share_text_encoder, share_transformer
from limner.weights.parts import check_variant
from limner.weights.tiny_decoder import load_tiny_decoder

__all__ = ["Hub", "Loaded", "check_device", "check_dtype", "check_kv_cache_dtype", "check_parts", "load", "take_over"]

_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class _Origin:
    """Where a network was loaded from, and the stamp of its files before. `whole` makes the digest of a divided one."""

    network: nn.Module
    source: Path
    stamp: FileStamp | None
    shard: tuple[int, int] | None = None
    whole: Callable[[], str] | None = None


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Loaded:
    """The parts of a pipeline and the settings of its model."""

    transformer: Transformer
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    schedule: Schedule
    default_size: tuple[int, int]
    sizes: Sequence[tuple[int, int]]
    reference_policy: ReferencePolicy | None
    kind: ModelKind = ISOLATED
    latent_preview: Preview | None = None
    residency: Residency | None = None
    origins: tuple[_Origin, ...] = field(default=())
    whole_text: weakref.ref[Any] | None = None
    """The text encoder that was taken over, with the layers that no call reads."""

    def register(self, digests: WeightDigests) -> None:
        """Record the files of each network, so that later processes need not hash its weights again."""
        for one in self.origins:
            digests.loaded(one.network, one.source, before=one.stamp, shard=one.shard, whole=one.whole)


def load(
    model: str | os.PathLike[str] | None,
    *,
    replaced: dict[str, str | os.PathLike[str] | None],
    dtype: torch.dtype | None,
    device: torch.device | str,
    references: str | None,
    called: str | None,
    reference_policy: ReferencePolicy | None,
    quantize: str | None,
    quantize_text: bool,
    memory_limit: str | int | None,
    text_encoder_out_layers: Sequence[int] | None,
    parallel: str | None,
    progress: Progress | None,
    variant: str | None,
    hub: Hub,
    preview_decoder: str | os.PathLike[str] | None,
) -> Loaded:
    """Load a model; arguments as of `Pipeline.from_pretrained`, with `replaced` the sources of parts. Raises as it does.

    `called` is the name of the diffusers class that the caller used, if it is one.
    """
    _check_quantize(quantize)
    device = check_device(device)
    if parallel is not None and memory_limit is not None:
        raise InvalidRequest("memory_limit", "is for a model in one process; leave it out, or parallel")
    ranks, device = join(parallel, device)
    residency = _residency(memory_limit, device)
    home = torch.device("cpu") if isinstance(residency, Staged) else device  # where weights are while nothing works
    folder = resolve_model(model, without=[part for part, source in replaced.items() if source is not None], hub=hub)
    settings = read_settings(folder)
    sources = {part: resolve_part(part, source, model=folder, hub=hub) for part, source in replaced.items()}
    check_variant(variant, sources)
    kind = chosen_kind(find_kind(folder, transformer=sources["transformer"]), given=references, called=called)
    dtype = _checked_dtype(dtype, default=settings.default_dtype)
    scheduler_file = folder / "scheduler" / "scheduler_config.json"
    schedule = Schedule.from_diffusers(read_json(scheduler_file), where=str(scheduler_file))
    stamps = {part: file_stamp(source) for part, source in sources.items()}
    after = residency.after_read if residency else None
    like = {part: folder / part / "config.json" for part in sources}
    report = progress or silent
    report("load", 0, 3)
    transformer = load_transformer(
        sources["transformer"],
        dtype=dtype,
        device=home,
        quantize=quantize,
        like=like["transformer"],
        variant=variant,
        after=after,
        ranks=ranks,
    )
    transformer.settle()
    report("load", 1, 3)
    autoencoder = load_autoencoder(
        sources["vae"], dtype=dtype, device=home, like=like["vae"], variant=variant, after=after
    )
    report("load", 2, 3)
    text_encoder = load_text_encoder(
        sources["text_encoder"],
        folder / "tokenizer",
        dtype=dtype,
        device=home,
        out_layers=tuple(text_encoder_out_layers) if text_encoder_out_layers else None,
        quantize="int8" if quantize_text else None,
        like=like["text_encoder"],
        variant=variant,
        after=after,
    )
    text_encoder.settle()
    text_encoder.known = settings.known_words(replaced)
    report("load", 3, 3)
    preview = settings.preview if preview_decoder is None else load_tiny_decoder(Path(preview_decoder), device=device)
    check_parts(transformer, autoencoder, text_encoder, preview, preview_decoder or folder)
    how: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "like": like["transformer"], "variant": variant}
    whole = functools.partial(transformer_digest, sources["transformer"], **how)
    networks = {"transformer": transformer, "vae": autoencoder, "text_encoder": text_encoder}
    return Loaded(
        transformer=transformer,
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        schedule=schedule,
        default_size=settings.default_size,
        sizes=settings.sizes,
        reference_policy=(reference_policy or ReferencePolicy()).for_model(
            settings.max_reference_pixels, settings.sizes
        ),
        kind=kind,
        latent_preview=preview,
        residency=residency,
        origins=tuple(
            _Origin(network=network, source=sources[part], stamp=stamps[part])
            if part != "transformer" or not ranks.shard
            else _Origin(network=network, source=sources[part], stamp=stamps[part], shard=ranks.shard, whole=whole)
            for part, network in networks.items()
        ),
    )


def _check_quantize(quantize: str | None) -> None:
    if quantize not in (None, "int8"):
        raise InvalidRequest("quantize", f"{quantize!r} is not one of None, 'int8'")


def _checked_dtype(dtype: torch.dtype | None, *, default: torch.dtype | None) -> torch.dtype | None:
    dtype = dtype or default
    if dtype not in _DTYPES:
        raise InvalidRequest("torch_dtype", f"{dtype!r} is not one of torch.float32, torch.bfloat16, torch.float16")
    return dtype


def take_over(
    pipeline: Any,
    *,
    default_size: tuple[int, int],
    sizes: Sequence[tuple[int, int]],
    references: str | None,
    called: str | None,
    reference_policy: ReferencePolicy | None,
    text_encoder_out_layers: Sequence[int] | None,
) -> Loaded:
    """Share the networks of a klein pipeline of diffusers; arguments and errors as of `Pipeline.from_diffusers`."""
    name = type(pipeline).__name__
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    if name not in DIFFUSERS_KINDS or not all(hasattr(pipeline, part) for part in parts):
        raise CheckpointError(f"pipeline: is a {name}; allowed: those of diffusers, {', '.join(DIFFUSERS_KINDS)}")
    found = kind_of_index({**pipeline.config, "_class_name": name}, where="pipeline")
    kind = chosen_kind(replace(found, source=name), given=references, called=called)
    transformer = share_transformer(pipeline.transformer)
    transformer.settle()
    autoencoder = share_autoencoder(pipeline.vae)
    text_encoder = share_text_encoder(
        pipeline.text_encoder, pipeline.tokenizer, out_layers=check_layers(text_encoder_out_layers)
    )
    check_parts(transformer, autoencoder, text_encoder, None, "pipeline")
    return Loaded(
        transformer=transformer,
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        schedule=Schedule.from_diffusers(dict(pipeline.scheduler.config), where="scheduler"),
        whole_text=weakref.ref(pipeline.text_encoder),
        default_size=default_size,
        sizes=sizes,
        kind=kind,
        reference_policy=reference_policy,
    )


def check_device(device: torch.device | str) -> torch.device:
    """Return a device of this machine. Raises `InvalidRequest`."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise InvalidRequest("device", f"{device!r} is not a device; use cpu, cuda or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidRequest(
            "device", f"{device} is not on this machine ({torch.cuda.device_count()} CUDA devices); use cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InvalidRequest("device", f"{device} is not available on this machine; use cpu")
    return device


def check_dtype(dtype: torch.dtype | None, torch_dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype that either name gives. Raises `InvalidRequest` for both."""
    if torch_dtype is not None and dtype is not None:
        raise InvalidRequest("dtype", "dtype and torch_dtype are two names of one argument; give one of them")
    return dtype or torch_dtype


def check_kv_cache_dtype(kind: str | None) -> str | None:
    """Return a format of cached K/V, or None for the dtype of the arithmetic. Raises `InvalidRequest`."""
    if kind is not None and kind not in KV_FORMATS:
        raise InvalidRequest("kv_cache_dtype", f"{kind!r} is not one of None, {', '.join(map(repr, KV_FORMATS))}")
    return kind


def _residency(memory_limit: str | int | None, device: torch.device) -> Residency | None:
    if memory_limit is None:
        return None
    limit = parse_bytes(memory_limit)
    if device.type == "cuda":
        return Staged(limit, device)
    if device.type != "cpu":
        raise InvalidRequest("memory_limit", f"is for the CPU and CUDA, not for {device}; leave it out there")
    return Residency(limit)


def check_parts(
    transformer: Transformer,
    autoencoder: Autoencoder,
    text_encoder: TextEncoder,
    preview: Preview | None,
    where: str | os.PathLike[str],
) -> None:
    """Raise `CheckpointError` if parts of different models do not fit together."""
    config = transformer.config
    if autoencoder.channels != config.in_channels:
        raise CheckpointError(
            f"{where}: the autoencoder has {autoencoder.channels} token channels, the transformer {config.in_channels}; "
            "they are of different models"
        )
    if preview is not None and preview.channels != config.in_channels:
        raise CheckpointError(
            f"{where}: previews (latent_preview in limner.json, or preview_decoder) read {preview.channels} channels, "
            f"latents have {config.in_channels}"
        )
    if autoencoder.factor != PIXELS:
        raise CheckpointError(f"{where}: a token stands for {autoencoder.factor} pixels a side; allowed: {PIXELS}")
    width = text_encoder.network.config.hidden_size * len(text_encoder.out_layers)
    if width != config.text_width:
        raise CheckpointError(
            f"{where}: text tokens are {width} wide, the transformer reads {config.text_width}; "
            "text encoder and transformer are of different models"
        )
