"""Measures whole calls, from a prompt to the bytes of a PNG, beside diffusers' pipelines over the same tensors.

One process, random weights, all engines in turn, medians. "cold" has references that were never seen, "warm" has their K/V
in memory; the prompt is new to every call, and so is encoded. A stopwatch around the networks' methods divides each call
into phases, for all engines alike; "other" is what is left: reading pictures, tokenizing, Euler steps.
"""

from __future__ import annotations

import functools
import io
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from limner.bench.edit import BenchCase
from limner.bench.measure import Peak, now
from limner.bench.models import SIZES, map_int8, random_pipeline, weight_bytes
from limner.errors import InvalidRequest
from limner.images import encode
from limner.memory.amounts import show_bytes
from limner.memory.free import free_bytes
from limner.model.int8 import packs_weights, quantize_blocks, quantize_layers
from limner.model.text_encoder import default_out_layers
from limner.pipeline import Pipeline
from limner.store import ReferenceStore

__all__ = ["PHASES", "WHOLE_ENGINES", "WholeBench", "whole_markdown", "whole_names"]

PHASES = ("text", "encode", "prefill", "steps", "decode", "png", "other")
"""Prompt to text tokens; references to latents; latents to K/V, which diffusers does in its first step; the transformer's
steps; latents to pixels; pixels to bytes; all else."""
WHOLE_ENGINES = ("standard", "diffusers_kv", "cold", "warm", "int8_cold", "int8_warm")
_DIFFUSERS = ("standard", "diffusers_kv")


