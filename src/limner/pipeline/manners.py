"""Diffusers' manners over `Pipeline`: argument order, results, attributes and switches.

Owns nothing of how pictures are made: every call goes to `Pipeline`. What diffusers has and this engine has no use for is
accepted and says so in a line of the log. `Manners` has what all of diffusers' klein classes share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor
from tqdm import tqdm

from limner.errors import InvalidRequest, MissingExtra
from limner.grid import PIXELS, whole_number
from limner.images import MAX_FILE_BYTES, Picture
from limner.images.sources import as_list
from limner.kinds import DIFFUSERS_KINDS
from limner.memory.pages import can_release
from limner.model.autoencoder import Autoencoder
from limner.model.text_encoder import TextEncoder
from limner.model.transformer import Transformer
from limner.pipeline import saving
from limner.pipeline.adapters import check_strength
from limner.pipeline.check import ArgumentChecker
from limner.pipeline.load import Loaded, check_parts
from limner.pipeline.output import PipelineOutput
from limner.pipeline.pipeline import Pipeline, StepCallback
from limner.pipeline.progress import Progress
from limner.pipeline.turns import Turns
from limner.pipeline.unknown import check_names
from limner.references import References
from limner.requests import Loras
from limner.schedule import Schedule
from limner.store import Source
from limner.tokens import text_ids
from limner.weights.live import as_diffusers_autoencoder, share_autoencoder, share_text_encoder, share_transformer
from limner.weights.plain_tokenizer import PlainTokenizer, transformers_tokenizer

__all__ = ["DropInOutput", "Manners", "as_diffusers"]

_logger = logging.getLogger("limner")
_Call = TypeVar("_Call", bound=Callable[..., Any])
_LARGEST_SEED = 2**63 - 1
_MOST_IMAGES = 10_000
_CASTABLE = ("transformer", "vae", "text_encoder")


class DropInOutput(PipelineOutput):
    """A result that is also read as diffusers' are: `out[0]`, `out["images"]`, `out.to_tuple()`; its one key is images."""

    def __getitem__(self, key: int | slice | str) -> Any:
        return getattr(self, key) if isinstance(key, str) and key in self.__dataclass_fields__ else self._at(key)

    def _at(self, key: Any) -> Any:
        if isinstance(key, str):
            raise KeyError(key)
        return self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any]:
        """Return (images,), what a call with `return_dict=False` returns."""
        return (self.images,)

    def keys(self) -> list[str]:
        return ["images"]

    def values(self) -> list[Any]:
        return [self.images]

    def items(self) -> list[tuple[str, Any]]:
        return [("images", self.images)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return 1

    @classmethod
    def of(cls, output: PipelineOutput) -> DropInOutput:
        """Return the same result."""
        return cls(**{name: getattr(output, name) for name in output.__dataclass_fields__})


def as_diffusers(call: _Call) -> _Call:
    """Decorate the call of a class with diffusers' argument order (image, prompt, ...).

    One text, or a list of texts, given first and without another prompt is the prompt: `pipe("a cat", image=picture)`, as
    `Pipeline` takes it and diffusers' own example writes it. An unknown name is an error that suggests the right one.
    """
    names = [name for name in inspect.signature(call).parameters if name != "self"]

    @functools.wraps(call)
    def ordered(self: Any, *args: Any, **given: Any) -> Any:
        check_names(given, names, where=f"{type(self).__name__}'s call")
        if len(args) == 1 and _is_text(args[0]) and not {"prompt", "prompt_embeds"} & {*given}:
            return call(self, prompt=args[0], **given)
        return call(self, *args, **given)

    return cast(_Call, ordered)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(text, str) for text in value)
    )


def _without_effect(name: str, why: str) -> Callable[..., None]:
    """Return a method of diffusers' that has nothing to do here, and says so in the log."""

    def method(self: Any, *args: Any, **given: Any) -> None:
        _logger.info("%s has no effect: %s", name, why)

    method.__name__, method.__doc__ = name, f"No effect: {why}."
    return method


