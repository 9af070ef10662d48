"""How fast it is, beside diffusers with its K/V cache: steps, attention, products, launches, graphs, compiled blocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.measure import Part, Run, relative_error
from limner.bench import Bench, BenchCase
from limner.config import KLEIN_9B, TransformerConfig
from limner.model.attention import KERNELS, attend
from limner.model.kv import LayerKV, ReferenceKV, quantize_layer

__all__ = ["PARTS", "bench", "case"]

_TINY = TransformerConfig(
    num_double_blocks=1,
    num_single_blocks=2,
    num_heads=2,
    head_dim=64,
    text_width=96,
    in_channels=32,
    out_channels=32,
    rope_axes=(16, 16, 16, 16),
)


def bench(run: Run) -> Bench:
    """Both engines over random weights of klein-9b's geometry, shared by the parts."""
    if "bench" not in run.shared:
        config = _TINY if run.tiny else KLEIN_9B
        run.shared["bench"] = Bench(config, dtype=torch.bfloat16, device=run.device)
    found: Bench = run.shared["bench"]
    return found


def case(run: Run, number: int, *, side: int | None = None, batch: int = 1) -> BenchCase:
    if run.tiny:
        return BenchCase(
            num_references=number, side=64, reference_side=64, num_text=16, batch=batch, num_inference_steps=2
        )
    return BenchCase(num_references=number, side=side or 1024, reference_side=1024, num_text=512, batch=batch)


def _narrow(kv: ReferenceKV) -> ReferenceKV:
    return ReferenceKV(layers=tuple(quantize_layer(x, "int8") for x in kv.kv if isinstance(x, LayerKV)))


@torch.no_grad()
def steps(run: Run) -> None:
    """Seconds of 4 steps, references new and kept, and GiB beside the weights; 1, 2 and 4 references."""
    for number in (1,) if run.tiny else (1, 2, 4):
        _steps_over(run, number)


def _steps_over(run: Run, number: int) -> None:
    both, shape = bench(run), case(run, number)
    given = both.inputs(shape)
    kv = both.ours.prefill(given["ref"], given["ref_ids"])
    narrow = _narrow(kv)
    calls: dict[str, Callable[[], Any]] = {
        "diffusers_kv": lambda: both.diffusers(shape, given, cached=True),
        "new": lambda: both.limner(shape, given),
        "kept": lambda: both.limner(shape, given, cached=kv),
        "kept_int8_kv": lambda: both.limner(shape, given, cached=narrow),
    }
    seconds = {name: round(run.seconds(call, rounds=2), 4) for name, call in calls.items()}
    peaks = {name: run.peak(calls[name]) for name in ("diffusers_kv", "new", "kept")}
    error = relative_error(calls["kept"](), calls["diffusers_kv"]())
    same = torch.equal(calls["new"](), calls["kept"]())
    run.check("steps", same, references=number, seconds=seconds, gib=peaks, difference=error, new_equals_kept=same)


@torch.no_grad()
def errors(run: Run) -> None:
    """Errors of both engines in bfloat16, against diffusers in float32, with klein-9b's width and few blocks."""
    config = _TINY if run.tiny else replace(KLEIN_9B, num_double_blocks=1, num_single_blocks=2)
    wide = Bench(config, dtype=torch.float32, device=run.device)
    both = Bench(config, dtype=torch.bfloat16, device=run.device)
    for exact, mine in zip(wide.ours.parameters(), both.ours.parameters(), strict=True):
        exact.copy_(mine)  # shared with diffusers
    shape = case(run, 1, side=512)
    given = both.inputs(shape)
    in_float32 = {name: x.float() if x.is_floating_point() else x for name, x in given.items()}
    in_float32["sigmas"] = given["sigmas"].to(torch.bfloat16).float()
    want = wide.diffusers(shape, in_float32, cached=True)
    found = {
        "diffusers": relative_error(both.diffusers(shape, given, cached=True), want),
        "limner": relative_error(both.limner(shape, given), want),
        "limner_int8": relative_error(both.limner(shape, given, quantize=True), want),
    }
    run.check("errors", found["limner"] <= 1.1 * found["diffusers"], **found)


