"""Measures a 4-step edit against diffusers: the same random weights, one run, in turn, medians.

Transformer and Euler steps only, as diffusers' `output_type="latent"` with prompt embeddings and encoded references given.
"cold" computes the K/V of the references, "warm" has them cached. Imports diffusers' transformer as the thing to compare
with; no module of another package imports this one but the command.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limner.bench.measure import Peak, now
from limner.config import TransformerConfig
from limner.grid import PIXELS
from limner.model.int8 import quantize_blocks
from limner.model.kv import LayerKV, ReferenceKV, quantize_layer
from limner.model.transformer import RefWeights, Transformer
from limner.pipeline.denoise import Surroundings
from limner.schedule import Schedule, euler_step
from limner.tokens import image_ids, reference_ids, text_ids

__all__ = ["Bench", "BenchCase", "as_markdown", "geometry", "prefill_flops", "random_transformer", "step_flops"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchCase:
    """One call: references and output of `side` x `side` pixels, `batch` images of one prompt."""

    num_references: int
    side: int = 512
    reference_side: int = 512
    batch: int = 1
    num_text: int = 512
    num_inference_steps: int = 4

    @property
    def grid(self) -> tuple[int, int]:
        return (self.side // PIXELS, self.side // PIXELS)

    @property
    def reference_grids(self) -> list[tuple[int, int]]:
        return [(self.reference_side // PIXELS, self.reference_side // PIXELS)] * self.num_references


def geometry(heads: int, double: int, single: int) -> TransformerConfig:
    """Return a transformer of the family: heads of 128, double- and single-stream blocks (the 4B has 24, 5, 20)."""
    return TransformerConfig(
        num_double_blocks=double, num_single_blocks=single, num_heads=heads, head_dim=128, text_width=384 * heads
    )


def random_transformer(config: TransformerConfig, *, seed: int = 0) -> Transformer:
    """Return a transformer with random weights, made in bfloat16: no float32 copy of a large model."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Transformer(config).eval()
    finally:
        torch.set_default_dtype(before)


def step_flops(config: TransformerConfig, *, num_own: int, num_ref: int, num_txt: int) -> int:
    """Return multiplications and additions of one denoising step with cached references: matrices and attention.

    A double-stream block has 4 C^2 + 3 C M weights a stream, a single-stream block 4 C^2 + 3 C M for all tokens; the last
    one makes K and V of all tokens and the rest of image tokens alone. Attention costs 4 C for each pair of query and key.
    """
    c, m, full, num_img = config.width, config.mlp_width, config.num_layers - 1, num_own - num_txt
    matrices = num_own * 2 * (4 * c * c + 3 * c * m) * full
    matrices += num_own * 2 * 2 * c * c + num_img * 2 * (2 * c * c + 3 * c * m)
    attention = 4 * c * (num_own * full + num_img) * (num_own + num_ref)
    edges = 2 * c * (num_img * 2 * config.in_channels + num_txt * config.text_width)
    return matrices + attention + edges


def prefill_flops(config: TransformerConfig, *, num_ref: int) -> int:
    """Return multiplications and additions of a prefill of `num_ref` tokens; of the last block K and V alone."""
    c, m = config.width, config.mlp_width
    full = config.num_layers - 1
    matrices = num_ref * 2 * ((4 * c * c + 3 * c * m) * full + 2 * c * c + c * config.in_channels)
    return matrices + 4 * c * num_ref * num_ref * full