@dataclass(slots=True)
class _Phases:
    """A stopwatch around methods. Between calls `seconds` is what the last one took by phase, `steps` each step."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)

    def watch(self, owner: Any, method: str, phase: str) -> None:
        """Add what calls of `owner.method` take from now on to a phase."""
        inner = getattr(owner, method)

        @functools.wraps(inner)
        def timed(*arguments: Any, **named: Any) -> Any:
            with self.running(phase):
                return inner(*arguments, **named)

        setattr(owner, method, timed)

    @contextmanager
    def running(self, phase: str) -> Iterator[None]:
        start = now(self.device)
        yield
        seconds = now(self.device) - start
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        if phase == "steps":
            self.steps.append(seconds)

    @contextmanager
    def call(self) -> Iterator[None]:
        """A whole call: what no phase has is "other"."""
        self.seconds, self.steps = {}, []
        start = now(self.device)
        yield
        total = now(self.device) - start
        self.seconds |= {"total": total, "other": total - sum(self.seconds.values())}


class WholeBench:
    """Engines over one set of random weights: a size of `SIZES` in `dtype` on `device`."""

    def __init__(
        self, size: str, *, dtype: torch.dtype, engines: Sequence[str], device: torch.device | str = "cpu"
    ) -> None:
        """Make the weights. Raises `InvalidRequest` for weights that do not fit into the free memory."""
        self.engines, self.dtype, self.device = tuple(engines), dtype, torch.device(device)
        self.size, tied = SIZES[size], size != "klein-9b"
        self._check_memory(size, weight_bytes(self.size, dtype=dtype, tied=tied))
        self._phases = _Phases(self.device)
        theirs = random_pipeline(self.size, dtype=dtype, tied=tied, device=self.device)
        self._diffusers = {"diffusers_kv": theirs, "standard": _standard(theirs)}
        self._limner: dict[bool, Pipeline] = {}
        for is_int8 in (False, True):
            if any(name not in _DIFFUSERS and name.startswith("int8") == is_int8 for name in engines):
                self._limner[is_int8] = self._pipeline(theirs, is_int8=is_int8)
        self._watch(theirs)

    @property
    def arithmetic(self) -> dict[str, str]:
        """What decides the last bits of Limner's pictures, with plain weights and with int8 ones."""
        return {"int8" if is_int8 else "plain": pipe.arithmetic for is_int8, pipe in self._limner.items()}

    def use_kernel(self, kernel: str | None) -> None:
        """Have Limner use an attention kernel; None: the device's."""
        for pipe in self._limner.values():
            pipe.transformer.kernel = kernel

    def run(
        self,
        case: BenchCase,
        *,
        rounds: int,
        progress: Callable[[str], None] = print,
        save: Callable[[dict[str, Any]], None] = lambda found: None,
    ) -> dict[str, Any]:
        """Return medians, phases and peaks of memory of all engines in turn, and by what their pictures differ.

        Before the rounds every engine draws 64 x 64 pixels in one step, and "warm" ones compute their references. `save`
        gets the result so far after every round. Without references "warm" ones are left out.
        """
        engines = [name for name in self.engines if case.num_references or not name.endswith("warm")]
        pictures = _noise_pictures(case)
        stores = self._prepare(case, engines, pictures, progress)
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
        steps: dict[str, list[list[float]]] = {name: [] for name in engines}
        peaks: dict[str, int] = dict.fromkeys(engines, 0)
        first: dict[str, list[bytes]] = {}
        found: dict[str, Any] = {}
        for number in range(rounds):
            for name in engines:
                with Peak(self.device) as peak:
                    png = self._call(name, case, pictures, prompt=f"picture {number}", store=stores.get(name))
                measured[name].append(dict(self._phases.seconds))
                steps[name].append(self._phases.steps)
                peaks[name] = max(peaks[name], peak.nbytes)
                first.setdefault(name, png)
                parts = ", ".join(f"{phase} {self._phases.seconds.get(phase, 0):.2f}" for phase in PHASES)
                total = self._phases.seconds["total"]
                progress(f"{case.num_references} references, round {number + 1}: {name} {total:.2f} s ({parts})")
            found = {
                "case": asdict(case),
                "rounds": number + 1,
                **_summary(measured, steps),
                "peak_bytes": peaks,
                "pictures": _comparison(first),
            }
            save(found)
        return found

    def _check_memory(self, size: str, nbytes: int) -> None:
        if any(name.startswith("int8") for name in self.engines):
            nbytes += weight_bytes(self.size, dtype=torch.int8)  # a bound: tables and unread layers stay as they are
        free = free_bytes(self.device)
        if nbytes > free:
            raise InvalidRequest(
                "--whole",
                f"{size} has weights of {show_bytes(nbytes)} with these engines, {show_bytes(free)} are free; allowed: "
                f"{', '.join(SIZES)}. Use a smaller one, or leave out int8 engines",
            )

    def _pipeline(self, theirs: Any, *, is_int8: bool) -> Pipeline:
        """Return Limner's pipeline over the tensors of diffusers'.

        With `is_int8` the matrices of transformer and text encoder are made int8, as `quantize` and `quantize_text` do.
        """
        pipe = Pipeline.from_diffusers(theirs)
        if is_int8:
            quantize_blocks(pipe.transformer)
            quantize_layers(pipe.text_encoder.network)
            pipe.transformer.settle()
            pipe.text_encoder.settle()
            networks = (pipe.transformer, pipe.text_encoder)
            if self.device.type == "cpu" and packs_weights(*networks):  # which have a copy in oneDNN's layout
                for network in networks:
                    map_int8(network)
        return pipe

    def _watch(self, theirs: Any) -> None:
        watch = self._phases.watch
        for phase, owner, method in (
            ("text", theirs.text_encoder, "forward"),
            ("encode", theirs.vae, "encode"),
            ("steps", theirs.transformer, "forward"),
            ("decode", theirs.vae, "decode"),
        ):
            watch(owner, method, phase)
        for pipe in self._limner.values():
            watch(pipe.text_encoder, "forward", "text")
            watch(pipe.autoencoder, "encode", "encode")
            watch(pipe.transformer, "prefill", "prefill")
            watch(pipe.transformer, "forward", "steps")
            watch(pipe.autoencoder, "decode", "decode")

    def _prepare(
        self, case: BenchCase, engines: Sequence[str], pictures: list[Image.Image], progress: Callable[[str], None]
    ) -> dict[str, ReferenceStore]:
        """Have every engine draw something small, and return the stores of the warm ones with the references in them.

        Limner's digest of the weights, which it makes once a process or reads from the cache of files, is made here.
        """
        small = BenchCase(num_references=0, side=64, num_text=32, num_inference_steps=1)
        stores = {}
        for name in engines:
            self._call(name, small, [], prompt="a", store=None)
            if name not in _DIFFUSERS and pictures:
                pipe = self._limner[name.startswith("int8")]
                _ = pipe.reference_weights
                if name.endswith("warm"):
                    stores[name] = pipe.store = ReferenceStore()
                    pipe.prefill(pictures)
            progress(f"{case.num_references} references: {name} is ready")
        return stores

    def _call(
        self, name: str, case: BenchCase, pictures: list[Image.Image], *, prompt: str, store: ReferenceStore | None
    ) -> list[bytes]:
        """Draw and encode, within the stopwatch; return the bytes of the PNGs. Without a store nothing is known before."""
        arguments: dict[str, Any] = {
            "prompt": prompt,
            "image": pictures or None,
            "height": case.side,
            "width": case.side,
            "num_inference_steps": case.num_inference_steps,
            "num_images_per_prompt": case.batch,
            "generator": [torch.Generator().manual_seed(seed) for seed in range(case.batch)],
            "max_sequence_length": case.num_text,
        }
        if name in _DIFFUSERS:
            layers = default_out_layers(self.size.text_encoder.num_layers)
            if name == "standard":
                arguments["guidance_scale"] = 1.0  # what distilled models do anyway; others log a warning
            with self._phases.call():
                images = self._diffusers[name](**arguments, text_encoder_out_layers=layers).images
                with self._phases.running("png"):
                    return [_plain_png(image) for image in images]
        pipe = self._limner[name.startswith("int8")]
        pipe.store = ReferenceStore() if store is None else store
        pipe._prompts.clear()
        with self._phases.call():
            out = pipe(**arguments, progress=False)
            with self._phases.running("png"):
                return [encode(image, "PNG", metadata=out.metadata) for image in out.images]