_STRIPS = "large pictures go through the autoencoder in strips, with the same result"
_ONE_BY_ONE = "pictures of a batch are decoded one after another where they are large"
_KERNELS = "the attention kernel is chosen by device (pipe.transformer.kernel)"
_FUSED = "the products of q, k and v are laid out at loading"
_HOOKS = "nothing is hooked to the networks"


class Manners(Pipeline):
    """What diffusers' klein pipelines have in common, over `Pipeline`.

    A subclass for another of these classes writes `__call__` with that class's arguments, under `as_diffusers`, and passes
    them on to `_draw_as_diffusers`.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "prompt_embeds"]
    _optional_components: ClassVar[list[str]] = []
    _exclude_from_cpu_offload: ClassVar[list[str]] = []
    model_cpu_offload_seq: ClassVar[str] = "text_encoder->transformer->vae"
    vae_scale_factor: ClassVar[int] = PIXELS // 2
    tokenizer_max_length: ClassVar[int] = 512
    default_sample_size: ClassVar[int] = 128
    make_client: ClassVar[Callable[[], Any] | None] = None
    """Makes the `OutboundClient` that fetches pictures by URL; None: one that reaches public addresses alone, by https."""

    def __init__(
        self,
        scheduler: Any = None,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        transformer: Any = None,
        is_distilled: bool | None = None,
        **own: Any,
    ) -> None:
        """Take parts as diffusers does, networks of diffusers and transformers or those of `components`, or as `Pipeline`.

        The tensors are shared, none is copied. `is_distilled` None is the class's default in diffusers. Raises
        `CheckpointError` as `Pipeline.from_diffusers`.
        """
        if self._diffusers_class is not None and "kind" not in own:
            kind = DIFFUSERS_KINDS[self._diffusers_class]
            own["kind"] = kind if is_distilled is None else dataclasses.replace(kind, distilled=is_distilled)
        whole = text_encoder
        if not isinstance(transformer, Transformer):
            transformer = share_transformer(transformer)
        if not isinstance(text_encoder, TextEncoder):
            text_encoder = share_text_encoder(text_encoder, tokenizer)
        if "autoencoder" not in own:
            own["autoencoder"] = vae if isinstance(vae, Autoencoder) else share_autoencoder(vae)
        if scheduler is not None:
            own["schedule"] = _schedule_of(scheduler)
        check_parts(transformer, own["autoencoder"], text_encoder, own.get("latent_preview"), type(self).__name__)
        super().__init__(transformer=transformer, text_encoder=text_encoder, **own)
        self._progress_bar: dict[str, Any] = {"disable": None}  # tqdm's: a bar on a terminal
        self._num_timesteps = 0
        self._current_timestep: Tensor | None = None
        self._attention_kwargs: Mapping[str, Any] | None = None
        self._scheduler: tuple[Schedule, Any] | None = None
        self._text_source: Any = None if whole is text_encoder else weakref.ref(whole)

    @classmethod
    def from_pretrained(cls, *args: Any, **given: Any) -> Any:
        """As `Pipeline.from_pretrained`, which see, with diffusers' names of arguments.

        `device_map` names one device. `torch_dtype` may be a name, "auto" (that of the files), or a dictionary of parts and
        "default" (float32): then parts are loaded as their files are and cast. `low_cpu_mem_usage` and
        `use_safetensors` are always so.
        """
        if "pretrained_model_name_or_path" in given:
            args = (given.pop("pretrained_model_name_or_path"), *args)
        given.pop("low_cpu_mem_usage", None)
        if given.pop("use_safetensors", None) is False:
            raise InvalidRequest("use_safetensors", "False: pickles are never opened; convert the files to safetensors")
        device_map = given.pop("device_map", None)
        if device_map is not None:
            if not isinstance(device_map, (str, torch.device)) or device_map in ("auto", "balanced"):
                raise InvalidRequest(
                    "device_map", f"{device_map!r} divides a model; name one device, or see parallel= and memory_limit="
                )
            given["device"] = device_map
        of_parts: dict[str, torch.dtype] = {}
        for name in ("torch_dtype", "dtype"):
            if isinstance(value := given.get(name), Mapping):
                check_names(value, (*_CASTABLE, "default"), where=name)
                default = value.get("default", torch.float32)
                of_parts = {part: _dtype_of(name, value.get(part, default)) for part in _CASTABLE}
                del given[name]
            elif name in given:
                given[name] = _dtype_of(name, value)
        pipe: Any = super().from_pretrained(*args, **given)
        for part, dtype in of_parts.items():
            getattr(pipe, part).to(dtype)
        if of_parts:
            pipe.text_encoder.rebuild_rotary()
            pipe.networks.adopt()
        return pipe

    @classmethod
    def _of(cls, loaded: Loaded, **given: Any) -> Any:
        pipe: Any = super()._of(loaded, **given)
        sources = (one.source for one in loaded.origins if one.network is loaded.text_encoder)
        pipe._text_source = loaded.whole_text or next(sources, None)
        return pipe

    def to(self, *args: Any, **given: Any) -> Any:
        """Move or cast all parts: `to("cuda")`, `to(torch.bfloat16)`, `to("cuda", torch.bfloat16)`, `to(dtype=...)`."""
        check_names(given, ("device", "dtype", "target", "silence_dtype_warnings", "non_blocking"), where="to")
        for target in (*args, *(given.get(name) for name in ("target", "device", "dtype"))):
            if target is not None:
                super().to(target)
        return self

    # a call

    @property
    def _checker(self) -> ArgumentChecker:
        return dataclasses.replace(super()._checker, allow_empty=True)

    def _draw_as_diffusers(
        self,
        *,
        image: Any,
        prompt: Any,
        generator: Any,
        seed: Any,
        attention_kwargs: Mapping[str, Any] | None,
        joint_attention_kwargs: Mapping[str, Any] | None,
        return_dict: bool,
        progress: Progress | None,
        **given: Any,
    ) -> DropInOutput | tuple[Any]:
        """Call `Pipeline` with checked arguments, show the bar, and return the result as diffusers does."""
        if attention_kwargs is not None and joint_attention_kwargs is not None:
            raise InvalidRequest("joint_attention_kwargs", "is another name of attention_kwargs; give one of them")
        self._attention_kwargs = attention_kwargs if joint_attention_kwargs is None else joint_attention_kwargs
        if seed is not None:
            if generator is not None:
                raise InvalidRequest("seed", "seed and generator are both given; give one of them")
            prompts = given["prompt_embeds"] if prompt is None else prompt
            num_prompts = len(prompts) if isinstance(prompts, (list, tuple, Tensor)) else 1
            per_prompt = whole_number(given["num_images_per_prompt"])
            if not isinstance(per_prompt, int) or not 1 <= per_prompt <= _MOST_IMAGES:
                raise InvalidRequest("num_images_per_prompt", f"{per_prompt!r} is not within 1 to {_MOST_IMAGES}")
            generator = _generators(seed, num_prompts * per_prompt)
        sigmas = given.get("sigmas")
        self._num_timesteps = whole_number(given["num_inference_steps"]) if sigmas is None else len(sigmas)
        self._current_timestep = None
        bar = _Bar(self.progress_bar, progress)
        callback = given.pop("callback_on_step_end")
        with _scaled_loras(self, self._attention_kwargs), bar:
            out = super().__call__(
                prompt,
                image=None if image is None else self._fetched(image),
                generator=generator,
                progress=bar.report,
                callback_on_step_end=None if callback is None else self._noting(callback),
                **given,
            )
        assert isinstance(out, PipelineOutput)
        return DropInOutput.of(out) if return_dict else (out.images,)

    def _noting(self, callback: StepCallback) -> StepCallback:
        """Return the callback, before which the pipeline notes the timestep."""

        def noted(pipe: Pipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> Mapping[str, Any] | None:
            self._current_timestep = timestep
            return callback(pipe, step, timestep, tensors)

        return noted

    def prefill_from(self, image: Picture | Sequence[Picture], *, loras: Loras = None) -> tuple[References, Source]:
        """As `Pipeline.prefill_from`; pictures may be https URLs."""
        return super().prefill_from(self._fetched(image), loras=loras)

    def _fetched(self, image: Any) -> list[Any]:
        """Return the pictures of a call, those that are named by URL fetched."""
        return [
            _fetch(one, max_bytes=MAX_FILE_BYTES, field=f"image {number}", make_client=type(self).make_client)
            if isinstance(one, str) and one.lower().startswith(("https://", "http://"))
            else one
            for number, one in enumerate(as_list(image), start=1)
        ]

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        max_sequence_length: int | None = None,
        text_encoder_out_layers: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the text tokens (B, S_txt, text_width) of prompts, for `prompt_embeds`, and their ids (B, S_txt, 4)."""
        request = dataclasses.replace(self._checker, sizes=()).check(
            prompt="" if prompt is None and prompt_embeds is None else prompt,
            image=None,
            references=None,
            height=64,
            width=64,
            num_inference_steps=1,
            sigmas=None,
            guidance_scale=1.0,
            negative_prompt=None,
            negative_prompt_embeds=None,
            reuse=None,
            num_images_per_prompt=num_images_per_prompt,
            generator=None,
            latents=None,
            prompt_embeds=prompt_embeds,
            output_type="latent",
            callback=None,
            callback_inputs=("latents",),
            max_sequence_length=max_sequence_length,
            text_encoder_out_layers=text_encoder_out_layers,
            progress=None,
        )
        with torch.no_grad():
            tokens, _ = self._prompts.encode(request, self.networks)
        tokens = tokens.to(device or self.device)
        return tokens, text_ids(tokens.shape[1]).to(tokens.device).expand(len(tokens), -1, -1)

    # what a pipeline consists of

    @property
    def vae(self) -> Any:
        """The autoencoder as diffusers' network, which shares the parameters of the pipeline's own."""
        return as_diffusers_autoencoder(self.autoencoder.network)

    @vae.setter
    def vae(self, network: Any) -> None:
        self.autoencoder = network if isinstance(network, Autoencoder) else share_autoencoder(network)

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer, which prompts are read with from then on."""
        if isinstance(self.text_encoder.tokenizer, PlainTokenizer):
            self.text_encoder.tokenizer = transformers_tokenizer(self.text_encoder.tokenizer.folder)
        return self.text_encoder.tokenizer

    @property
    def scheduler(self) -> Any:
        """diffusers' scheduler of the pipeline's noise levels. Set another one to change them."""
        if self._scheduler is None or self._scheduler[0] is not self.schedule:
            from diffusers import FlowMatchEulerDiscreteScheduler

            made = FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=self.schedule.dynamic, shift=self.schedule.static_shift
            )
            self._scheduler = (self.schedule, made)
        return self._scheduler[1]

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self.schedule = _schedule_of(scheduler)
        self._scheduler = (self.schedule, scheduler)

    @property
    def components(self) -> dict[str, Any]:
        """The parts by diffusers' names; another pipeline takes them: `Flux2KleinKVPipeline(**pipe.components)`."""
        return {
            "scheduler": self.scheduler,
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "tokenizer": self.tokenizer,
            "transformer": self.transformer,
        }

    @property
    def is_distilled(self) -> bool:
        return self.kind.distilled

    @property
    def config(self) -> Any:
        """What `model_index.json` says of this pipeline, as a frozen dictionary whose names are attributes too."""
        from diffusers.configuration_utils import FrozenDict

        return FrozenDict(saving.model_index(self))

    @property
    def image_processor(self) -> Any:
        """diffusers' processor of pictures of this family."""
        from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

        return Flux2ImageProcessor(vae_scale_factor=PIXELS)

    @property
    def _execution_device(self) -> torch.device:
        return self.device

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the last call, or of the one that runs."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        return self._current_timestep

    @property
    def attention_kwargs(self) -> Mapping[str, Any] | None:
        return self._attention_kwargs

    @property
    def interrupt(self) -> bool:
        """Whether the call that runs leaves out its remaining steps; set `_interrupt` to make it so."""
        return self._interrupt

    # progress

    def set_progress_bar_config(self, **config: Any) -> None:
        """Set options of the tqdm bar that calls show; `disable=None`, the default, shows it on a terminal alone."""
        self._progress_bar = config if "disable" in config else {"disable": None, **config}

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """Return a tqdm bar with these options."""
        return tqdm(iterable, total=total, **self._progress_bar)

    # memory

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Let networks be in memory by turns, as a memory limit does, where they are drawn with: on the CPU."""
        self._take_turns("enable_model_cpu_offload", by_layer=False)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Let layers be in memory by turns: the least memory, and the weights are read from disk in every step."""
        self._take_turns("enable_sequential_cpu_offload", by_layer=True)

    def _take_turns(self, name: str, *, by_layer: bool) -> None:
        if self.device.type != "cpu":
            _logger.warning(
                "%s has no effect: the pipeline is on %s, all of it; to('cpu') takes less", name, self.device
            )
            return
        if self.residency is not None and not isinstance(self.residency, Turns):
            _logger.info("%s has no effect: memory_limit has networks in memory by turns already", name)
            return
        if not can_release():
            _logger.warning("%s has no effect: it needs Linux with /proc/self/pagemap", name)
            return
        if torch.cuda.is_available():
            _logger.warning("%s: drawn on the CPU, as the pipeline is; to('cuda') has all of it on the GPU", name)
        self.residency = Turns(by_layer=by_layer)
        self._digests.after = self.residency.after_read
        self.transformer.use(staging=self.residency)
        self.networks.adopt()
        parts = (self.transformer, self.autoencoder, self.text_encoder)
        if copied := [type(part).__name__ for part in parts if not self.residency.mapped(part)]:
            _logger.warning("%s: %s stay in memory: their weights were cast or made here", name, ", ".join(copied))
        _logger.info("%s: %s are in memory by turns", name, "layers" if by_layer else "networks")

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, variant: str | None = None, **given: Any
    ) -> None:
        """Write the pipeline as a folder that this class and diffusers load, whole or not at all; `save_directory` is new.

        Weights are written as safetensors, in the pipeline's dtype, with fused LoRAs; `variant` stands in their names.
        Raises `InvalidRequest`, `CheckpointError` and `OutputError`.
        """
        check_names(given, ("safe_serialization", "max_shard_size", "push_to_hub"), where="save_pretrained")
        if given.get("push_to_hub"):
            raise InvalidRequest("push_to_hub", "True: nothing is uploaded; upload the folder yourself")
        if given.get("safe_serialization") is False:
            _logger.warning("safe_serialization=False has no effect: weights are written as safetensors")
        saving.save(self, Path(save_directory), text_source=self._text_source, variant=variant)

    enable_vae_tiling = _without_effect("enable_vae_tiling", _STRIPS)
    disable_vae_tiling = _without_effect("disable_vae_tiling", _STRIPS)
    enable_vae_slicing = _without_effect("enable_vae_slicing", _ONE_BY_ONE)
    disable_vae_slicing = _without_effect("disable_vae_slicing", _ONE_BY_ONE)
    enable_attention_slicing = _without_effect("enable_attention_slicing", _KERNELS)
    disable_attention_slicing = _without_effect("disable_attention_slicing", _KERNELS)
    enable_xformers_memory_efficient_attention = _without_effect("enable_xformers_memory_efficient_attention", _KERNELS)
    disable_xformers_memory_efficient_attention = _without_effect(
        "disable_xformers_memory_efficient_attention", _KERNELS
    )
    fuse_qkv_projections = _without_effect("fuse_qkv_projections", _FUSED)
    unfuse_qkv_projections = _without_effect("unfuse_qkv_projections", _FUSED)
    maybe_free_model_hooks = _without_effect("maybe_free_model_hooks", _HOOKS)
    remove_all_hooks = _without_effect("remove_all_hooks", _HOOKS)


