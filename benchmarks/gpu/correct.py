"""Is it right there: attention against the formula, whole pictures against a CPU and diffusers, tiers, batches, formats."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from gpu.measure import Part, Run, relative_error

__all__ = ["PARTS"]


def machine(run: Run) -> None:
    from limner.bench import machine as describe
    from limner.model.attention import choose_kernel

    found = describe(run.device)
    for package in ("transformers", "triton"):
        try:
            found["versions"][package] = __import__(package).__version__
        except ImportError:
            continue
    if run.cuda:
        properties = torch.cuda.get_device_properties(run.device)
        found["gib"] = round(properties.total_memory / 2**30, 1)
        found["hip"], found["capability"] = torch.version.hip, [properties.major, properties.minor]
    here = torch.empty(0, device=run.device).device
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    run.say("machine", **found, kernels={str(dtype): choose_kernel(here, dtype, 128) for dtype in dtypes})


@torch.no_grad()
def attention(run: Run) -> None:
    """Each kernel against the formula in float64: shared references and one set an image, odd lengths, narrow K/V."""
    from limner.model.attention import KERNELS, attend, choose_kernel
    from limner.model.kv import LayerKV, quantize_layer

    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(run.device)

    here = torch.empty(0, device=run.device).device
    shapes = ((1, 77, 130, 3, 64, 1), (3, 600, 1031, 4, 128, 1), (2, 33, 70, 2, 32, 2), (1, 16, 0, 2, 128, 1))
    for dtype, bar in ((torch.bfloat16, 2e-2), (torch.float16, 4e-3), (torch.float32, 2e-5)):
        for batch, own, num_ref, heads, dim, sets in shapes[:1] if run.tiny else shapes:
            q, k, v = (randn(batch, own, heads, dim).to(dtype) for _ in range(3))
            kv = LayerKV(*(randn(sets, num_ref, heads, dim).to(dtype) for _ in range(2))) if num_ref else None
            wide = LayerKV(*(x.cpu().double() for x in kv)) if kv else None
            own_wide = [x.cpu().double() for x in (q, k, v)]
            exact = attend(*own_wide, references=wide, kernel="dense")
            errors: dict[str, Any] = {}
            chosen = choose_kernel(here, dtype, dim)
            for name in KERNELS:
                try:
                    errors[name] = relative_error(attend(q, k, v, references=kv, kernel=name), exact)
                except Exception as error:
                    errors[name] = str(error).partition("\n")[0][:100]
            for kind in (
                ("int8", "fp8") if kv is not None else ()
            ):  # whatever kernel reads them, against their own values
                narrow = quantize_layer(kv, kind)
                kept = LayerKV(*(x.cpu().double() for x in narrow.dense(torch.float32)))
                of_kept = attend(*own_wide, references=kept, kernel="dense")
                errors[f"{kind} K/V"] = relative_error(attend(q, k, v, references=narrow), of_kept)
            good = all(error <= bar for error in errors.values() if isinstance(error, float))
            shape = [batch, own, num_ref, heads, dim, sets]
            right = good and isinstance(errors[chosen], float)
            run.check("attention", right, dtype=str(dtype), chosen=chosen, shape=shape, errors=errors)


def _inputs(run: Run) -> tuple[list[Image.Image], dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    sizes = ((64, 64), (64, 80)) if run.tiny else ((192, 128), (128, 256))
    pictures = [
        Image.fromarray(torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8).numpy())
        for w, h in sizes
    ]
    side = 64 if run.tiny else 256
    words = {"prompt": "a dog", "height": side, "width": side, "output_type": "pt", "max_sequence_length": 64}
    words["num_inference_steps"] = 2 if run.tiny else 4
    return pictures, words


def pictures(run: Run) -> None:
    """The bundled model: there, on the CPU, and diffusers there; kept and packed references, tiers, batches, formats."""
    from diffusers import Flux2KleinKVPipeline

    import limner
    from limner.weights.folder import bundled_model

    images, words = _inputs(run)
    folder = bundled_model()

    as_they_are = limner.ReferencePolicy(sizes=())  # diffusers does not fit references to the sizes of the model

    def seed(number: int = 5) -> torch.Generator:
        return torch.Generator().manual_seed(number)

    def load(**how: Any) -> limner.Pipeline:
        how = {"device": run.device, **how}
        return limner.Pipeline.from_pretrained(folder, dtype=dtype, reference_policy=as_they_are, **how)

    if run.cuda:  # no tf32: the CPU has none
        torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"
    for dtype, bar in ((torch.float32, 1e-3), (torch.bfloat16, 0.3)):
        if run.tiny and dtype != torch.float32:
            continue
        there = load()
        ours = there(image=images, generator=seed(), **words)
        cpu = load(device="cpu")(image=images, generator=seed(), **words)
        theirs = Flux2KleinKVPipeline.from_pretrained(folder, torch_dtype=dtype).to(run.device)
        theirs.set_progress_bar_config(disable=True)
        layers = there.text_encoder.out_layers
        their = theirs(image=images, generator=seed(), text_encoder_out_layers=layers, **words).images
        errors = {
            "to_cpu": relative_error(ours.images, cpu.images),
            "to_diffusers": relative_error(ours.images, their),
            "diffusers_to_cpu": relative_error(their, cpu.images),
        }
        run.check("pictures", max(errors.values()) < bar, dtype=str(dtype), arithmetic=there.arithmetic, **errors)
        kept = {
            "again": there(image=images, generator=seed(), **words),
            "given": there(references=there.prefill(images), generator=seed(), **words),
        }
        with tempfile.TemporaryDirectory() as disk:
            kept |= _tiers(run, load, images, words, seed, Path(disk))
            pack = Path(disk) / "pack.safetensors"
            there.prefill(images).save(pack)
            kept["pack"] = there(references=limner.References.load(pack), generator=seed(), **words)
        equal = {name: torch.equal(out.images, ours.images) for name, out in kept.items()}
        sources = {name: out.reference_cache for name, out in kept.items()}
        run.check("kept references", all(equal.values()), dtype=str(dtype), equal=equal, sources=sources)
        three = [seed(number) for number in (5, 6, 7)]
        batch = there(image=images, num_images_per_prompt=3, generator=three, **words).images
        apart = relative_error(batch[:1], ours.images)
        run.check("batch", apart < bar, difference=apart)
        narrow = {
            name: relative_error(load(**how)(image=images, generator=seed(), **words).images, ours.images)
            for name, how in {
                "int8 weights": {"quantize": "int8"},
                "int8 K/V": {"kv_cache_dtype": "int8"},
                "fp8 K/V": {"kv_cache_dtype": "fp8"},
            }.items()
        }
        run.say("narrow formats", dtype=str(dtype), errors=narrow)


def _tiers(run: Run, load: Any, images: list[Image.Image], words: dict[str, Any], seed: Any, disk: Path) -> Any:
    import limner

    found = {}
    tiers: dict[str, dict[str, Any]] = {
        "host": {"device_bytes": 0},
        "disk": {"device_bytes": 0, "memory_bytes": 0, "disk_path": disk / "a"},
    }
    for name, budgets in tiers.items():
        store = limner.ReferenceStore(**budgets)
        pipe = load(store=store)
        store.put(pipe.prefill(images))
        store.flush()
        found[name] = pipe(image=images, generator=seed(), **words)
        layer = pipe.prefill(images).layers[0][0]
        pinned = run.cuda and layer.device.type == "cpu" and layer.is_pinned()
        run.check("tier", pinned or not run.cuda, tier=name, device=str(layer.device), page_locked=pinned)
    return found


def limits(run: Run) -> None:
    """A memory limit changes no bit: all, one network at a time, and layers that pass through two buffers."""
    import limner

    images, words = _inputs(run)
    found = {}
    for limit in (None, "16GiB") if not run.cuda else (None, "16GiB", "700MiB", "600MiB", "560MiB"):
        try:
            pipe = limner.Pipeline.from_pretrained(device=run.device, memory_limit=limit)
            found[str(limit)] = pipe(image=images, generator=torch.Generator().manual_seed(5), **words).images
        except limner.CapacityError as error:
            run.say("limit", limit=limit, refused=str(error)[:160])
    equal = {name: torch.equal(image, found["None"]) for name, image in found.items()}
    run.check("limits", all(equal.values()), equal=equal)


def engine(run: Run) -> None:
    """One batch of three requests, through the engine's own thread."""
    import limner
    from limner.engine import EditRequest, Engine, Failed, Finished

    pipe = limner.Pipeline.from_pretrained(device=run.device)
    drawer, ended, done = Engine(pipe, max_batch=4), [], threading.Event()

    def hear(event: Any) -> None:
        if isinstance(event, (Finished, Failed)):
            ended.append(event)
            if len(ended) == 3:
                done.set()

    for number in range(3):
        request = EditRequest(prompt="a red car", seeds=(number,), width=64, height=64, num_inference_steps=2)
        drawer.submit(request, id=str(number), listener=hear)
    done.wait(60)
    drawer.close()
    errors = [str(event.error)[:200] for event in ended if isinstance(event, Failed)]
    run.check("engine", len(ended) == 3 and not errors, ended=len(ended), errors=errors or None)


PARTS = [Part(machine, 5), Part(attention, 10), Part(pictures, 60), Part(limits, 20), Part(engine, 15)]