def _standard(theirs: Any) -> Any:
    """diffusers' pipeline whose references are tokens of every step, over the same networks."""
    from diffusers import Flux2KleinPipeline

    pipe = Flux2KleinPipeline(**theirs.components, is_distilled=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _plain_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _noise_pictures(case: BenchCase) -> list[Image.Image]:
    """Return smooth pictures, one a reference."""
    rng, side = np.random.default_rng(0), case.reference_side
    coarse = rng.integers(0, 256, (case.num_references, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC) for one in coarse]


def _summary(measured: dict[str, list[dict[str, float]]], steps: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Return medians over rounds, and how many times as fast as diffusers with its K/V cache each engine is."""
    seconds = {name: statistics.median(one["total"] for one in rounds) for name, rounds in measured.items()}
    found: dict[str, Any] = {
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "all_seconds": {name: [round(one["total"], 3) for one in rounds] for name, rounds in measured.items()},
        "phases": {
            name: {phase: round(statistics.median(one.get(phase, 0.0) for one in rounds), 4) for phase in PHASES}
            for name, rounds in measured.items()
        },
        "steps": {
            name: [round(statistics.median(values), 3) for values in zip(*rounds, strict=True)]
            for name, rounds in steps.items()
        },
    }
    for base in _DIFFUSERS:
        if base in seconds:
            found[f"times_{base}"] = {name: round(seconds[base] / value, 3) for name, value in seconds.items()}
    return found


def _comparison(files: dict[str, list[bytes]]) -> dict[str, Any]:
    """Return the spread of values in [0, 1] of the first picture, and by how much each engine's differ on average.

    They are compared with those of diffusers' K/V pipeline, whose references are isolated too.
    """
    pixels = {
        name: np.stack([np.asarray(Image.open(io.BytesIO(file)), dtype=np.float64) / 255 for file in pngs])
        for name, pngs in files.items()
    }
    found: dict[str, Any] = {"spread": round(float(next(iter(pixels.values())).std()), 4)}
    expected = pixels.get("diffusers_kv")
    if expected is not None:
        found["mean_difference"] = {
            name: round(float(np.abs(value - expected).mean()), 6)
            for name, value in pixels.items()
            if name not in _DIFFUSERS
        }
    return found


def whole_names() -> dict[str, str]:
    """Return what tables and plots call the engines."""
    return {
        "standard": "diffusers, references in every step",
        "diffusers_kv": "diffusers with its K/V cache",
        "cold": "Limner, references new",
        "warm": "Limner, references kept",
        "int8_cold": "Limner int8, references new",
        "int8_warm": "Limner int8, references kept",
    }


def whole_markdown(report: dict[str, Any]) -> str:
    """Return a table for each case: seconds of the whole call and of each phase, and times as fast as diffusers' K/V."""
    tables = []
    for found in report["cases"]:
        case = found["case"]
        plural = "" if case["num_references"] == 1 else "s"
        head = f"{case['num_references']} reference{plural}, {case['side']} x {case['side']}"
        lines = ["| " + " | ".join([head, "whole call", *PHASES]) + " |", "|---" * (2 + len(PHASES)) + "|"]
        for name, title in whole_names().items():
            if name not in found["seconds"]:
                continue
            times = found.get("times_diffusers_kv", {}).get(name)
            cells = [f"{found['seconds'][name]:.2f} s" + (f" ({times:.2f}x)" if times else "")]
            cells += [f"{found['phases'][name][phase]:.2f}" for phase in PHASES]
            lines.append("| " + " | ".join([title, *cells]) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)
