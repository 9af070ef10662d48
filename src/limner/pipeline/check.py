"""The check of a call's arguments, before any work is done. Checks of single values are in `limner.requests` and
`limner.grid`. Does not know how a picture is drawn."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limner.errors import InvalidRequest
from limner.grid import PIXELS, SIZE_POLICIES, check_size, floor_size, num_tokens, size_warning, unlearned, whole_number
from limner.kinds import guides
from limner.memory import Workload
from limner.mentions import prompt_warnings
from limner.pipeline.arguments import DrawRequest, Guidance, StepHook
from limner.pipeline.canvas import open_canvases
from limner.pipeline.control import PerPrompt, Weights, check_reference_guidance, check_reuse, check_weights
from limner.pipeline.noise import NoiseSource
from limner.pipeline.prefill import Picture, Prefiller, with_reports
from limner.pipeline.progress import Progress, silent
from limner.pipeline.repaint import (
    call_workload,
    canvas_sizes,
    canvas_warnings,
    check_canvas_size,
    check_result_sizes,
    drawn_levels,
    of_images,
)
from limner.references import References
from limner.requests import Control, check_guidance, check_length, check_prompt
from limner.schedule import Schedule

__all__ = ["ArgumentChecker", "check_given", "check_latents", "check_layers"]

_logger = logging.getLogger("limner")
_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_CALLBACK_TENSORS = ("latents", "prompt_embeds", "denoised", "preview")
_MAX_SEQUENCE_LENGTH = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class ArgumentChecker:
    """Turns the arguments of a call into a `DrawRequest`, for one pipeline as it is now.

    `allow_empty`: a prompt may have no text.
    """

    prefiller: Prefiller
    schedule: Schedule
    default_size: tuple[int, int]
    sizes: tuple[tuple[int, int], ...]
    has_previews: bool
    allow_empty: bool = False

    def check(
        self,
        *,
        prompt: str | Sequence[str] | None,
        image: Picture | Sequence[Picture] | None,
        references: References | None,
        height: int | None,
        width: int | None,
        num_inference_steps: int | None,
        sigmas: Sequence[float] | None,
        guidance_scale: float | None,
        negative_prompt: str | Sequence[str] | None,
        negative_prompt_embeds: Tensor | None,
        reuse: str | None,
        num_images_per_prompt: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: Tensor | None,
        prompt_embeds: Tensor | None,
        output_type: str,
        callback: StepHook | None,
        callback_inputs: Sequence[str],
        max_sequence_length: int | None,
        text_encoder_out_layers: Sequence[int] | None,
        progress: Progress | None,
        size_policy: str = "refuse",
        control: Control | None = None,
    ) -> DrawRequest:
        """Check everything that can be refused; arguments as of `Pipeline.__call__`. Raises as it does."""
        networks, control = self.prefiller.networks, control or {}
        height, width, max_sequence_length = map(whole_number, (height, width, max_sequence_length))
        num_images_per_prompt, num_inference_steps = map(whole_number, (num_images_per_prompt, num_inference_steps))
        prompts = _check_prompts(prompt, prompt_embeds, allow_empty=self.allow_empty)
        _check_output_type(output_type)
        _check_count("num_images_per_prompt", num_images_per_prompt)
        kind, config = networks.kind, networks.transformer.config
        num_inference_steps = _count("num_inference_steps", num_inference_steps, default=kind.num_inference_steps)
        most_text = min(_MAX_SEQUENCE_LENGTH, networks.text_encoder.max_length)
        max_sequence_length = _count("max_sequence_length", max_sequence_length, default=most_text)
        self._check_callback_inputs(callback_inputs)
        if image is not None and references is not None:
            raise InvalidRequest("image", "image and references are both given; give one of them")
        num_prompts, num_txt = len(prompts or ()), max_sequence_length
        if prompts is None:
            num_prompts, num_txt = _check_embeds(prompt_embeds, text_width=config.text_width)
        canvases, image = open_canvases(
            control, image, policy=self.prefiller.policy, sizes=self.sizes, num_prompts=num_prompts
        )
        pictures = self.prefiller.prepare(image) if image is not None else ()
        references = check_given(references, self.prefiller) if references is not None else None
        batch = num_prompts * num_images_per_prompt
        if latents is not None:
            height, width = check_latents(latents, channels=config.in_channels, batch=batch, height=height, width=width)
        sizes = tuple(p.report.processed_size for p in pictures) or (references.sizes if references else ())
        width, height, warnings = _fit_sizes(width, height, policy=size_policy)
        own = (*canvas_sizes(canvases), *sizes, self.default_size)[0]
        size = _check_sizes(width, height, default=own)
        check_canvas_size(canvases, width=width, height=height)
        canvases = of_images(canvases, num_prompts=num_prompts, per_prompt=num_images_per_prompt)
        check_result_sizes(canvases, size=size, output_type=output_type)
        warnings += canvas_warnings(canvases) + self._prompt_warnings(prompts or (), num_references=len(sizes))
        self._check_reuse(reuse)
        reference_guidance = check_reference_guidance(control.get("reference_guidance", 1.0), len(sizes))
        workload = call_workload(
            Workload(size=size, references=sizes, batch=batch, num_text=num_txt, joint=kind.joint),
            canvases=canvases,
            guides=guides(kind, guidance_scale),
            reference_guidance=reference_guidance,
            reuse=reuse,
        )
        self.prefiller.admission.check_call(workload)
        levels = self.schedule.sigmas(num_tokens(size), num_inference_steps=num_inference_steps, custom=sigmas)
        levels = drawn_levels(canvases, levels)
        weights = self._check_weights(control, num_references=len(sizes), num_steps=len(levels) - 1)
        noise = NoiseSource.check(generator, latents=latents, batch=batch, ranks=networks.ranks)
        guidance = self._check_guidance(
            guidance_scale, negative_prompt, negative_prompt_embeds, num_prompts=num_prompts, workload=workload
        )
        return DrawRequest(
            prompts=prompts,
            prompt_embeds=prompt_embeds,
            num_images_per_prompt=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
            text_encoder_out_layers=check_layers(text_encoder_out_layers),
            pictures=pictures,
            references=references,
            workload=workload,
            sigmas=levels,
            noise=noise,
            guidance=guidance,
            reuse=reuse if workload.reuses else None,
            reference_weights=of_images(weights, num_prompts=num_prompts, per_prompt=num_images_per_prompt),
            reference_guidance=reference_guidance,
            canvases=canvases,
            loras=networks.adapters.applied,
            output_type=output_type,
            callback=callback,
            callback_inputs=tuple(callback_inputs),
            progress=progress or silent,
            warnings=warnings + self._warn_of_size(size, default=own),
        )

    def _check_guidance(
        self,
        scale: float | None,
        negative: str | Sequence[str] | None,
        embeds: Tensor | None,
        *,
        num_prompts: int,
        workload: Workload,
    ) -> Guidance | None:
        """Return the guidance of a call: none for distilled models, and for scales of at most 1, as in diffusers."""
        kind, config = self.prefiller.networks.kind, self.prefiller.networks.transformer.config
        if scale is None:
            scale = kind.guidance_scale
        check_guidance(scale)
        if negative is not None and embeds is not None:
            raise InvalidRequest("negative_prompt", "give negative_prompt or negative_prompt_embeds, not both")
        prompts = None if embeds is not None else _check_negative(negative, num_prompts=num_prompts)
        if embeds is not None:
            found, _ = _check_embeds(embeds, text_width=config.text_width, field="negative_prompt_embeds")
            if found not in (1, num_prompts):
                raise InvalidRequest("negative_prompt_embeds", f"are of {found} prompts, prompt has {num_prompts}")
            embeds = embeds.expand(num_prompts, -1, -1)
        if kind.distilled:
            if scale > 1 or any(prompts or ()) or embeds is not None:
                _logger.warning(
                    "guidance_scale and negative prompts have no effect: this model is distilled to draw without them"
                )
            return None
        if scale <= 1:
            return None
        both = self.prefiller.admission.is_free(workload)
        both = all(self.prefiller.networks.ranks.all_gather(both))  # the same in all processes
        return Guidance(scale=float(scale), prompts=prompts, prompt_embeds=embeds, together=both)

    def _check_reuse(self, reuse: str | None) -> None:
        networks = self.prefiller.networks
        check_reuse(reuse, kind=networks.kind)
        if reuse is not None and networks.ranks.mode == "sequence":
            raise InvalidRequest("reuse", "is not offered for a model divided by sequence; use parallel='tensor'")

    def _prompt_warnings(self, prompts: Sequence[str], *, num_references: int) -> tuple[str, ...]:
        known = self.prefiller.networks.text_encoder.known
        return prompt_warnings(prompts, num_references=num_references, known=known)

    def _warn_of_size(self, size: tuple[int, int], *, default: tuple[int, int]) -> tuple[str, ...]:
        if problem := unlearned(size, self.sizes):
            _logger.warning("%s", problem)
        return size_warning(size, self.sizes, default=default, over_cap=self.prefiller.policy.over_cap)

    def _check_weights(self, control: Control, *, num_references: int, num_steps: int) -> tuple[Weights | None, ...]:
        """Return the weights for all prompts, or for each; () if there are none."""
        networks, given = self.prefiller.networks, control.get("reference_weights")
        found = tuple(
            check_weights(one, num_references=num_references, num_steps=num_steps)
            for one in (given if isinstance(given, PerPrompt) else (given,))
        )
        if all(one is None for one in found):
            return ()
        if networks.kind.joint and networks.ranks.mode == "sequence":
            raise InvalidRequest(
                "reference_weights", "of joint references are not offered for a model divided by sequence; use tensor"
            )
        return found

    def _check_callback_inputs(self, names: Sequence[str]) -> None:
        unknown = set(names) - set(_CALLBACK_TENSORS)
        if unknown:
            raise InvalidRequest(
                "callback_on_step_end_tensor_inputs",
                f"{sorted(unknown)} are not offered; allowed: {', '.join(_CALLBACK_TENSORS)}",
            )
        if "preview" in names and not self.has_previews:
            raise InvalidRequest(
                "callback_on_step_end_tensor_inputs",
                "preview needs a map of latents to pixels, and this model has none (latent_preview in limner.json); fit "
                "one with limner.model.preview.LatentPreview.fit, give preview_decoder, or ask for denoised and decode it",
            )


def check_given(references: References, prefiller: Prefiller) -> References:
    """Return References as this pipeline uses them: its part of the heads, on its device.

    Raises `InvalidRequest` if they were made with other weights, in another dtype, or for other processes.
    """
    if not isinstance(references, References):
        raise InvalidRequest("references", f"{type(references).__name__} is not limner.References; use pipe.prefill")
    networks = prefiller.networks
    config, shard, weights = networks.transformer.config, networks.reference_shard, networks.reference_weights()
    if (references.tokens is not None) != networks.kind.joint:
        held = "tokens" if references.tokens is not None else "K/V"
        raise InvalidRequest(
            "references",
            f"they hold {held}, and this model has {networks.kind.references} references; prefill the pictures with this "
            "pipeline",
        )
    if references.weights != weights:
        raise InvalidRequest(
            "references",
            f"they were made with weights {references.weights}, this pipeline has {weights}; prefill the pictures with "
            "this pipeline",
        )
    if references.dtype != networks.dtype:
        raise InvalidRequest(
            "references",
            f"their dtype is {references.dtype}, the pipeline's {networks.dtype}; prefill the pictures again",
        )
    if references.shard is None and shard is not None:
        references = references.part(*shard)
    if references.shard != shard:
        raise InvalidRequest(
            "references",
            f"they are of part {references.shard} (rank, processes) of the heads, this pipeline has "
            f"{shard or 'all of them'}; prefill the pictures with this pipeline",
        )
    num_heads = config.num_heads // (shard[1] if shard else 1)
    num_layers, expected = (
        (1, (config.in_channels,)) if networks.kind.joint else (config.num_layers, (num_heads, config.head_dim))
    )
    shape = tuple(references.layers[0][0].shape[2:])
    if len(references.layers) != num_layers or shape != expected:
        raise InvalidRequest(
            "references",
            f"they have {len(references.layers)} layers of {shape}, the model {num_layers} of {expected}; "
            "prefill the pictures again",
        )
    return with_reports(prefiller.store.place(references, device=networks.device), references.reports)


def check_latents(
    latents: Tensor, *, channels: int, batch: int, height: int | None, width: int | None
) -> tuple[int, int]:
    """Return the (height, width) in pixels of given noise (B, channels, h, w). Raises `InvalidRequest`."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point() or not torch.isfinite(latents).all():
        raise InvalidRequest("latents", "have to be a tensor of finite floating point numbers")
    if latents.dim() != 4 or latents.shape[1] != channels:
        raise InvalidRequest(
            "latents", f"have shape {list(latents.shape)}; allowed: (B, {channels}, height/16, width/16)"
        )
    if latents.shape[0] != batch:
        raise InvalidRequest("latents", f"have batch {latents.shape[0]}, the prompts ask for {batch} images")
    found = (latents.shape[2] * PIXELS, latents.shape[3] * PIXELS)
    for name, given, actual in (("height", height, found[0]), ("width", width, found[1])):
        if given is not None and given != actual:
            raise InvalidRequest("latents", f"are for {name} {actual}, {name}={given} was asked; leave {name} out")
    return found