class _Bar:
    """A tqdm bar of a call's steps, beside the caller's own progress."""

    def __init__(self, make: Callable[..., Any], progress: Progress | None) -> None:
        self._make, self._progress = make, progress
        self._bar: Any = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def report(self, part: str, done: int, of: int) -> None:
        if self._progress is not None:
            self._progress(part, done, of)
        if part == "step":
            if self._bar is None:
                self._bar = self._make(total=of)
            self._bar.update(done - self._bar.n)


@contextlib.contextmanager
def _scaled_loras(pipe: Manners, kwargs: Mapping[str, Any] | None) -> Iterator[None]:
    """Multiply the strengths of active LoRAs by `scale` while a call runs, as diffusers does. Raises `InvalidRequest`."""
    given = dict(kwargs or {})
    scale = check_strength(given.pop("scale", None), field="attention_kwargs")
    if given:
        raise InvalidRequest("attention_kwargs", f"{', '.join(map(str, given))} has no meaning here; allowed: scale")
    adapters = pipe.networks.adapters
    strengths = {lora.name: lora.strength for lora in adapters.applied if not lora.fused}
    if scale == 1.0 or not strengths:
        yield
        return
    before = {name: strengths.get(name, 0.0) for name in adapters.active}
    adapters.set(list(before), [strength * scale for strength in before.values()])
    try:
        yield
    finally:
        adapters.set(list(before), list(before.values()))


