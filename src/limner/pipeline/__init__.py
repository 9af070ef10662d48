"""Encode, prefill, denoise, decode: one batch, synchronous.

Owns the call: its arguments (diffusers' names and defaults), the order of work and the result. Knows nothing of queues,
HTTP or the command line.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor, nn

from limner import images
from limner.config import AutoencoderConfig, ModelGeometry, ReferencePolicy, TextConfig
from limner.errors import CapacityError, CheckpointError, InvalidRequest, NumericalError
from limner.grid import check_size
from limner.images import PreparedReference, ReferenceReport, prepare_reference
from limner.memory import Formats, Request, activations, call_bytes, cheapest, kv_bytes, parse_bytes
from limner.memory.residency import Residency
from limner.model.autoencoder import Autoencoder
from limner.model.int8 import has_int8_products
from limner.model.kv import KV_FORMATS
from limner.model.lora import matrix_shapes
from limner.model.preview import LatentPreview
from limner.model.text_encoder import TextEncoder
from limner.model.transformer import Transformer
from limner.pipeline.adapters import Adapters
from limner.references import References, reference_key
from limner.requests import check_prompt
from limner.schedule import Schedule, euler_step
from limner.store import ReferenceStore, Source
from limner.tokens import PATCH, image_ids, pack, reference_ids, text_ids, unpack
from limner.weights.digest import WeightDigests, file_stamp, fingerprint
from limner.weights.folder import (
    load_autoencoder,
    load_text_encoder,
    load_transformer,
    read_json,
    read_settings,
    resolve_model,
    resolve_part,
    transformer_digest,
)
from limner.weights.live import share_autoencoder, share_text_encoder, share_transformer
from limner.weights.lora import load_lora

if TYPE_CHECKING:
    from limner.model.parallel import Parallel

__all__ = [
    "Pipeline",
    "PipelineOutput",
    "PromptReport",
    "Timings",
    "check_device",
    "check_fits",
    "check_prompt",
    "check_size",
]

_logger = logging.getLogger("limner")
_GRID = 16
_KEPT_PROMPTS = 16
_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_CALLBACK_TENSORS = ("latents", "prompt_embeds", "denoised", "preview")

Picture = Image.Image | str | os.PathLike[str] | bytes | PreparedReference
StepCallback = Callable[["Pipeline", int, Tensor, dict[str, Tensor]], Mapping[str, Any] | None]
Progress = Callable[[str, int, int], None]
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _typed_memory_errors(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Turns the ways in which torch and Python run out of memory into `CapacityError`."""

    @functools.wraps(call)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return call(*args, **kwargs)
        except (MemoryError, RuntimeError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            if isinstance(error, RuntimeError) and not re.search(r"(not enough|out of) memory|can't allocate", first):
                raise
            raise CapacityError(
                f"memory ran out ({first}); use fewer or smaller references, a smaller output or fewer images at once"
            ) from error

    return wrapped


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptReport:
    """How a prompt was read: its tokens (chat template included), the limit, and the text that was cut off, or ""."""

    num_tokens: int
    limit: int
    cut: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Seconds of each part of a call: prompts to tokens, references to K/V, each step, latents to pictures."""

    text: float
    references: float
    steps: tuple[float, ...]
    decode: float

    @property
    def total(self) -> float:
        return self.text + self.references + sum(self.steps) + self.decode


@dataclass(frozen=True, kw_only=True, eq=False)
class PipelineOutput:
    """What a call gives.

    `images` is a list of PIL pictures, an array (B, height, width, 3) or a tensor (B, 3, height, width) in [0, 1], or
    latents, as `output_type` asked. `seeds` has one entry an image: the seed that makes it alone, or None where there is
    none (given latents, a generator used before, the later images of a batch that shares one generator).
    `reference_cache` says where the K/V came from, `reference_key` what they are kept under, `seconds_saved` what making
    them took where that was not done again; `references` say what happened to each picture.
    """

    images: Any
    seeds: tuple[int | None, ...]
    timings: Timings
    reference_cache: Literal["none", "miss", "memory", "disk", "remote", "given"]
    references: tuple[ReferenceReport, ...] = ()
    reference_key: str | None = None
    seconds_saved: float = 0.0
    prompts: tuple[PromptReport, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)


class Pipeline:
    """Text to image and editing with any number of references, whose K/V are computed once and kept in `store`."""

    def __init__(
        self,
        *,
        transformer: Transformer,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        schedule: Schedule | None = None,
        default_size: tuple[int, int] = (1024, 1024),
        sizes: Sequence[tuple[int, int]] = (),
        store: ReferenceStore | None = None,
        reference_policy: ReferencePolicy | None = None,
        kv_cache_dtype: str | None = None,
        latent_preview: LatentPreview | None = None,
        residency: Residency | None = None,
    ) -> None:
        """`sizes` are those (width, height) that the model draws; another is drawn with a warning; none: any.

        `residency` is the limit of memory that the networks are under; None: all weights stay where they are.
        """
        self.transformer = transformer
        self.autoencoder = autoencoder
        self.text_encoder = text_encoder
        self.schedule = schedule or Schedule()
        self.default_size = default_size
        self.sizes = tuple(sizes)
        self.store = store if store is not None else ReferenceStore()
        self.reference_policy = (reference_policy or ReferencePolicy()).for_model(None)
        self.kv_cache_dtype = _check_kv_cache_dtype(kv_cache_dtype)
        self.latent_preview = latent_preview
        self.residency = residency
        self._digests = WeightDigests(after=residency.after_read if residency else None)
        self._last_adapters = Adapters.of(transformer, self._digests)
        self._prompts: OrderedDict[tuple[Any, ...], tuple[Tensor, PromptReport]] = OrderedDict()
        self._interrupt = False  # diffusers' way to stop: a callback sets it, the remaining steps are left out
        self._adopt()

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        transformer: str | os.PathLike[str] | None = None,
        vae: str | os.PathLike[str] | None = None,
        text_encoder: str | os.PathLike[str] | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        store: ReferenceStore | None = None,
        reference_policy: ReferencePolicy | None = None,
        quantize: str | None = None,
        kv_cache_dtype: str | None = None,
        memory_limit: str | int | None = None,
        text_encoder_out_layers: Sequence[int] | None = None,
        parallel: str | None = None,
        progress: Progress | None = None,
    ) -> Pipeline:
        """Loads a folder in the diffusers layout, a hub id, or (None) the bundled model.

        `transformer`, `vae` and `text_encoder` replace a part of it: each a file of any layout (original, ComfyUI, fp8,
        GGUF, int8), a folder of that part or of a whole model, or a hub id. The tokenizer is that of `model`.
        `torch_dtype` None keeps the dtype of the files (the bundled model: float32; fp8 and GGUF: bfloat16); `dtype` is
        its newer name. Weights are memory-mapped and not copied, unless dtype or device ask for it. `quantize` "int8" makes
        weights and activations of the blocks' matrices int8 (a folder made by `limner quantize` has them so).
        `kv_cache_dtype` is the format in which K/V of references are kept: None, that of the arithmetic; "int8" or "fp8",
        half the bytes of bfloat16. `memory_limit`, as "20GiB" or bytes, is what the process may have resident, mapped files
        included: networks have their weights in memory by turns, if need be layer by layer, with the same results bit for
        bit (on a CPU under Linux). `parallel` divides the transformer among the processes that torchrun started: "tensor"
        by heads and MLP columns, "sequence" by tokens; all of them make the same calls, one at a time, and get the same
        results (`limner.model.parallel`). Raises `CheckpointError`, `InvalidRequest` and `CapacityError`.
        """
        if torch_dtype is not None and dtype is not None:
            raise InvalidRequest("dtype", "dtype and torch_dtype are two names of one argument; give one of them")
        _check_kv_cache_dtype(kv_cache_dtype)
        if quantize not in (None, "int8"):
            raise InvalidRequest("quantize", f"{quantize!r} is not one of None, 'int8'")
        device = check_device(device)
        residency, place = None, None
        if parallel is not None:
            if memory_limit is not None:
                raise InvalidRequest("memory_limit", "is for a model in one process; leave it out, or parallel")
            from limner.ranks import join

            place, device = join(parallel, device)
        if memory_limit is not None:
            allowed = parse_bytes(memory_limit)
            if device.type != "cpu":
                raise InvalidRequest("memory_limit", f"is for the CPU, not for {device}; leave it out there")
            residency = Residency(allowed)
        after = residency.after_read if residency else None
        given = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder}
        folder = resolve_model(model, without=[part for part, source in given.items() if source is not None])
        settings = read_settings(folder)
        sources = {part: resolve_part(part, source, model=folder) for part, source in given.items()}
        like = {part: folder / part / "config.json" for part in sources}
        dtype = dtype or torch_dtype or settings.default_dtype
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise InvalidRequest("torch_dtype", f"{dtype!r} is not one of torch.float32, torch.bfloat16, torch.float16")
        report = progress or _silent
        scheduler_file = folder / "scheduler" / "scheduler_config.json"
        schedule = Schedule.from_diffusers(read_json(scheduler_file), where=str(scheduler_file))
        before = {part: file_stamp(source) for part, source in sources.items()}
        report("load", 0, 3)
        loaded_transformer = load_transformer(
            sources["transformer"],
            dtype=dtype,
            device=device,
            quantize=quantize,
            like=like["transformer"],
            after=after,
            parallel=place,
        )
        report("load", 1, 3)
        autoencoder = load_autoencoder(sources["vae"], dtype=dtype, device=device, like=like["vae"], after=after)
        report("load", 2, 3)
        loaded_text_encoder = load_text_encoder(
            sources["text_encoder"],
            folder / "tokenizer",
            dtype=dtype,
            device=device,
            out_layers=tuple(text_encoder_out_layers) if text_encoder_out_layers else None,
            like=like["text_encoder"],
            after=after,
        )
        report("load", 3, 3)
        _check_parts(loaded_transformer, autoencoder, loaded_text_encoder, settings.preview, folder)
        pipe = cls(
            transformer=loaded_transformer,
            autoencoder=autoencoder,
            text_encoder=loaded_text_encoder,
            schedule=schedule,
            default_size=settings.default_size,
            sizes=settings.sizes,
            store=store,
            reference_policy=(reference_policy or ReferencePolicy()).for_model(settings.max_reference_pixels),
            kv_cache_dtype=kv_cache_dtype,
            latent_preview=settings.preview,
            residency=residency,
        )
        pipe._check_limit(Request(size=(64, 64), num_text=1))
        modules = {"transformer": loaded_transformer, "vae": autoencoder, "text_encoder": loaded_text_encoder}
        if place is not None and place.shard is not None:
            whole = functools.partial(
                transformer_digest, sources["transformer"], dtype=dtype, quantize=quantize, like=like["transformer"]
            )
            pipe._digests.loaded(
                modules.pop("transformer"),
                sources["transformer"],
                before=before["transformer"],
                shard=place.shard,
                whole=whole,
            )
        for part, module in modules.items():
            pipe._digests.loaded(module, sources[part], before=before[part])
        return pipe

    @classmethod
    def from_diffusers(
        cls,
        pipeline: Any,
        *,
        default_size: tuple[int, int] = (1024, 1024),
        sizes: Sequence[tuple[int, int]] = (),
        store: ReferenceStore | None = None,
        reference_policy: ReferencePolicy | None = None,
        kv_cache_dtype: str | None = None,
        text_encoder_out_layers: Sequence[int] | None = None,
    ) -> Pipeline:
        """Takes over a klein pipeline of diffusers that is in memory: the tensors are shared, none is copied.

        It runs where and in the dtype in which that pipeline is. Text encoder layers that are not read are left out. A
        change of the shared weights in place (training) is one of both, and References made before it are refused.
        Raises `CheckpointError` for base models and for parts with LoRA layers or quantized or offloaded weights.
        """
        kind = type(pipeline).__name__
        parts = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
        if not kind.startswith("Flux2Klein") or not all(hasattr(pipeline, part) for part in parts):
            raise CheckpointError(f"pipeline: is a {kind}; allowed: the klein pipelines of diffusers (Flux2Klein...)")
        if pipeline.config.get("is_distilled") is False:
            raise CheckpointError("pipeline: is_distilled is false; base models need guidance, which is not supported")
        transformer = share_transformer(pipeline.transformer)
        autoencoder = share_autoencoder(pipeline.vae)
        text_encoder = share_text_encoder(
            pipeline.text_encoder, pipeline.tokenizer, out_layers=_check_layers(text_encoder_out_layers)
        )
        _check_parts(transformer, autoencoder, text_encoder, None, "pipeline")
        return cls(
            transformer=transformer,
            autoencoder=autoencoder,
            text_encoder=text_encoder,
            schedule=Schedule.from_diffusers(dict(pipeline.scheduler.config), where="scheduler"),
            default_size=default_size,
            sizes=sizes,
            store=store,
            reference_policy=reference_policy,
            kv_cache_dtype=kv_cache_dtype,
        )

    def to(self, target: torch.device | str | torch.dtype) -> Pipeline:
        """Moves all parts to a device, or casts them to a dtype; gives itself. Not for a parallel model."""
        if self.parallel is not None:
            raise InvalidRequest(
                "to", "a parallel model stays where it was loaded; give device and dtype to from_pretrained"
            )
        cast = isinstance(target, torch.dtype)
        if not isinstance(target, torch.dtype):
            target = check_device(target)
        with self._adapters.removed():  # and put back in the new place
            for part in (self.transformer, self.autoencoder, self.text_encoder):
                with contextlib.nullcontext() if cast else self._digests.moving(part):
                    part.to(target)
        self.text_encoder.rebuild_rotary()
        self._prompts.clear()
        self._adopt()
        return self

    def _adopt(self) -> None:
        """Puts the networks under the limit, as they are now."""
        if self.residency is None:
            return
        transformer = self.transformer
        self.residency.adopt(transformer, [*transformer.transformer_blocks, *transformer.single_transformer_blocks])
        text = self.text_encoder.network
        self.residency.adopt(self.text_encoder, list(text.layers), tables=[text.embed_tokens], hooks=True)
        self.residency.adopt(self.autoencoder)
        transformer.visit = self.residency.visit

    def _working(self, phase: str, request: Request, *, kept: int = 0) -> AbstractContextManager[None]:
        """Around a phase of `limner.memory`: its network's weights in memory. `kept` are bytes that stay after it."""
        if self.residency is None:
            return contextlib.nullcontext()
        networks: dict[str, nn.Module] = {"encode text": self.text_encoder, "encode references": self.autoencoder}
        network = networks.get(phase, self.autoencoder if phase == "decode" else self.transformer)
        own = activations(self.geometry, request, formats=self.formats, whole_pixels=self.autoencoder.whole_pixels)
        return self.residency.working(network, growth=own[phase] + kept)

    def _check_limit(self, request: Request) -> None:
        """Refuses a request that does not fit under the limit however its weights are staged."""
        if self.residency is not None:
            cheapest(self.geometry, request, formats=self.formats, limit=self.residency.limit, fixed=True)

    @property
    def geometry(self) -> ModelGeometry:
        """Geometry of the three networks."""
        text = TextConfig.from_transformers(self.text_encoder.network.config.to_dict())
        return ModelGeometry(
            transformer=self.transformer.config,
            text_encoder=replace(text, num_used=len(self.text_encoder.network.layers)),
            autoencoder=AutoencoderConfig.from_diffusers(dict(self.autoencoder.network.config)),
        )

    def _anonymous(self) -> frozenset[str]:
        """The networks whose weights are no mapped files; asked for under a limit alone."""
        if self.residency is None:
            return frozenset()
        parts = {"transformer": self.transformer, "autoencoder": self.autoencoder, "text_encoder": self.text_encoder}
        return frozenset(name for name, part in parts.items() if not self.residency.mapped(part))

    @property
    def formats(self) -> Formats:
        """How weights, K/V and products are kept, for `limner.memory`."""
        return Formats(
            itemsize=self.dtype.itemsize,
            quantize=self.transformer.quantization,
            kv=self.kv_cache_dtype,
            packed=self.device.type == "cpu" and has_int8_products(),
            anonymous=self._anonymous(),
        )

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def parallel(self) -> Parallel | None:
        """This process's place among those that the transformer is divided among; None where it is whole."""
        return self.transformer.parallel

    @property
    def _shard(self) -> tuple[int, int] | None:
        return self.parallel.shard if self.parallel else None

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def reference_weights(self) -> str:
        """Digest of what K/V of references depend on: weights of transformer (LoRAs and their strengths included) and
        autoencoder, and their geometry.

        Rotary base and axes, the norms' epsilons and groups are in no tensor.
        """
        network = {name: value for name, value in self.autoencoder.network.config.items() if not name.startswith("_")}
        geometry = json.dumps([asdict(self.transformer.config), network], sort_keys=True, default=str)
        parts = (self._adapters.weights_digest(), self._digests.of(self.autoencoder), geometry)
        return hashlib.sha256("/".join(parts).encode()).hexdigest()

    @property
    def digest(self) -> str:
        """Digest of all weights."""
        parts = (self.reference_weights, self._digests.of(self.text_encoder))
        return hashlib.sha256("/".join(parts).encode()).hexdigest()

    @property
    def kernel(self) -> str:
        """The attention kernel and the dtype of matrix products that run."""
        return self.transformer.arithmetic

    # LoRAs, with diffusers' names and meanings

    @property
    def _adapters(self) -> Adapters:
        found = Adapters.of(self.transformer, self._digests)
        if found is not self._last_adapters and self._last_adapters.names:
            _logger.warning("lora: another transformer is in place; %s were of the last one", self._last_adapters.names)
        self._last_adapters = found
        return found

    @_typed_memory_errors
    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        strict: bool = True,
    ) -> None:
        """Loads a LoRA of the transformer: a .safetensors file, a folder or hub id, or tensors by name.

        It acts at once and alone, with strength 1; `set_adapters` lets several act. It runs beside the weights, which may
        be quantized. `adapter_name` left out is default_0, default_1, ...; `weight_name` is the file of a folder or hub id.
        Tensors that are not for this transformer are an error that names them; `strict=False` logs them. References
        that were prefilled with other LoRAs, or strengths, are not taken. Raises `CheckpointError`, `InvalidRequest`.
        """
        source = pretrained_model_name_or_path_or_dict
        shapes, parallel, config = matrix_shapes(self.transformer), self.parallel, self.transformer.config
        if parallel is not None:
            shapes = {name: parallel.whole_shape(name, shape, config) for name, shape in shapes.items()}
        lora = load_lora(source, shapes=shapes, weight_name=weight_name, strict=strict)
        if parallel is not None:
            updates = {name: parallel.own_update(name, update, config) for name, update in lora.updates.items()}
            lora = replace(lora, updates=updates)
        self._adapters.add(lora, adapter_name)

    @_typed_memory_errors
    def set_adapters(
        self, adapter_names: Sequence[str] | str, adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Lets these adapters act, and no others, each with its weight; one number is for all, None is 1."""
        self._adapters.set(adapter_names, adapter_weights)

    def get_active_adapters(self) -> list[str]:
        """The names of the adapters that act."""
        return self._adapters.active

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The names of the adapters that are loaded, by part."""
        return {"transformer": self._adapters.names} if self._adapters.names else {}

    def delete_adapters(self, adapter_names: Sequence[str] | str) -> None:
        """Forgets adapters."""
        self._adapters.delete(adapter_names)

    def unload_lora_weights(self) -> None:
        """Forgets all adapters. Fused ones stay in the weights, as in diffusers, until `unfuse_lora`."""
        self._adapters.clear()

    @_typed_memory_errors
    def fuse_lora(
        self,
        components: Sequence[str] = ("transformer",),
        lora_scale: float = 1.0,
        safe_fusing: bool = True,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Adds adapters, the active ones or `adapter_names`, times `lora_scale`, to the weights, in float32, rounded once.

        Nothing runs beside the weights then, and the weights are in memory twice: the old ones are kept for
        `unfuse_lora`. Sums that are not finite are always refused (`safe_fusing`). Not for int8 weights.
        """
        _check_components(components)
        self._adapters.fuse(adapter_names, lora_scale)

    def unfuse_lora(self, components: Sequence[str] = ("transformer",)) -> None:
        """Puts the very tensors back that were there before `fuse_lora`; adapters act beside them again."""
        _check_components(components)
        self._adapters.unfuse()

    @property
    def fused_loras(self) -> set[str]:
        """The names of adapters that are fused."""
        return set(self._adapters.fused)

    @property
    def num_fused_loras(self) -> int:
        return len(self.fused_loras)

    # references

    @_typed_memory_errors
    def prefill(self, image: Picture | Sequence[Picture]) -> References:
        """The K/V of an ordered list of references, from the store or computed."""
        return self.prefill_from(image)[0]

    @_typed_memory_errors
    def prefill_from(self, image: Picture | Sequence[Picture]) -> tuple[References, Source]:
        """What `prefill` gives, and where it came from: "miss", "memory", "disk" or "remote"."""
        return self._references(self._prepare(image), num_own=0, batch=1)

    def key_of(self, prepared: Sequence[PreparedReference]) -> str:
        """The content key of prepared pictures in this order, whether or not their K/V were computed yet."""
        return self._key(prepared, weights=self.reference_weights, kernel=self.kernel)

    def _key(self, prepared: Sequence[PreparedReference], *, weights: str, kernel: str) -> str:
        return reference_key(
            weights=weights,
            dtype=self.dtype,
            arithmetic=kernel,
            digests=[p.report.digest for p in prepared],
            quantization=self.kv_cache_dtype,
            shard=self._shard,
        )

    def _prepare(self, image: Picture | Sequence[Picture]) -> list[PreparedReference]:
        single = isinstance(image, (Image.Image, str, os.PathLike, bytes, PreparedReference))
        pictures = [image] if single else image
        if not isinstance(pictures, (list, tuple)):
            raise InvalidRequest("image", f"{type(image).__name__} is not a picture or a list of pictures")
        if not pictures:
            raise InvalidRequest("image", "an empty list has no reference; leave image out for text to image")
        return [
            prepare_reference(picture, policy=self.reference_policy, field=f"image {i}")
            for i, picture in enumerate(pictures, start=1)
        ]

    def _references(self, prepared: list[PreparedReference], *, num_own: int, batch: int) -> tuple[References, Source]:
        """The References of prepared pictures and where they came from; own tokens are those to be drawn with them."""
        weights, kernel, quantization = self.reference_weights, self.kernel, self.kv_cache_dtype
        reports = tuple(p.report for p in prepared)

        @torch.no_grad()
        def make() -> References:
            sizes = [p.report.processed_size for p in prepared]
            self._admit(num_ref=sum(w * h for w, h in sizes) // _GRID**2, num_own=num_own, batch=batch)
            start = self._now()
            request = Request(size=(_GRID, _GRID), references=tuple(sizes))
            with self._working("encode references", request):
                latents = [self.autoencoder.encode(images.to_pixels(p.pixels)) for p in prepared]
            ref_tokens = torch.cat([pack(x) for x in latents], dim=1).to(self.device, self.dtype)
            ref_tokens = ref_tokens if self.parallel is None else self.parallel.of_first(ref_tokens)
            with self._working("prefill", request, kept=self.kv_bytes(request.num_ref)):
                kv = self.transformer.prefill(ref_tokens, reference_ids([(x.shape[2], x.shape[3]) for x in latents]))
            return References.make(
                kv,
                weights=weights,
                kernel=kernel,
                quantization=quantization,
                reports=reports,
                prefill_seconds=self._now() - start,
                shard=self._shard,
            )

        key = self._key(prepared, weights=weights, kernel=kernel)
        if self.parallel is None:
            references, source = self.store.get(key, make, device=self.device)
        else:
            references, source = self._agreed(key, make, prepared, self.parallel)
        return _with_reports(references, reports), source

    def _agreed(
        self, key: str, make: Callable[[], References], prepared: list[PreparedReference], parallel: Parallel
    ) -> tuple[References, Source]:
        """As `ReferenceStore.get`, with one answer for all processes: the entry is made again unless all have theirs."""
        parallel.check_same({"image": [p.report.digest for p in prepared]})
        found = self.store.find(key, device=self.device)
        if all(parallel.told(found is not None)) and found is not None:
            return found
        made = make()
        if found is None:
            made, _ = self.store.get(key, lambda: made, device=self.device)
        return made, "miss"

    def _check_given(self, references: References) -> References:
        if not isinstance(references, References):
            raise InvalidRequest(
                "references", f"{type(references).__name__} is not limner.References; use pipe.prefill"
            )
        if references.weights != self.reference_weights:
            raise InvalidRequest(
                "references",
                f"they were made with weights {references.weights}, this pipeline has {self.reference_weights}; "
                "prefill the pictures with this pipeline",
            )
        if references.dtype != self.dtype:
            raise InvalidRequest(
                "references",
                f"their dtype is {references.dtype}, the pipeline's {self.dtype}; prefill the pictures again",
            )
        if references.shard is None and self._shard is not None:
            references = references.part(*self._shard)
        if references.shard != self._shard:
            raise InvalidRequest(
                "references",
                f"they are of part {references.shard} (rank, processes) of the heads, this pipeline has "
                f"{self._shard or 'all of them'}; prefill the pictures with this pipeline",
            )
        config = self.transformer.config
        num_heads = config.num_heads // (self._shard[1] if self._shard else 1)
        shape, expected = tuple(references.layers[0].k.shape[2:]), (num_heads, config.head_dim)
        if len(references.layers) != config.num_layers or shape != expected:
            raise InvalidRequest(
                "references",
                f"they have {len(references.layers)} layers of {shape}, the model {config.num_layers} of {expected}; "
                "prefill the pictures again",
            )
        return _with_reports(self.store.place(references, device=self.device), references.reports)

    def _admit(self, *, num_ref: int, num_own: int, batch: int) -> None:
        """Refuses what cannot fit in free memory, with the numbers; arguments as of `memory_needed`."""
        needed = self.memory_needed(num_ref=num_ref, num_own=num_own, batch=batch)
        if self.device.type == "cuda":
            unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            free = torch.cuda.mem_get_info(self.device)[0] + unused
        else:
            free = psutil.virtual_memory().available
        check_fits(needed, free, num_ref=num_ref, num_own=num_own, batch=batch)

    def memory_needed(self, *, num_ref: int, num_own: int, batch: int) -> int:
        """Bytes that a call takes at its widest moment, beside the weights. Counts are of tokens of 16x16 pixels.

        `num_ref` counts references that are yet to be prefilled: K/V that are kept already are in memory already.
        `num_own` are the text and output tokens of one image.
        """
        network = self.autoencoder.network.config
        elsewhere = kv_bytes(self.transformer.config, num_ref, itemsize=self.dtype.itemsize, kv=self.kv_cache_dtype)
        elsewhere -= self.kv_bytes(num_ref)
        return (
            call_bytes(
                self.transformer.config,
                AutoencoderConfig.from_diffusers(dict(network)),
                num_ref=num_ref,
                num_own=num_own,
                batch=batch,
                formats=self.formats,
                whole_pixels=self.autoencoder.whole_pixels,
                reference_pixels=min(num_ref * _GRID**2, self.reference_policy.pixels),
            )
            - elsewhere
        )

    def kv_bytes(self, num_ref: int) -> int:
        """Bytes of the K/V of reference tokens, as they are kept here."""
        whole = kv_bytes(self.transformer.config, num_ref, itemsize=self.dtype.itemsize, kv=self.kv_cache_dtype)
        return whole // (self._shard[1] if self._shard else 1)

    # prompts

    def _encode_prompts(
        self, prompts: Sequence[str], *, limit: int, out_layers: Sequence[int] | None
    ) -> tuple[Tensor, tuple[PromptReport, ...]]:
        """(B, S_txt, text_width); each prompt is encoded alone, so its tokens do not depend on its neighbours."""
        encoder = fingerprint(self.text_encoder, after=self._digests.after)
        found = []
        for prompt in prompts:
            key = (prompt, limit, out_layers, encoder)
            if key not in self._prompts:
                tokenized = self.text_encoder.tokenize(prompt, max_sequence_length=limit)
                report = PromptReport(num_tokens=tokenized.num_tokens, limit=limit, cut=tokenized.cut)
                with self._working("encode text", Request(size=(_GRID, _GRID), num_text=limit)):
                    self._prompts[key] = self.text_encoder([tokenized], out_layers=out_layers), report
                if len(self._prompts) > _KEPT_PROMPTS:
                    self._prompts.popitem(last=False)
            self._prompts.move_to_end(key)
            tokens, report = self._prompts[key]
            if report.num_tokens > limit:
                _logger.warning("prompt: %d tokens, %d are read; cut: %r", report.num_tokens, limit, report.cut)
            found.append((tokens, report))
        width = self.transformer.config.text_width
        if found[0][0].shape[-1] != width:
            raise InvalidRequest(
                "text_encoder_out_layers",
                f"gives tokens of width {found[0][0].shape[-1]}, the transformer reads {width}",
            )
        return torch.cat([tokens for tokens, _ in found]), tuple(report for _, report in found)

    # the call

    @_typed_memory_errors
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        image: Picture | Sequence[Picture] | None = None,
        references: References | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        sigmas: Sequence[float] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        text_encoder_out_layers: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> PipelineOutput | tuple[Any]:
        """Draws (no references) or edits.

        `image` is one picture or an ordered list; `references` is what `prefill` gave instead. Height and width are
        multiples of 16, at least 64; left out, they are those of the first processed reference, else the model's own.
        `latents` are noise (B, 4 C, height/16, width/16). `num_images_per_prompt` images of a prompt stand side by side.
        `max_sequence_length` left out is 512, or what the tokenizer declares if that is less. With `latents` given,
        `generator` has nothing to draw. The callback gets (pipeline, step, timestep, tensors), latents as float32 tokens
        (B, S_img, C), and may give back changed latents and prompt_embeds, and rows, the list of those images of the
        batch that go on (the others are dropped, also from the output); it may also ask for denoised, the clean tokens
        that this step predicts, and preview, these as small pictures (B, 3, height/8, width/8) in [0, 1]. `Cancelled`
        raised in it stops the run, `pipe._interrupt = True` leaves out the remaining steps. `progress(part, done, of)`
        hears of every part. With a parallel model callbacks run in every process and have to do the same. Raises
        `InvalidRequest`, `CapacityError` and `NumericalError`.
        """
        report = progress or _silent
        self._interrupt = False
        prompts = _check_prompts(prompt, prompt_embeds)
        if output_type not in _OUTPUT_TYPES:
            raise InvalidRequest("output_type", f"{output_type!r} is not one of {', '.join(_OUTPUT_TYPES)}")
        _check_count("num_images_per_prompt", num_images_per_prompt)
        _check_count("num_inference_steps", num_inference_steps)
        limit = min(512, self.text_encoder.max_length) if max_sequence_length is None else max_sequence_length
        _check_count("max_sequence_length", limit)
        out_layers = _check_layers(text_encoder_out_layers)
        unknown = set(callback_on_step_end_tensor_inputs) - set(_CALLBACK_TENSORS)
        if unknown:
            raise InvalidRequest(
                "callback_on_step_end_tensor_inputs",
                f"{sorted(unknown)} are not offered; allowed: {', '.join(_CALLBACK_TENSORS)}",
            )
        if "preview" in callback_on_step_end_tensor_inputs and self.latent_preview is None:
            raise InvalidRequest(
                "callback_on_step_end_tensor_inputs",
                "preview needs a map of latents to pixels, and this model has none (latent_preview in limner.json); fit "
                "one with limner.model.preview.LatentPreview.fit, or ask for denoised and decode it",
            )
        if image is not None and references is not None:
            raise InvalidRequest("image", "image and references are both given; give one of them")

        # What can be refused is refused before any work is done.
        prepared = self._prepare(image) if image is not None else []
        given = self._check_given(references) if references is not None else None
        sizes = [p.report.processed_size for p in prepared] or list(given.sizes if given else ())
        num_prompts = len(prompts) if prompts is not None else _check_embeds(prompt_embeds, self.transformer)
        batch = num_prompts * num_images_per_prompt
        if latents is not None:
            height, width = self._check_latents(latents, batch=batch, height=height, width=width)
        width = check_size("width", width if width is not None else (sizes or [self.default_size])[0][0])
        height = check_size("height", height if height is not None else (sizes or [self.default_size])[0][1])
        grid = (height // _GRID, width // _GRID)
        num_txt = limit if prompt_embeds is None else prompt_embeds.shape[1]
        num_own = grid[0] * grid[1] + num_txt
        loras = [asdict(lora) for lora in self._adapters.applied]
        self._admit(num_ref=0, num_own=num_own, batch=batch)
        self._check_limit(Request(size=(width, height), references=tuple(sizes), batch=batch, num_text=num_txt))
        levels = self.schedule.sigmas(grid[0] * grid[1], num_steps=num_inference_steps, custom=sigmas)
        generators, seeds = self._generators(generator, latents=latents, batch=batch)
        if self.sizes and (width, height) not in self.sizes:
            allowed = ", ".join(f"{w}x{h}" for w, h in self.sizes)
            _logger.warning("%dx%d is not a size that this model has learned to draw: %s", width, height, allowed)

        start = time.perf_counter()
        prompt_reports: tuple[PromptReport, ...] = ()
        if prompts is not None:
            report("text", 0, 1)
            prompt_embeds, prompt_reports = self._encode_prompts(prompts, limit=limit, out_layers=out_layers)
        assert prompt_embeds is not None
        prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        drawn_from = _noise_source(latents, generators) if self.parallel is not None else []
        noise = self._noise(latents, grid=grid, batch=batch, generators=generators, dtype=prompt_embeds.dtype)
        if self.parallel is not None:
            # what processes compute may differ in its last bits where machines do: texts and seeds have to be equal, and
            # tokens and noise are those of process 0
            asked = {
                "size": [*prompt_embeds.shape, *noise.shape],
                "sigmas": levels.tolist(),
                "prompt": prompts if prompts is not None else _short_digest(prompt_embeds),
                "latents" if latents is not None else "generator": drawn_from,
                "references": given and [report.digest for report in given.reports],
                "image": [p.report.digest for p in prepared],
                "lora": loras,
            }
            self.parallel.check_same(asked)
            prompt_embeds, noise = (self.parallel.of_first(x.to(self.device)) for x in (prompt_embeds, noise))
        text_done = self._now()
        report("text", 1, 1)

        cache: Literal["none", "miss", "memory", "disk", "remote", "given"] = "given" if given else "none"
        if prepared:
            report("references", 0, 1)
            given, cache = self._references(prepared, num_own=num_own, batch=batch)
            report("references", 1, 1)
        references_done = self._now()

        tokens, step_seconds, rows = self._denoise(
            pack(noise),
            prompt_embeds,
            levels,
            grid,
            given,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            report,
        )
        if not torch.isfinite(tokens).all():
            raise NumericalError(
                f"the latents are not finite in {self.dtype}: the weights are damaged, or the dtype is too narrow for "
                "them; check the files, or use torch.float32 or torch.bfloat16 (--dtype)"
            )
        decode_start = time.perf_counter()
        report("decode", 0, 1)
        pictures = self._decode(unpack(tokens, grid=grid).to(prompt_embeds.dtype), output_type)
        report("decode", 1, 1)
        timings = Timings(
            text=text_done - start,
            references=references_done - text_done,
            steps=step_seconds,
            decode=self._now() - decode_start,
        )
        if not return_dict:
            return (pictures,)
        return PipelineOutput(
            images=pictures,
            seeds=tuple(seeds[row] for row in rows),
            timings=timings,
            reference_cache=cache,
            references=given.reports if given else (),
            reference_key=given.key if given else None,
            seconds_saved=given.prefill_seconds if given and cache != "miss" else 0.0,
            prompts=prompt_reports,
            metadata={
                "height": height,
                "width": width,
                "num_inference_steps": len(levels) - 1,
                "sigmas": [round(level, 6) for level in levels.tolist()],
                "references": [r.digest for r in given.reports] if given else [],
                "dtype": str(self.dtype).removeprefix("torch."),
                **({"loras": loras} if loras else {}),
            },
        )

    def _denoise(
        self,
        latents: Tensor,
        prompt_embeds: Tensor,
        levels: Tensor,
        grid: tuple[int, int],
        references: References | None,
        callback: StepCallback | None,
        callback_inputs: Sequence[str],
        report: Progress,
    ) -> tuple[Tensor, tuple[float, ...], list[int]]:
        """Noise tokens (B, S_img, C) to clean ones in float32, the seconds of each step, and which images they are."""
        rows = list(range(len(latents)))
        img_ids, txt_ids = image_ids(grid), text_ids(prompt_embeds.shape[1])
        rope = self.transformer.rope(torch.cat([txt_ids, img_ids]))
        timesteps, levels = (levels[:-1] * 1000).to(self.device), levels.to(self.device)
        size = (grid[1] * _GRID, grid[0] * _GRID)
        request = Request(size=size, batch=latents.shape[0], num_text=prompt_embeds.shape[1])
        seconds, loras = [], self._adapters.applied
        with self._working("denoise", request):
            for i, timestep in enumerate(timesteps):
                report("step", i, len(timesteps))
                start = time.perf_counter()
                velocity = self.transformer(
                    latents.to(self.dtype),
                    prompt_embeds.to(self.device, self.dtype),
                    timestep / 1000,  # with the roundings of diffusers, which multiplies by 1000 and divides again
                    img_ids=img_ids,
                    txt_ids=txt_ids,
                    references=references,
                    rope=rope,
                )
                before, latents = latents, euler_step(latents, velocity, sigma=levels[i], next_sigma=levels[i + 1])
                if callback is not None:
                    offered = {"latents": latents, "prompt_embeds": prompt_embeds}
                    if {"denoised", "preview"} & set(callback_inputs):
                        clean = euler_step(before, velocity, sigma=levels[i], next_sigma=torch.zeros_like(levels[i]))
                        offered["denoised"] = clean
                        if self.latent_preview is not None:
                            offered["preview"] = self.latent_preview(unpack(clean, grid=grid))
                    changed = callback(self, i, timestep, {name: offered[name] for name in callback_inputs}) or {}
                    for name in ("latents", "prompt_embeds"):
                        old = offered[name]
                        new = changed.get(name, old)
                        if not isinstance(new, Tensor) or new.shape != old.shape:
                            raise InvalidRequest(
                                "callback_on_step_end", f"gave back {name} that are not {list(old.shape)}"
                            )
                    latents = changed.get("latents", latents).to(self.device)
                    prompt_embeds = changed.get("prompt_embeds", prompt_embeds)
                    if (kept := changed.get("rows")) is not None:
                        if not kept or sorted({*kept} & {*range(len(rows))}) != list(kept):
                            raise InvalidRequest(
                                "callback_on_step_end",
                                f"gave back rows {kept}; allowed: rising numbers of the {len(rows)} images of the batch",
                            )
                        rows = [rows[i] for i in kept]
                        latents, prompt_embeds = latents[kept], prompt_embeds[kept]
                    if references is not None and self._adapters.applied != loras:
                        raise InvalidRequest(
                            "callback_on_step_end",
                            "changed the LoRAs, and the K/V of the references were made with those before; change them "
                            "between calls, or draw without references",
                        )
                seconds.append(self._now() - start)
                if self._interrupt:
                    break
        report("step", len(timesteps), len(timesteps))
        return latents, tuple(seconds), rows

    def _now(self) -> float:
        """Seconds of a clock, after all work that was given to the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        network_latents = self.autoencoder.denormalise(latents)
        if output_type == "latent":
            return network_latents
        at_once = max(1, 1024 * 1024 // (network_latents.shape[2] * network_latents.shape[3] * 64))
        scale = self.autoencoder.factor // PATCH
        size = (network_latents.shape[3] * scale, network_latents.shape[2] * scale)
        with self._working("decode", Request(size=size, batch=len(network_latents))):
            parts = [self.autoencoder.decode(part) for part in torch.split(network_latents, at_once)]
        pictures = (torch.cat(parts) * 0.5 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return pictures
        if output_type == "np":
            array: np.ndarray[Any, Any] = pictures.float().permute(0, 2, 3, 1).cpu().numpy()
            return array
        return images.to_pil(pictures)

    # noise

    def _generators(
        self, generator: torch.Generator | Sequence[torch.Generator] | None, *, latents: Tensor | None, batch: int
    ) -> tuple[list[torch.Generator] | torch.Generator, tuple[int | None, ...]]:
        """The generators of a batch and the seed of each image; a drawn seed is one that reproduces its image alone."""
        if self.parallel is not None:
            self.parallel.check_same({"generator": type(generator).__name__, "latents": latents is not None})
        if latents is not None:
            return [], (None,) * batch
        if isinstance(generator, torch.Generator):
            return generator, (_seed_of(generator), *(None,) * (batch - 1))
        if generator is None:
            drawn = torch.randint(0, 2**31, (batch,), generator=_fresh_generator()).tolist()
            drawn = drawn if self.parallel is None else self.parallel.decided(drawn)
            generator = [torch.Generator().manual_seed(seed) for seed in drawn]
        if not isinstance(generator, (list, tuple)) or not all(isinstance(g, torch.Generator) for g in generator):
            raise InvalidRequest("generator", f"{generator!r} is not a torch.Generator or a list of them")
        generators = list(generator)
        if len(generators) != batch:
            raise InvalidRequest(
                "generator",
                f"a list of {len(generators)} for {batch} images (prompts x num_images_per_prompt); give one for each, or "
                "one generator for all",
            )
        return generators, tuple(_seed_of(g) for g in generators)

    def _noise(
        self,
        latents: Tensor | None,
        *,
        grid: tuple[int, int],
        batch: int,
        generators: list[torch.Generator] | torch.Generator,
        dtype: torch.dtype,
    ) -> Tensor:
        """(B, 4 C, h, w) float32; drawn in the dtype of the prompt tokens, as diffusers does, so that seeds agree."""
        from diffusers.utils.torch_utils import randn_tensor

        if latents is None:
            shape = (batch, self.transformer.config.in_channels, *grid)
            latents = randn_tensor(shape, generator=generators, device=self.device, dtype=dtype)
        return latents.to(self.device, dtype).float()

    def _check_latents(self, latents: Tensor, *, batch: int, height: int | None, width: int | None) -> tuple[int, int]:
        """The (height, width) of given noise."""
        channels = self.transformer.config.in_channels
        if not isinstance(latents, Tensor) or not latents.is_floating_point() or not torch.isfinite(latents).all():
            raise InvalidRequest("latents", "have to be a tensor of finite floating point numbers")
        if latents.dim() != 4 or latents.shape[1] != channels:
            raise InvalidRequest(
                "latents", f"have shape {list(latents.shape)}; allowed: (B, {channels}, height/16, width/16)"
            )
        if latents.shape[0] != batch:
            raise InvalidRequest("latents", f"have batch {latents.shape[0]}, the prompts ask for {batch} images")
        found = (latents.shape[2] * _GRID, latents.shape[3] * _GRID)
        for name, asked, has in (("height", height, found[0]), ("width", width, found[1])):
            if asked is not None and asked != has:
                raise InvalidRequest("latents", f"are for {name} {has}, {name}={asked} was asked; leave {name} out")
        return found


def _with_reports(references: References, reports: tuple[ReferenceReport, ...]) -> References:
    """What the store keeps under a key was perhaps made from other pictures with the same processed pixels."""
    return references if references.reports == reports else replace(references, reports=reports)


def check_fits(needed: int, free: int, *, num_ref: int, num_own: int, batch: int) -> None:
    """Raises `CapacityError` with the numbers where `needed` bytes are more than `free`."""
    if needed <= free:
        return
    what, remedy = f"size: {batch} x {num_own} own tokens need", "a smaller output or fewer images at once"
    if num_ref:
        what = f"references: {num_ref} reference tokens and {batch} x {num_own} own tokens need"
        remedy = f"fewer or smaller references (ReferencePolicy(max_pixels=...), --max-pixels), {remedy}"
    raise CapacityError(f"{what} {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; use {remedy}")


def _silent(part: str, done: int, of: int) -> None:
    """The progress of callers that do not ask for it."""


def _short_digest(x: Tensor) -> str:
    """Tells tensors apart in an error message."""
    return hashlib.sha256(x.detach().double().cpu().numpy().tobytes()).hexdigest()[:16]


def _noise_source(latents: Tensor | None, generators: Sequence[torch.Generator] | torch.Generator) -> list[str]:
    """Tells apart what noise is drawn from: that is equal where noise, computed on different machines, may not be."""
    if latents is not None:
        return [_short_digest(latents)]
    every = [generators] if isinstance(generators, torch.Generator) else generators
    return [_short_digest(generator.get_state()) for generator in every]


def _fresh_generator() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


def _check_prompts(prompt: str | Sequence[str] | None, prompt_embeds: Tensor | None) -> list[str] | None:
    if (prompt is None) == (prompt_embeds is None):
        raise InvalidRequest("prompt", "give either prompt or prompt_embeds" + ("" if prompt is None else ", not both"))
    if prompt is None:
        return None
    if not isinstance(prompt, (str, list, tuple)):
        raise InvalidRequest("prompt", f"{type(prompt).__name__} is not a text; give a string or a list of strings")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise InvalidRequest("prompt", "an empty list has no prompt; give at least one")
    for text in prompts:
        check_prompt(text)
    return prompts


def _check_embeds(prompt_embeds: Tensor | None, transformer: Transformer) -> int:
    width = transformer.config.text_width
    if not isinstance(prompt_embeds, Tensor) or not prompt_embeds.is_floating_point():
        raise InvalidRequest("prompt_embeds", "have to be a tensor of floating point numbers")
    if prompt_embeds.dim() != 3 or prompt_embeds.shape[-1] != width or 0 in prompt_embeds.shape:
        raise InvalidRequest("prompt_embeds", f"have shape {list(prompt_embeds.shape)}; allowed: (B, S_txt, {width})")
    if not torch.isfinite(prompt_embeds).all():
        raise InvalidRequest("prompt_embeds", "hold values that are not finite; encode the prompt again")
    return prompt_embeds.shape[0]


def _seed_of(generator: torch.Generator) -> int | None:
    """The seed that gives what this generator would give now, if it was not used yet."""
    seed = generator.initial_seed()
    fresh = torch.Generator(generator.device).manual_seed(seed)
    return seed if torch.equal(fresh.get_state(), generator.get_state()) else None


def _check_kv_cache_dtype(kind: str | None) -> str | None:
    if kind is not None and kind not in KV_FORMATS:
        raise InvalidRequest("kv_cache_dtype", f"{kind!r} is not one of None, {', '.join(map(repr, KV_FORMATS))}")
    return kind


def _check_components(components: Sequence[str]) -> None:
    if list(components) != ["transformer"]:
        raise InvalidRequest("components", f"{list(components)} has to be ['transformer'], the part that has LoRAs")


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidRequest(name, f"{value!r} is not a whole number of at least 1")


def _check_layers(layers: Sequence[int] | None) -> tuple[int, ...] | None:
    if layers is None:
        return None
    if not isinstance(layers, (list, tuple)) or not all(isinstance(i, int) for i in layers):
        raise InvalidRequest("text_encoder_out_layers", f"{layers!r} is not a list of layer numbers; leave it out")
    return tuple(layers)


def check_device(device: torch.device | str) -> torch.device:
    """A device of this machine. Raises `InvalidRequest`."""
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


def _check_parts(
    transformer: Transformer,
    autoencoder: Autoencoder,
    text_encoder: TextEncoder,
    preview: LatentPreview | None,
    folder: Path | str,
) -> None:
    """Parts of different models do not fit together; say so before the first run."""
    config = transformer.config
    if autoencoder.channels != config.in_channels:
        raise CheckpointError(
            f"{folder}: the autoencoder has {autoencoder.channels} token channels, the transformer {config.in_channels}; "
            "they are of different models"
        )
    if preview is not None and preview.channels != config.in_channels:
        raise CheckpointError(
            f"{folder}: latent_preview in limner.json reads {preview.channels} channels, latents have {config.in_channels}"
        )
    if autoencoder.factor != _GRID:
        raise CheckpointError(f"{folder}: a token stands for {autoencoder.factor} pixels a side; allowed: {_GRID}")
    width = text_encoder.network.config.hidden_size * len(text_encoder.out_layers)
    if width != config.text_width:
        raise CheckpointError(
            f"{folder}: text tokens are {width} wide, the transformer reads {config.text_width}; "
            "text encoder and transformer are of different models"
        )
