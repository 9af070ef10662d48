"""From options to a pipeline: for the command line, the service and workers.

Owns the order in which parts of the options are resolved, and what is refused before weights are read. Knows nothing of
parsers, queues or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from limner.config import ReferencePolicy
from limner.options import ModelOptions
from limner.pipeline import Pipeline, Progress
from limner.store import ReferenceStore
from limner.weights.folder import PARTS, read_settings, resolve_model
from limner.weights.lora import resolve_lora

__all__ = ["check_model", "load_in_thread", "load_pipeline", "reference_policy"]


def load_pipeline(
    options: ModelOptions,
    *,
    store: ReferenceStore | None = None,
    parallel: str | None = None,
    progress: Progress | None = None,
) -> Pipeline:
    """Return the pipeline that options stand for, with their LoRAs applied.

    `parallel` divides the transformer among the processes that torchrun started ("tensor" or "sequence"). Raises as
    `Pipeline.from_pretrained` and `Pipeline.load_lora_weights` do.
    """
    files = _lora_files(options)
    pipe = Pipeline.from_pretrained(
        options.model,
        transformer=options.transformer,
        vae=options.vae,
        text_encoder=options.text_encoder,
        preview_decoder=options.preview_decoder,
        variant=options.variant,
        revision=options.revision,
        torch_dtype=getattr(torch, options.dtype) if options.dtype else None,
        device=options.device,
        references=options.references_attention,
        store=store,
        reference_policy=options.policy,
        quantize=options.quantize,
        quantize_text=options.quantize_text,
        kv_cache_dtype=options.kv_cache_dtype,
        memory_limit=options.memory_limit,
        parallel=parallel,
        progress=progress,
    )
    if files:
        names = options.lora_names
        for name, file in zip(names, files, strict=True):
            pipe.load_lora_weights(file, name)
        pipe.set_adapters(names, [strength for _, strength in options.loras])
    return pipe


def check_model(options: ModelOptions) -> None:
    """Raise what can be known to be wrong before a model is loaded: `InvalidRequest`, and `CheckpointError` of LoRAs."""
    _ = options.policy
    _lora_files(options)


def _lora_files(options: ModelOptions) -> list[Path]:
    return [resolve_lora(source) for source, _ in options.loras]


def reference_policy(options: ModelOptions) -> ReferencePolicy:
    """Return the policy that the loaded pipeline will have, where the model's folder is at hand.

    So pictures can be refused before weights are read. Of a hub id it is the policy of the options alone: nothing is
    downloaded for it. Raises `CheckpointError` and `InvalidRequest`.
    """
    policy = options.policy
    if options.model is None or Path(options.model).is_dir():
        settings = read_settings(resolve_model(options.model, without=PARTS))
        return policy.for_model(settings.max_reference_pixels, settings.sizes)
    return policy


def load_in_thread(load: Callable[[], Pipeline]) -> Pipeline:
    """Return the pipeline that `load` makes, loaded in a thread that ends with it: for an engine that draws on a CPU.

    OpenMP keeps a team of threads for every thread that has computed. Where all teams together have more threads than the
    machine has cores, libgomp's no longer spin while they wait for work but sleep, and small models take twice as long
    (docs/log.md). So the thread that loads must end: then the engine's team is the only one.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="limner-load") as executor:
        return executor.submit(load).result()