def check_layers(layers: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return layer numbers of the text encoder as a tuple. Raises `InvalidRequest`."""
    if layers is None:
        return None
    found = tuple(map(whole_number, layers)) if isinstance(layers, (list, tuple)) else ()
    if not found or not all(isinstance(i, int) for i in found):
        raise InvalidRequest("text_encoder_out_layers", f"{layers!r} is not a list of layer numbers; leave it out")
    return found


def _check_output_type(output_type: str) -> None:
    if output_type not in _OUTPUT_TYPES:
        raise InvalidRequest("output_type", f"{output_type!r} is not one of {', '.join(_OUTPUT_TYPES)}")


def _check_prompts(
    prompt: str | Sequence[str] | None, prompt_embeds: Tensor | None, *, allow_empty: bool
) -> tuple[str, ...] | None:
    if (prompt is None) == (prompt_embeds is None):
        raise InvalidRequest("prompt", "give either prompt or prompt_embeds" + ("" if prompt is None else ", not both"))
    if prompt is None:
        return None
    if not isinstance(prompt, (str, list, tuple)):
        raise InvalidRequest("prompt", f"{type(prompt).__name__} is not a text; give a string or a list of strings")
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    if not prompts:
        raise InvalidRequest("prompt", "an empty list has no prompt; give at least one")
    for text in prompts:
        check_prompt(text, allow_empty=allow_empty)
    return prompts


def _check_negative(negative: str | Sequence[str] | None, *, num_prompts: int) -> tuple[str, ...]:
    """Return a negative prompt for each prompt; None is an empty one, as in diffusers."""
    texts = [negative or ""] if negative is None or isinstance(negative, str) else negative
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise InvalidRequest(
            "negative_prompt", f"{type(negative).__name__} is not a text; give a string or a list of them"
        )
    if len(texts) not in (1, num_prompts):
        raise InvalidRequest(
            "negative_prompt", f"there are {len(texts)} for {num_prompts} prompts; give one, or as many"
        )
    for text in texts:
        check_length("negative_prompt", text)
    return tuple(texts) * (num_prompts if len(texts) == 1 else 1)


def _check_embeds(embeds: Tensor | None, *, text_width: int, field: str = "prompt_embeds") -> tuple[int, int]:
    """Return (B, S_txt) of given text tokens."""
    if not isinstance(embeds, Tensor) or not embeds.is_floating_point():
        raise InvalidRequest(field, "have to be a tensor of floating point numbers")
    if embeds.dim() != 3 or embeds.shape[-1] != text_width or 0 in embeds.shape:
        raise InvalidRequest(field, f"have shape {list(embeds.shape)}; allowed: (B, S_txt, {text_width})")
    if not torch.isfinite(embeds).all():
        raise InvalidRequest(field, "hold values that are not finite; encode the prompt again")
    return embeds.shape[0], embeds.shape[1]


def _fit_sizes(width: int | None, height: int | None, *, policy: str) -> tuple[int | None, int | None, tuple[str, ...]]:
    """Return the sizes as `policy` says, and a warning for each that it changed."""
    if policy not in SIZE_POLICIES:
        allowed = ", ".join(SIZE_POLICIES)
        raise InvalidRequest("size_policy", f"{policy!r} is not one of {allowed}")
    if policy == "refuse":
        return width, height, ()
    found, warnings = [], []
    for name, value in (("width", width), ("height", height)):
        fitted = floor_size(value)
        if fitted != value:
            warnings.append(f"{name}: {value} is not a multiple of {PIXELS}; drawn with {fitted}")
            _logger.warning("%s", warnings[-1])
        found.append(fitted)
    return found[0], found[1], tuple(warnings)


def _check_sizes(width: int | None, height: int | None, *, default: tuple[int, int]) -> tuple[int, int]:
    width = check_size("width", default[0] if width is None else width)
    return width, check_size("height", default[1] if height is None else height)


def _count(name: str, value: int | None, *, default: int) -> int:
    """Return a count, or the default for None. Raises `InvalidRequest`."""
    value = default if value is None else value
    _check_count(name, value)
    return value


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidRequest(name, f"{value!r} is not a whole number of at least 1")