@torch.no_grad()
def launches(run: Run) -> None:
    """How much of a step is Python: the time to queue it beside the time of it, and of its graph; then a profile."""
    both = bench(run)
    for side in (64,) if run.tiny else (256, 512, 1024):
        shape = case(run, 1, side=side)
        given = both.inputs(shape)
        kv = both.ours.prefill(given["ref"], given["ref_ids"])
        step = _step(both, given, kv)
        step()
        run.wait()
        start = time.perf_counter()
        step()
        queued = time.perf_counter() - start
        found: dict[str, Any] = {"queued_ms": round(queued * 1e3, 2), "step_ms": round(run.seconds(step) * 1e3, 2)}
        run.say("launches", side=side, **found)
    if run.cuda:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            step()
            run.wait()
        rows = sorted(profiled.key_averages(), key=lambda row: -row.self_device_time_total)[:18]
        top = [[row.key[:70], row.count, round(row.self_device_time_total / 1e3, 2)] for row in rows]
        run.say("profile", side=side, top=top)


def _step(both: Bench, given: dict[str, torch.Tensor], kv: ReferenceKV) -> Callable[[], torch.Tensor]:
    rope = both.ours.rope(torch.cat([given["txt_ids"], given["img_ids"]]))
    sigma = given["sigmas"][0].to(both.dtype)

    def step() -> torch.Tensor:
        velocity: torch.Tensor = both.ours(
            given["noise"],
            given["txt"],
            sigma,
            img_ids=given["img_ids"],
            txt_ids=given["txt_ids"],
            references=kv,
            rope=rope,
        )
        return velocity

    return step


@torch.no_grad()
def attentions(run: Run) -> None:
    """Milliseconds of attention over kept references: Limner's kernels, torch's over a concatenation, the copy alone."""

    for num_ref in (64,) if run.tiny else (4096, 16384):
        _attentions_over(run, num_ref)


def _attentions_over(run: Run, num_ref: int) -> None:
    heads, dim, own = (2, 64, 80) if run.tiny else (32, 128, 4608)

    def randn(tokens: int) -> torch.Tensor:
        return torch.randn(1, tokens, heads, dim, device=run.device, dtype=torch.bfloat16)

    q, k, v, kv = randn(own), randn(own), randn(own), LayerKV(randn(num_ref), randn(num_ref))
    narrow = quantize_layer(kv, "int8")

    def joined() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([kv.k, k], 1), torch.cat([kv.v, v], 1)

    def over_all(*backends: SDPBackend) -> torch.Tensor:
        whole = [x.transpose(1, 2) for x in (q, *joined())]
        with sdpa_kernel(list(backends)) if backends else nullcontext():
            return F.scaled_dot_product_attention(*whole)

    calls: dict[str, Callable[[], Any]] = {
        "limner": lambda: attend(q, k, v, references=kv),
        "limner int8 K/V": lambda: attend(q, k, v, references=narrow),
        "concatenation alone": joined,
        "torch over the concatenation": over_all,
    }
    calls |= {f"limner {name}": _kernel(name, q, k, v, kv) for name in KERNELS if name not in ("dense", "native")}
    if run.cuda:
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            calls[f"torch {backend.name}"] = partial(over_all, backend)
    run.say("attentions", own=own, references=num_ref, milliseconds=run.each(calls))


def _kernel(name: str, q: Any, k: Any, v: Any, kv: LayerKV) -> Callable[[], Any]:
    return lambda: attend(q, k, v, references=kv, kernel=name)


