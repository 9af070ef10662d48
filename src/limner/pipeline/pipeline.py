"""One call: encode, prefill, denoise, decode; one batch, synchronous.

Owns the order of work, and the names, defaults and meanings of arguments, which are diffusers'. Each step is in a file
of its own. Knows nothing of queues, HTTP or the command line.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Self, Unpack, overload

import torch
from torch import Tensor

from limner.config import ModelGeometry, ReferencePolicy
from limner.errors import InvalidRequest
from limner.images import PreparedReference
from limner.kinds import ISOLATED, ModelKind
from limner.memory import Formats, Workload
from limner.memory.residency import Residency
from limner.memory.staged import Staged
from limner.model.autoencoder import Autoencoder
from limner.model.graphs import StepGraphs
from limner.model.preview import Preview
from limner.model.shards import Ranks
from limner.model.text_encoder import TextEncoder
from limner.model.transformer import Transformer
from limner.pipeline import copies, load
from limner.pipeline.adapters import Adapters
from limner.pipeline.admission import Admission
from limner.pipeline.arguments import DrawRequest
from limner.pipeline.call_types import CallArguments, StepCallback
from limner.pipeline.check import ArgumentChecker
from limner.pipeline.denoise import denoise
from limner.pipeline.interruption import InterruptFlag, Interruption
from limner.pipeline.lora import LoraMethods
from limner.pipeline.memory_errors import typed_memory_errors
from limner.pipeline.networks import Networks
from limner.pipeline.output import PipelineOutput, make_output
from limner.pipeline.prefill import Picture, Prefiller
from limner.pipeline.progress import Progress, Stopwatch
from limner.pipeline.progress_bar import reporting
from limner.pipeline.prompts import PromptEncoder
from limner.pipeline.together import canvases_of, check_shared, opened, per_prompt
from limner.pipeline.unknown import named_arguments
from limner.references import References
from limner.requests import Control, EditRequest, Loras
from limner.schedule import Schedule
from limner.store import ReferenceStore, Source
from limner.weights.digest import WeightDigests

__all__ = ["Pipeline", "StepCallback"]

_logger = logging.getLogger("limner")


class Pipeline(LoraMethods):
    """Text to image and editing with any number of references, whose K/V are computed once and cached in `store`."""

    _interrupt = InterruptFlag()
    _diffusers_class: ClassVar[str | None] = None
    """The class of diffusers that a subclass stands in for, which decides the kind of a model."""
    __deepcopy__, __reduce__ = copies.deep_copy, copies.reduce_pipeline

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
        kind: ModelKind = ISOLATED,
        latent_preview: Preview | None = None,
        residency: Residency | None = None,
    ) -> None:
        """`sizes` are the (width, height) that the model has learned; others are drawn with a warning; none: any.

        `kind` is what the weights were trained for. `residency` is the memory limit of the networks; None: all weights
        stay where they are.
        """
        self.transformer = transformer
        self.autoencoder = autoencoder
        self.text_encoder = text_encoder
        self.schedule = schedule or Schedule()
        self.default_size = default_size
        self.sizes = tuple(sizes)
        share = residency.limit // 4 if isinstance(residency, Staged) else None  # of the limit, not of what is free
        self.store = store if store is not None else ReferenceStore(device_bytes=share)
        self.reference_policy = (reference_policy or ReferencePolicy()).for_model(None, self.sizes)
        self.kv_cache_dtype = load.check_kv_cache_dtype(kv_cache_dtype)
        self.kind = kind
        self.latent_preview = latent_preview
        self.residency = residency
        self._digests = WeightDigests(after=residency.after_read if residency else None)
        self._last_adapters = Adapters.of(transformer, self._digests)
        self._prompts = PromptEncoder()
        self._interruption = Interruption()
        if residency is not None:
            transformer.use(staging=residency)
        self.networks.adopt()

    @classmethod
    @named_arguments
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        transformer: str | os.PathLike[str] | None = None,
        vae: str | os.PathLike[str] | None = None,
        text_encoder: str | os.PathLike[str] | None = None,
        preview_decoder: str | os.PathLike[str] | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        references: str | None = None,
        store: ReferenceStore | None = None,
        reference_policy: ReferencePolicy | None = None,
        quantize: str | None = None,
        quantize_text: bool = False,
        kv_cache_dtype: str | None = None,
        memory_limit: str | int | None = None,
        text_encoder_out_layers: Sequence[int] | None = None,
        parallel: str | None = None,
        progress: Progress | None = None,
        variant: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load a folder in the diffusers layout, a hub id, or (None) the bundled model.

        `transformer`, `vae` and `text_encoder` replace a part of it: a file of any layout (docs/compatibility.md), a
        folder of that part or of a model, or a hub id; the tokenizer is that of `model`. `preview_decoder` is a file of
        a small decoder (TAEF2) for previews. `torch_dtype` (its newer name: `dtype`) None keeps that of the files
        (bundled model: float32; quantized ones: bfloat16). Weights are memory-mapped, not copied, unless dtype or
        device ask for it. `references` says what references attend to, "isolated" or "joint" (docs/models.md); None:
        what the files say. `quantize` "int8" makes weights and activations of the blocks' matrices int8, `quantize_text`
        those of the text encoder's layers (`limner quantize` writes such folders). `kv_cache_dtype` is the format of
        cached K/V: None, that of the arithmetic; "int8" or "fp8", half the bytes of bfloat16. `memory_limit`, "20GiB" or
        bytes, is what may be resident, mapped files included: networks have weights in memory by turns, the results are
        the same bits (a CPU under Linux). On CUDA it is the device's memory, and weights that are not there are in
        page-locked host memory.
        `parallel` divides the transformer among torchrun's processes (`limner.model.divide`): "tensor" by heads and MLP
        columns, "sequence" by tokens; all make the same calls, one at a time, with the same results. `variant` "fp16"
        reads *.fp16.safetensors where a part has them. Of a hub id: `revision` (not of other parts), `token`,
        `cache_dir`, `local_files_only`. Raises `CheckpointError`, `InvalidRequest` and `CapacityError`.
        """
        load.check_kv_cache_dtype(kv_cache_dtype)
        loaded = load.load(
            model,
            replaced={"transformer": transformer, "vae": vae, "text_encoder": text_encoder},
            dtype=load.check_dtype(dtype, torch_dtype),
            device=device,
            references=references,
            called=cls._diffusers_class,
            reference_policy=reference_policy,
            quantize=quantize,
            quantize_text=quantize_text,
            memory_limit=memory_limit,
            text_encoder_out_layers=text_encoder_out_layers,
            parallel=parallel,
            progress=progress,
            variant=variant,
            preview_decoder=preview_decoder,
            hub=load.Hub(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only),
        )
        return cls._of(loaded, store=store, kv_cache_dtype=kv_cache_dtype)

    @classmethod
    def from_diffusers(
        cls,
        pipeline: Any,
        *,
        default_size: tuple[int, int] = (1024, 1024),
        sizes: Sequence[tuple[int, int]] = (),
        references: str | None = None,
        store: ReferenceStore | None = None,
        reference_policy: ReferencePolicy | None = None,
        kv_cache_dtype: str | None = None,
        text_encoder_out_layers: Sequence[int] | None = None,
    ) -> Self:
        """Take over a klein pipeline of diffusers that is in memory: the tensors are shared, none is copied.

        It runs where and in the dtype in which that pipeline is. Text encoder layers that are not read are left out.
        In-place weight changes (training) affect both pipelines, and References made before them are refused.
        `references` is that of `from_pretrained`; None: as that class of diffusers draws. Raises `CheckpointError` for
        parts with LoRA layers or quantized or offloaded weights.
        """
        loaded = load.take_over(
            pipeline,
            default_size=default_size,
            sizes=sizes,
            references=references,
            called=cls._diffusers_class,
            reference_policy=reference_policy,
            text_encoder_out_layers=text_encoder_out_layers,
        )
        return cls._of(loaded, store=store, kv_cache_dtype=kv_cache_dtype)

    @classmethod
    def _of(cls, loaded: load.Loaded, *, store: ReferenceStore | None, kv_cache_dtype: str | None) -> Self:
        pipe = cls(
            transformer=loaded.transformer,
            autoencoder=loaded.autoencoder,
            text_encoder=loaded.text_encoder,
            schedule=loaded.schedule,
            default_size=loaded.default_size,
            sizes=loaded.sizes,
            store=store,
            reference_policy=loaded.reference_policy,
            kv_cache_dtype=kv_cache_dtype,
            kind=loaded.kind,
            latent_preview=loaded.latent_preview,
            residency=loaded.residency,
        )
        pipe._admission.check_limit(Workload(size=(64, 64), num_text=1))
        loaded.register(pipe._digests)
        return pipe

    def to(self, target: torch.device | str | torch.dtype) -> Self:
        """Move all parts to a device, or cast them to a dtype; return itself. Not for a parallel model."""
        if self.parallel is not None:
            raise InvalidRequest(
                "to", "a parallel model stays where it was loaded; give device and dtype to from_pretrained"
            )
        self.networks.to(target if isinstance(target, torch.dtype) else load.check_device(target))
        self._prompts.clear()
        return self

    def use_cuda_graphs(self, enabled: bool = True) -> None:
        """Replay steps of small pictures as CUDA graphs (`limner.model.graphs`): the same bits, one launch a step.

        Raises `InvalidRequest` on other devices.
        """
        if enabled and self.device.type != "cuda":
            raise InvalidRequest("use_cuda_graphs", f"is for CUDA, not for {self.device}; leave it out there")
        self.transformer.use(graphs=StepGraphs() if enabled else None)

    # The objects that do the work, made of the attributes as they are now: these may be replaced between calls.

    @property
    def networks(self) -> Networks:
        """The networks with their LoRAs, digests and memory limit."""
        return Networks(
            transformer=self.transformer,
            autoencoder=self.autoencoder,
            text_encoder=self.text_encoder,
            adapters=self._adapters,
            digests=self._digests,
            residency=self.residency or Residency.unlimited(),
            kv_cache_dtype=self.kv_cache_dtype,
            kind=self.kind,
        )

    @property
    def _adapters(self) -> Adapters:
        found = Adapters.of(self.transformer, self._digests)
        if found is not self._last_adapters and self._last_adapters.names:
            _logger.warning("lora: another transformer is in place; %s were of the last one", self._last_adapters.names)
        self._last_adapters = found
        return found

    @property
    def _admission(self) -> Admission:
        return Admission(networks=self.networks, reference_pixels=self.reference_policy.pixels)

    @property
    def _prefiller(self) -> Prefiller:
        return Prefiller(store=self.store, policy=self.reference_policy, admission=self._admission)

    @property
    def _checker(self) -> ArgumentChecker:
        return ArgumentChecker(
            prefiller=self._prefiller,
            schedule=self.schedule,
            default_size=self.default_size,
            sizes=self.sizes,
            has_previews=self.latent_preview is not None,
        )

    def __repr__(self) -> str:
        config, dtype = self.geometry.transformer, str(self.dtype).removeprefix("torch.")
        blocks = f"{config.num_double_blocks} + {config.num_single_blocks} blocks of {config.width}"
        loras = "".join(f", LoRA {name}" for name in self.get_active_adapters())
        return f"{type(self).__name__}({blocks}, {self.kind}, {dtype} on {self.device}{loras})"

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def parallel(self) -> Ranks | None:
        """This process's place among those that the transformer is divided among; None if it is whole."""
        ranks = self.networks.ranks
        return None if ranks.alone else ranks

    @property
    def geometry(self) -> ModelGeometry:
        """Geometry of the three networks."""
        return self.networks.geometry

    @property
    def formats(self) -> Formats:
        """The formats of weights, K/V and products, for `limner.memory`."""
        return self.networks.formats

    @property
    def arithmetic(self) -> str:
        """What decides the last bits of a result besides weights: device, attention kernel, dtype of matrix products."""
        return self.networks.arithmetic

    kernel = arithmetic  # its older name

    @property
    def reference_weights(self) -> str:
        """Digest of what K/V depend on: weights and geometry of the transformer, with its LoRAs, and the autoencoder."""
        return self.networks.reference_weights()

    @property
    def digest(self) -> str:
        """Digest of all weights."""
        return self.networks.digest()

    # references and memory

    @typed_memory_errors
    def prefill(self, image: Picture | Sequence[Picture], *, loras: Loras = None) -> References:
        """Return the K/V of an ordered list of references, from the store or computed; `loras` are those of a call."""
        return self.prefill_from(image, loras=loras)[0]

    @typed_memory_errors
    def prefill_from(self, image: Picture | Sequence[Picture], *, loras: Loras = None) -> tuple[References, Source]:
        """Return what `prefill` does, and where it came from: "miss", "memory", "disk" or "remote"."""
        with self._adapters.acting(loras):
            prefiller = self._prefiller
            return prefiller.get(prefiller.prepare(image))

    def key_of(self, prepared: Sequence[PreparedReference]) -> str:
        """Return the content key of prepared pictures in this order with the LoRAs that are set, computed yet or not."""
        return self._prefiller.key_of(prepared)

    def canvas_keys(self, request: EditRequest) -> set[str]:
        """Return the keys under which the tokens of an opened request's canvases are kept, if steps use them."""
        return {self._prefiller.token_key(c.prepared) for c in canvases_of(request) if c is not None and not c.is_plain}

    def memory_needed(self, *, num_ref: int, num_own: int, batch: int) -> int:
        """Return the peak bytes of a call on top of the weights: tokens to prefill, text and output tokens of an image."""
        return self._admission.memory_needed(num_ref=num_ref, num_own=num_own, batch=batch)

    def memory_for(self, workload: Workload) -> int:
        """Return the peak bytes of a call on top of the weights, with canvases, guidance and all that it asks for."""
        return self._admission.memory_for(workload)

    def kv_bytes(self, num_ref: int) -> int:
        """Return the bytes of the K/V of reference tokens in this process."""
        return self.networks.kv_bytes(num_ref)

    # the call

    def opened(self, request: EditRequest) -> EditRequest:
        """Return a request whose canvas and masks were read: its references are the pictures that the model gets."""
        return opened(request, policy=self.reference_policy, sizes=self.sizes)

    def draw(
        self,
        requests: Sequence[EditRequest],
        *,
        references: References | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        output_type: str = "pil",
        progress: Progress | None = None,
    ) -> PipelineOutput:
        """Draw requests as one batch, that share what `together.shared_of` names: an image for each seed, in order.

        `references`, for requests without pictures, is what `prefill` returned. Other arguments and errors are those of
        a call.
        """
        requests = [self.opened(request) for request in requests]
        size = references.sizes[0] if references is not None else self.default_size
        first = check_shared(requests, kind=self.kind, default_size=size)
        out: PipelineOutput = self(
            [request.prompt for request in requests for _ in request.seeds],
            image=first.references or None,
            references=references,
            width=first.width,
            height=first.height,
            num_inference_steps=first.num_inference_steps,
            guidance_scale=first.guidance_scale,
            reuse=first.reuse,
            negative_prompt=[request.negative_prompt or "" for request in requests for _ in request.seeds],
            generator=[torch.Generator().manual_seed(seed) for request in requests for seed in request.seeds],
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            output_type=output_type,
            progress=progress or False,
            **per_prompt(requests),
        )
        return out

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        return_dict: Literal[True] = True,
        **arguments: Unpack[CallArguments],
    ) -> PipelineOutput: ...

    @overload
    def __call__(
        self, prompt: str | Sequence[str] | None = None, *, return_dict: bool, **arguments: Unpack[CallArguments]
    ) -> PipelineOutput | tuple[Any]: ...

    @named_arguments
    @typed_memory_errors
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        image: Picture | Sequence[Picture] | None = None,
        references: References | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_embeds: Tensor | None = None,
        reuse: str | None = None,
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
        progress: Progress | bool | None = None,
        size_policy: str = "refuse",
        **control: Unpack[Control],
    ) -> PipelineOutput | tuple[Any]:
        """Draw (no references), edit, or repaint a part of a picture.

        `image` is one picture or an ordered list; `references` is what `prefill` returned instead. Height and width are
        multiples of 16, at least 64; left out, they are those of the first processed reference, else the model's own.
        Steps and guidance left out are those that the model was trained for (`pipe.kind`): 4 steps; for base models 50
        and a `guidance_scale` of 4, away from `negative_prompt` (left out: an empty one). `reuse` "step0" is for joint
        references, and approximate: the K/V that they have in the first step serve the others. `control` are the
        arguments of `limner.pipeline.control`, which docs/control.md explains: weights of references, masks, outpainting,
        strength, and leaving the rest alone; and `loras`, strengths of those that act in this call, by name. `latents` are
        noise (B, 4 C, height/16, width/16).
        `num_images_per_prompt` images of a prompt are adjacent. `max_sequence_length` left out is 512, or what the
        tokenizer declares if that is less. With `latents` given, `generator` has nothing to draw. The callback gets
        (pipeline, step, timestep, tensors), latents as float32 tokens (B, S_img, C), and may return changed latents and
        prompt_embeds, and rows, the list of those images of the batch that go on (the others are dropped, also from the
        output); it may also ask for denoised, the clean tokens that this step predicts, and preview, these as small
        pictures (B, 3, height/8, width/8) in [0, 1]. `Cancelled` raised in it stops the run, `pipe._interrupt = True`
        leaves out the remaining steps of this call. `progress(part, done, of)` is called for every part; left
        out, terminals and notebooks get a bar, with False none. `size_policy` "floor" takes sides of the output down to
        multiples of 16, with a warning. With a parallel model callbacks run in every process and have to do the same.
        Raises `InvalidRequest`, `CapacityError` and `NumericalError`.
        """
        acting = self._adapters.acting(control.get("loras"))
        with self._interruption.call() as call, reporting(progress) as report, acting:
            # 1. Check the arguments: what can be refused is refused before any work is done
            request = self._checker.check(
                prompt=prompt,
                image=image,
                references=references,
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                sigmas=sigmas,
                guidance_scale=guidance_scale,
                negative_prompt=negative_prompt,
                negative_prompt_embeds=negative_prompt_embeds,
                reuse=reuse,
                num_images_per_prompt=num_images_per_prompt,
                generator=generator,
                latents=latents,
                prompt_embeds=prompt_embeds,
                output_type=output_type,
                callback=functools.partial(callback_on_step_end, self) if callback_on_step_end else None,
                callback_inputs=callback_on_step_end_tensor_inputs,
                max_sequence_length=max_sequence_length,
                text_encoder_out_layers=text_encoder_out_layers,
                progress=report,
                size_policy=size_policy,
                control=control,
            )
            output = self._draw(request, interrupted=lambda: call.interrupted)
        return output if return_dict else (output.images,)

    def _draw(self, request: DrawRequest, *, interrupted: Callable[[], bool]) -> PipelineOutput:
        """Draw a checked call; after a step for which `interrupted()` is true the others are left out."""
        networks, clock = self.networks, Stopwatch(self.device)
        # 2. Encode the prompts to text tokens (B, S_txt, text_width)
        txt, prompts = self._prompts.encode(request, networks)
        negative = self._prompts.encode_negative(request, networks)
        # 3. Draw the noise (B, 4 C, h, w); the processes of one model use the tokens and the noise of process 0
        noise = request.noise.draw(networks.latents_shape(request.workload), device=self.device, dtype=txt.dtype)
        txt, noise = request.shared(networks.ranks, prompt_embeds=txt, noise=noise)
        negative = None if negative is None else networks.ranks.broadcast_tensor(negative)
        request.progress("text", 1, 1)
        text_lap = clock.lap()
        # 4. Get the References: those given, or from the store, or computed
        refs, source = self._prefiller.get_for(request)
        canvas = self._prefiller.canvas_tokens(request.canvases)
        reference_lap = clock.lap()
        # 5. Denoise
        batch = denoise(
            networks,
            request,
            noise=noise,
            prompt_embeds=txt,
            negative_embeds=negative,
            references=refs,
            canvas=canvas,
            preview=self.latent_preview,
            interrupted=interrupted,
        )
        # 6. Decode, and put back into canvases
        return make_output(
            networks,
            request,
            batch.latents,
            rows=batch.rows,
            dtype=txt.dtype,
            prompts=prompts,
            references=refs,
            source=source,
            laps=(text_lap, reference_lap, batch.laps),
        )