def _fetch(url: str, **given: Any) -> bytes:
    """Return the file at a URL. Raises `InvalidRequest` and `MissingExtra`."""
    try:
        from limner.outbound.blocking import fetch_now
    except ImportError as error:
        raise MissingExtra("a picture by URL", package=str(error.name), extra="serve") from error
    return fetch_now(url, **given)


def _generators(seed: Any, num_images: int) -> list[torch.Generator]:
    """Return a generator for each image. Raises `InvalidRequest`."""
    first = whole_number(seed)
    seeds = [first + i for i in range(num_images)] if isinstance(first, int) and not isinstance(first, bool) else seed
    seeds = [whole_number(one) for one in seeds] if isinstance(seeds, (list, tuple)) else []
    right = all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one <= _LARGEST_SEED for one in seeds)
    if len(seeds) != num_images or not right:
        raise InvalidRequest(
            "seed", f"{seed!r} is not a whole number from 0 to 2**63 - 1, or a list of {num_images}, one for each image"
        )
    return [torch.Generator().manual_seed(one) for one in seeds]


def _schedule_of(scheduler: Any) -> Schedule:
    if not hasattr(scheduler, "config"):
        raise InvalidRequest("scheduler", f"{type(scheduler).__name__} is none; use FlowMatchEulerDiscreteScheduler")
    return Schedule.from_diffusers(
        {"_class_name": type(scheduler).__name__, **dict(scheduler.config)}, where="scheduler"
    )


def _dtype_of(name: str, value: Any) -> Any:
    """Return one dtype, or None for that of the files."""
    if value == "auto":
        return None
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if found is not None and not isinstance(found, torch.dtype):
        raise InvalidRequest(name, f"{value!r} is not a dtype; use torch.bfloat16")
    return found