@torch.no_grad()
def products(run: Run) -> None:
    """The largest matrix in bfloat16, in Limner's int8, and with torch's int8 and fp8; then the whole int8 model."""
    from limner.model.int8 import Int8Linear

    rows, width, out = (80, 128, 512) if run.tiny else (4608, 4096, 36864)
    x = torch.randn(rows, width, device=run.device, dtype=torch.bfloat16)
    linear = torch.nn.Linear(width, out, bias=False, device=run.device, dtype=torch.bfloat16)
    narrow = Int8Linear.of(linear)
    calls: dict[str, Callable[[], Any]] = {"bfloat16": lambda: linear(x), "limner int8": lambda: narrow(x)}
    if run.cuda:
        xi, f8 = torch.randint(-127, 127, (rows, width), device=run.device, dtype=torch.int8), torch.float8_e4m3fn
        scale_x, scale_w = torch.ones(rows, 1, device=run.device), torch.ones(1, out, device=run.device)
        x8, w8 = x.to(f8), linear.weight.to(f8)
        calls["_int_mm"] = lambda: torch._int_mm(xi, narrow.weight.t())
        calls["fp8 rowwise"] = lambda: torch._scaled_mm(
            x8, w8.t(), scale_a=scale_x, scale_b=scale_w, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    found = run.each(calls)
    operations = 2 * rows * width * out
    teraflops = {name: round(operations / ms / 1e9, 1) for name, ms in found.items() if isinstance(ms, float)}
    run.say("products", shape=[rows, width, out], milliseconds=found, teraflops=teraflops)
    both, shape = bench(run), case(run, 1 if run.tiny else 2)
    given = both.inputs(shape)
    kv = both.int8().prefill(given["ref"], given["ref_ids"])

    def call() -> Any:
        return both.limner(shape, given, cached=kv, quantize=True)

    seconds = round(run.seconds(call, rounds=2), 4)
    run.say("int8 model", references=shape.num_references, kept=seconds, gib=run.peak(call))
    both._int8 = None


@torch.no_grad()
def compiled(run: Run) -> None:
    """Blocks under torch.compile in one graph, of both engines."""
    from torch import _dynamo

    both, shape = bench(run), case(run, 1 if run.tiny else 2)
    if not run.cuda:  # where half precision is for our own kernels
        both = Bench(_TINY, dtype=torch.float32, device=run.device)
    given, backend = both.inputs(shape), "inductor" if run.cuda else "eager"
    kv = both.ours.prefill(given["ref"], given["ref_ids"])
    before = both.limner(shape, given, cached=kv)
    limit, _dynamo.config.recompile_limit = _dynamo.config.recompile_limit, 32
    try:
        start = time.perf_counter()
        both.ours.compile_blocks(backend=backend)
        after = both.limner(shape, given, cached=kv)
        run.wait()
        took = time.perf_counter() - start
        seconds = round(run.seconds(lambda: both.limner(shape, given, cached=kv), rounds=2), 4)
        error = relative_error(after, before)
        values = {"references": shape.num_references, "compile_seconds": round(took, 1), "kept": seconds}
        run.check("compiled", error < 2e-2, **values, difference=error)
    finally:
        both.ours.compile_blocks(None)
        _dynamo.config.recompile_limit = limit
    if run.left < 60 and not run.tiny:
        return
    start = time.perf_counter()
    both.theirs.compile_repeated_blocks(fullgraph=False, backend=backend)
    for number in (1,) if run.tiny else (1, 2, 4):
        shape = case(run, number)
        given = both.inputs(shape)
        both.diffusers(shape, given, cached=True)
        run.wait()
        took, start = time.perf_counter() - start, time.perf_counter()
        seconds = round(run.seconds(lambda: both.diffusers(shape, given, cached=True), rounds=2), 4)  # noqa: B023
        run.say("compiled diffusers", references=number, compile_seconds=round(took, 1), diffusers_kv=seconds)


PARTS = [
    Part(steps, 110),
    Part(errors, 20),
    Part(launches, 20),
    Part(attentions, 15),
    Part(products, 25),
    Part(compiled, 90),
]