class Bench:
    """Both engines over one set of random weights."""

    def __init__(
        self, config: TransformerConfig, *, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> None:
        from diffusers import Flux2Transformer2DModel
        from diffusers.models.transformers.transformer_flux2 import (
            Flux2KVAttnProcessor,
            Flux2KVParallelSelfAttnProcessor,
        )

        torch.manual_seed(seed)
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # made as such: no float32 copy of a large model
        try:
            with torch.device(self.device):
                self.theirs = Flux2Transformer2DModel(**config.to_diffusers()).to(dtype).eval()
        finally:
            torch.set_default_dtype(before)
        for block in self.theirs.transformer_blocks:
            block.attn.set_processor(Flux2KVAttnProcessor())
        for block in self.theirs.single_transformer_blocks:
            block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
        with torch.device("meta"):
            self.ours = Transformer(config)
        self.ours.load_state_dict(self.theirs.state_dict(), assign=True)
        self.ours.requires_grad_(False)
        self._int8: Transformer | None = None

    def int8(self) -> Transformer:
        """Return the same weights in int8, made at the first call."""
        if self._int8 is None:
            with torch.device("meta"):
                self._int8 = Transformer(self.config)
            self._int8.load_state_dict(
                self.ours.state_dict(), assign=True
            )  # shared; matrices are replaced one at a time
            self._int8.requires_grad_(False)
            self._int8.kernel = self.ours.kernel
            quantize_blocks(self._int8)
        return self._int8

    def inputs(self, case: BenchCase) -> dict[str, Tensor]:
        """Return noise and text (batch), references and positions (once)."""
        generator = torch.Generator().manual_seed(case.num_references)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

        ref_ids = reference_ids(case.reference_grids) if case.num_references else torch.zeros(0, 4, dtype=torch.int64)
        return {
            "txt": randn(1, case.num_text, self.config.text_width),
            "noise": randn(case.batch, case.grid[0] * case.grid[1], self.config.in_channels),
            "ref": randn(1, len(ref_ids), self.config.in_channels),
            "ref_ids": ref_ids,
            "img_ids": image_ids(case.grid),
            "txt_ids": text_ids(case.num_text),
            "sigmas": Schedule()
            .sigmas(case.grid[0] * case.grid[1], num_inference_steps=case.num_inference_steps)
            .to(self.device),
        }

    @torch.no_grad()
    def diffusers(self, case: BenchCase, given: dict[str, Tensor], *, cached: bool) -> Tensor:
        """diffusers' loop: references in every step, or their K/V from step 0. It repeats references over the batch."""
        ids, txt_ids = (given[name].to(self.device) for name in ("img_ids", "txt_ids"))
        both_ids = torch.cat([given["ref_ids"], given["img_ids"]]).to(self.device)
        txt, ref = (given[name].expand(case.batch, -1, -1) for name in ("txt", "ref"))
        latents, cache, num_img = given["noise"], None, given["noise"].shape[1]
        for i in range(case.num_inference_steps):
            t = given["sigmas"][i].to(self.dtype).expand(case.batch)
            if cached and i > 0:
                velocity = self.theirs(
                    latents, txt, t, ids, txt_ids, return_dict=False, kv_cache=cache, kv_cache_mode="cached"
                )[0]
            else:
                both = torch.cat([ref, latents], dim=1)
                mode = {"kv_cache_mode": "extract", "num_ref_tokens": ref.shape[1]} if cached else {}
                velocity, *rest = self.theirs(both, txt, t, both_ids, txt_ids, return_dict=False, **mode)
                cache = rest[0] if rest else None
                velocity = velocity[:, -num_img:]
            latents = euler_step(latents, velocity, sigma=given["sigmas"][i], next_sigma=given["sigmas"][i + 1]).to(
                self.dtype
            )
        return latents

    @torch.no_grad()
    def limner(
        self,
        case: BenchCase,
        given: dict[str, Tensor],
        *,
        cached: ReferenceKV | None = None,
        quantize: bool = False,
        surroundings: Surroundings | None = None,
        weights: RefWeights = None,
    ) -> Tensor:
        """Limner's loop; without `cached` K/V the references are prefilled first.

        `surroundings` are those of a mask, `weights` are (tokens, weight) of each reference.
        """
        model = self.int8() if quantize else self.ours
        if cached is None and case.num_references:
            cached = model.prefill(given["ref"], given["ref_ids"])
        latents = given["noise"].float()
        rope = model.rope(torch.cat([given["txt_ids"], given["img_ids"]]))
        for i in range(case.num_inference_steps):
            velocity = self._velocity(model, given, latents, i, references=cached, ref_weights=weights, rope=rope)
            latents = euler_step(latents, velocity, sigma=given["sigmas"][i], next_sigma=given["sigmas"][i + 1])
            if surroundings is not None:
                latents = surroundings.keep(latents, given["sigmas"][i + 1])
        return latents

    def _velocity(
        self, model: Transformer, given: dict[str, Tensor], latents: Tensor, i: int, **references: Any
    ) -> Tensor:
        """Return the velocity of step i. The level has the model's dtype, as diffusers' has: results can be compared."""
        txt, ids = given["txt"].expand(len(latents), -1, -1), {name: given[name] for name in ("img_ids", "txt_ids")}
        level = given["sigmas"][i].to(self.dtype)
        velocity: Tensor = model(latents.to(self.dtype), txt, level, **ids, **references)
        return velocity

    def surroundings(self, given: dict[str, Tensor]) -> Surroundings:
        """Return a canvas of which the right half is repainted."""
        noise = given["noise"].float()
        canvas = torch.randn(1, *noise.shape[1:], generator=torch.Generator().manual_seed(1)).to(noise)
        columns = given["img_ids"][:, 2]
        mask = (columns > columns.max() // 2).to(noise)[None, :, None]
        return Surroundings(canvas=canvas, noise=noise, mask=mask)

    @torch.no_grad()
    def limner_joint(
        self, case: BenchCase, given: dict[str, Tensor], *, quantize: bool = False, reuse: bool = False
    ) -> Tensor:
        """Limner's loop with references as tokens of every step; with `reuse` their K/V of the first step serve others."""
        model = self.int8() if quantize else self.ours
        latents, kept = given["noise"].float(), None
        for i in range(case.num_inference_steps):
            found: list[LayerKV] = []
            joint = {"ref_tokens": given["ref"], "ref_ids": given["ref_ids"]} if kept is None else {"references": kept}
            keep = found.append if reuse and kept is None else None
            velocity = self._velocity(model, given, latents, i, kept=keep, **joint)
            kept = ReferenceKV(layers=tuple(found)) if found else kept
            latents = euler_step(latents, velocity, sigma=given["sigmas"][i], next_sigma=given["sigmas"][i + 1])
        return latents

    def run(
        self, case: BenchCase, *, rounds: int, engines: Sequence[str], progress: Callable[[str], None] = print
    ) -> dict[str, Any]:
        """Return medians of all engines in turn, ratios, memory of each call, and by what the results differ.

        Engines: standard, diffusers_kv, cold, warm, int8_cold, int8_warm, warm_int8_kv; masked and weighted, which are
        warm with a mask and with a weight for each reference; joint, int8_joint, and reuse, int8_reuse, which are
        approximate. Without references only standard, cold and int8_cold mean something; the others are left out.
        """
        if not case.num_references:
            engines = [name for name in engines if name in ("standard", "cold", "int8_cold")]
        given = self.inputs(case)
        calls = self._calls(case, given, engines)
        measured: dict[str, list[float]] = {name: [] for name in engines}
        results: dict[str, Tensor] = {}
        peaks: dict[str, int] = dict.fromkeys(engines, 0)
        for number in range(rounds):
            for name in engines:
                with Peak(self.device) as peak:
                    start = now(self.device)
                    results[name] = calls[name]()
                    measured[name].append(now(self.device) - start)
                peaks[name] = max(peaks[name], peak.nbytes)
                progress(f"{case.num_references} references, round {number + 1}: {name} {measured[name][-1]:.2f} s")
        seconds = {name: statistics.median(values) for name, values in measured.items()}
        return {
            "case": asdict(case),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "all_seconds": {name: [round(v, 3) for v in values] for name, values in measured.items()},
            "peak_bytes": peaks,
            "kept_bytes": self.kept_bytes(len(given["ref_ids"])),
            **_comparison(seconds, results),
            **_cost(measured),
            **self._rates(case, seconds, num_ref=len(given["ref_ids"])),
        }

    def _calls(
        self, case: BenchCase, given: dict[str, Tensor], engines: Sequence[str]
    ) -> dict[str, Callable[[], Tensor]]:
        """Return what each engine runs. The references of warm ones are prefilled here."""
        with torch.no_grad():
            cached = {
                quantize: (self.int8() if quantize else self.ours).prefill(given["ref"], given["ref_ids"])
                for quantize, users in ((False, {"warm", "warm_int8_kv", "masked", "weighted"}), (True, {"int8_warm"}))
                if case.num_references and users & set(engines)
            }
            narrow = None
            if "warm_int8_kv" in engines:
                narrow = ReferenceKV(
                    layers=tuple(quantize_layer(x, "int8") for x in cached[False].layers if isinstance(x, LayerKV))
                )
        kept = self.surroundings(given)
        num_tokens = len(given["ref_ids"]) // max(case.num_references, 1)
        weights = tuple((num_tokens, (i + 1) / 4) for i in range(case.num_references))
        return {
            "standard": lambda: self.diffusers(case, given, cached=False),
            "diffusers_kv": lambda: self.diffusers(case, given, cached=True),
            "cold": lambda: self.limner(case, given),
            "warm": lambda: self.limner(case, given, cached=cached.get(False)),
            "masked": lambda: self.limner(case, given, cached=cached.get(False), surroundings=kept),
            "weighted": lambda: self.limner(case, given, cached=cached.get(False), weights=weights),
            "int8_cold": lambda: self.limner(case, given, quantize=True),
            "int8_warm": lambda: self.limner(case, given, cached=cached.get(True), quantize=True),
            "warm_int8_kv": lambda: self.limner(case, given, cached=narrow),
            "joint": lambda: self.limner_joint(case, given),
            "int8_joint": lambda: self.limner_joint(case, given, quantize=True),
            "reuse": lambda: self.limner_joint(case, given, reuse=True),
            "int8_reuse": lambda: self.limner_joint(case, given, quantize=True, reuse=True),
        }

    def _rates(self, case: BenchCase, seconds: dict[str, float], *, num_ref: int) -> dict[str, float]:
        """Return the operations of all steps, and a second those of warm steps and of one plain product."""
        num_own = case.grid[0] * case.grid[1] + case.num_text
        step = step_flops(self.config, num_own=num_own, num_ref=num_ref, num_txt=case.num_text)
        flops = step * case.batch * case.num_inference_steps
        rates = {"step_teraflop": round(flops / 1e12, 4)}
        if "warm" in seconds:
            rates["warm_gflops"] = round(flops / seconds["warm"] / 1e9, 1)
            rates["plain_product_gflops"] = round(self.plain_rate(case.batch * num_own) / 1e9, 1)
        return rates

    def kept_bytes(self, num_ref: int) -> int:
        """Return the bytes of K and V of `num_ref` tokens in every layer."""
        return 2 * num_ref * self.config.width * self.config.num_layers * self.dtype.itemsize

    @torch.no_grad()
    def plain_rate(self, rows: int) -> float:
        """Return operations a second of one plain product of the size that the blocks have most of."""
        weight = torch.randn(3 * self.config.width + 2 * self.config.mlp_width, self.config.width)
        weight = weight.to(self.device, self.dtype)
        x = torch.randn(rows, self.config.width).to(self.device, self.dtype)
        F.linear(x, weight)
        times = []
        for _ in range(7):
            start = now(self.device)
            F.linear(x, weight)
            times.append(now(self.device) - start)
        return 2 * rows * weight.numel() / statistics.median(times)


_JOINT = ("joint", "int8_joint", "reuse", "int8_reuse")
"""Engines whose references are joint, as those of diffusers' standard pipeline."""
_CONTROLLED = ("masked", "weighted")
"""Engines that draw another picture; their cost is that over "warm"."""


def _comparison(seconds: dict[str, float], results: dict[str, Tensor]) -> dict[str, Any]:
    """Return how many times as fast as diffusers each engine is, and how far its result is from that of diffusers."""
    found: dict[str, Any] = {}
    for base in ("diffusers_kv", "standard"):
        if base not in seconds:
            continue
        found[f"times_{base}"] = {name: round(seconds[base] / value, 3) for name, value in seconds.items()}
        expected = results[base].float()
        alike = {name: value for name, value in results.items() if (name in _JOINT) == (base == "standard")}
        found["relative_difference"] = found.get("relative_difference", {}) | {
            name: round(((value.float() - expected).norm() / expected.norm()).item(), 8)
            for name, value in alike.items()
            if name not in ("standard", base, *_CONTROLLED)
        }
    return found


def _cost(measured: dict[str, list[float]]) -> dict[str, Any]:
    """Return by what share each controlled engine takes longer than "warm": the median over rounds, each run in turn."""
    if "warm" not in measured or not any(name in measured for name in _CONTROLLED):
        return {}
    ratios = {
        name: statistics.median(a / b for a, b in zip(measured[name], measured["warm"], strict=True))
        for name in _CONTROLLED
        if name in measured
    }
    return {"cost_over_warm": {name: round(ratio - 1, 4) for name, ratio in ratios.items()}}


def as_markdown(report: dict[str, Any]) -> str:
    """Return the table of a report: seconds, and how many times as fast as diffusers with its K/V cache.

    Engines with joint references are compared with its standard pipeline.
    """
    names = {
        "standard": "diffusers, references in every step",
        "diffusers_kv": "diffusers with its K/V cache",
        "cold": "Limner, references new",
        "warm": "Limner, references kept",
        "masked": "the same with a mask",
        "weighted": "the same with a weight for each reference",
        "warm_int8_kv": "Limner, references kept in int8",
        "int8_cold": "Limner int8, references new",
        "int8_warm": "Limner int8, references kept",
        "joint": "Limner, references in every step",
        "int8_joint": "Limner int8, references in every step",
        "reuse": "Limner, K/V of the first step again (approximate)",
        "int8_reuse": "Limner int8, K/V of the first step again (approximate)",
    }
    cases = report["cases"]
    heads = []
    for found in cases:
        case = found["case"]
        many = f", {case['batch']} images" if case["batch"] > 1 else ""
        heads.append(f"{case['num_references']} reference{'s' if case['num_references'] != 1 else ''}{many}")
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, title in names.items():
        cells = []
        for found in cases:
            if name not in found["seconds"]:
                cells.append("")
                continue
            base = "standard" if name in _JOINT else "diffusers_kv"
            times, cost = found.get(f"times_{base}", {}).get(name), found.get("cost_over_warm", {}).get(name)
            note = f" ({times:.2f}x)" if times else ""
            cells.append(f"{found['seconds'][name]:.1f} s" + (f" ({cost:+.1%})" if cost is not None else note))
        if any(cells):
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
