"""Kernels of CPUs with AMX beside torch's, at the shapes of klein-4B: products, attention, and blocks with both.

In one process, every contender in turn, medians and the shortest of all rounds in milliseconds. Products are those of a
single-stream block with 1,536 rows (1,024 image and 512 text tokens). oneDNN's read packed weights; how long packing takes
is told once. Attention has 1,536 queries, as many keys, and 1,024 kept ones. "blocks" is a forward of 1 + 4 blocks; those
"before" run as on a machine without tiles. Errors are relative, against the same in float64 (products) or float32. The last
line is one JSON object.

    .venv/bin/python benchmarks/tiles.py -o benchmarks/results/tiles.json
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limner.bench.measure import machine
from limner.config import TransformerConfig
from limner.model import attention, int8
from limner.model.arithmetic import Linear
from limner.model.int8 import Int8Linear, quantize_blocks, quantize_rows
from limner.model.kv import LayerKV
from limner.model.transformer import Transformer
from limner.native import tiles
from limner.tokens import image_ids, reference_ids, text_ids

WIDTH, MLP, HEADS, DIM = 3072, 9216, 24, 128
IMAGE, TEXT = (32, 32), 512
ROWS = IMAGE[0] * IMAGE[1] + TEXT

Contenders = dict[str, Callable[[], Tensor]]


def measured(contenders: Contenders, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each: the median of all rounds, and the shortest. They run in turn, once before to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - start) * 1e3)
    return {
        name: {"median_ms": round(statistics.median(all_ms), 1), "shortest_ms": round(min(all_ms), 1)}
        for name, all_ms in taken.items()
    }


def error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    wide = expected.double()
    return float((found.double() - wide).norm() / wide.norm())


def products(num_in: int, num_out: int, rounds: int, *, rows: int) -> dict[str, Any]:
    """x (rows, num_in) times a matrix with `num_out` features."""
    matrix = Linear(num_in, num_out).bfloat16()
    ours, packed = Int8Linear.of(matrix), Int8Linear.of(matrix)
    x = torch.randn(rows, num_in).bfloat16()
    prepared = quantize_rows(x)
    start = time.perf_counter()
    weight = torch.ops.onednn.qlinear_prepack(packed.weight, None)
    packing = time.perf_counter() - start
    zeros = torch.zeros(num_out, dtype=torch.int64)

    def onednn() -> Tensor:
        made: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(
                prepared.values,
                1.0,
                128,
                weight,
                packed.weight_scale,
                zeros,
                None,
                1.0,
                0,
                torch.bfloat16,
                "none",
                [],
                "",
            )
        )
        return made.mul_(prepared.scale.bfloat16())

    contenders: Contenders = {
        "torch bfloat16": partial(F.linear, x, matrix.weight),
        "tiles bfloat16": partial(matrix, x),
        "oneDNN int8": onednn,
        "tiles int8": partial(ours, prepared),
    }
    some = slice(0, 256)
    activations = (prepared.values[some].double() - 128) * prepared.scale[some].double()
    int8_expected = activations @ (ours.weight.double() * ours.weight_scale.double()[:, None]).t()
    expected = x[some].double() @ matrix.weight.double().t()
    found = {
        name: error(call()[some], int8_expected if "int8" in name else expected) for name, call in contenders.items()
    }
    timed: dict[str, Any] = measured(contenders, rounds)
    for values in timed.values():
        values["tera_operations"] = round(2 * rows * num_in * num_out / values["shortest_ms"] / 1e9, 2)
    for name, value in found.items():
        timed[name]["error"] = value
    return {"shape": [rows, num_in, num_out], "onednn_packing_ms": round(packing * 1e3, 1), **timed}


def attentions(rounds: int, *, rows: int, kept: int, heads: int) -> dict[str, Any]:
    """Own queries over kept and own keys."""
    q, k, v = (torch.randn(1, rows, heads, DIM).bfloat16() for _ in range(3))
    references = LayerKV(*(torch.randn(1, kept, heads, DIM).bfloat16() for _ in range(2)))

    def call(kernel: str) -> Tensor:
        return attention.attend(q, k, v, references=references, kernel=kernel)

    wide = LayerKV(*(x.float() for x in references))
    expected = attention.attend(q.float(), k.float(), v.float(), references=wide, kernel="dense")
    kernels = ("flash", "native", "tiles")
    timed: dict[str, Any] = measured({name: partial(call, name) for name in kernels}, rounds)
    for name, values in timed.items():
        values["tera_operations"] = round(4 * rows * (rows + kept) * heads * DIM / values["shortest_ms"] / 1e9, 2)
        values["error"] = error(call(name), expected)
    return {"queries": rows, "keys": rows + kept, "heads": heads, "head_dim": DIM, **timed}


@contextlib.contextmanager
def without_tiles() -> Iterator[None]:
    """As without our kernels for AMX: torch's products and its flash kernel, oneDNN's int8."""
    fits, choose = tiles.fits, attention.choose_kernel
    tiles.fits = lambda *_, **__: False
    attention.choose_kernel = cache(lambda *_: "flash")
    try:
        yield
    finally:
        tiles.fits, attention.choose_kernel = fits, choose


def blocks(rounds: int, *, heads: int, double: int, single: int, grid: tuple[int, int], text: int) -> dict[str, Any]:
    """A forward with one kept reference."""
    config = TransformerConfig(
        num_double_blocks=double, num_single_blocks=single, num_heads=heads, head_dim=DIM, text_width=7680
    )
    plain = Transformer(config).bfloat16().eval()
    narrow = copy.deepcopy(plain)
    quantize_blocks(narrow)
    reference, x = (torch.randn(1, grid[0] * grid[1], 128).bfloat16() for _ in range(2))
    words, ids, txt_ids = torch.randn(1, text, 7680).bfloat16(), image_ids(grid), text_ids(text)
    kept = plain.prefill(reference, reference_ids([grid]))

    def call(network: Transformer) -> Tensor:
        out: Tensor = network(x, words, 0.5, img_ids=ids, txt_ids=txt_ids, references=kept)
        return out

    def before(network: Transformer) -> Tensor:
        with without_tiles():
            return call(network)

    contenders: Contenders = {
        "bfloat16 before": partial(before, plain),
        "bfloat16": partial(call, plain),
        "int8 before": partial(before, narrow),
        "int8": partial(call, narrow),
    }
    timed: dict[str, Any] = measured(contenders, rounds)
    for name in ("bfloat16", "int8 before", "int8"):
        timed[name]["difference"] = error(contenders[name](), contenders["bfloat16 before"]())
    return {
        "blocks": [double, single],
        "width": heads * DIM,
        "tokens": grid[0] * grid[1] + text,
        "kept": grid[0] * grid[1],
        **timed,
    }


@torch.no_grad()
def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("-o", "--output", type=Path, help="file for the JSON")
    args = parser.parse_args(given)
    if (reason := tiles.why_missing()) is not None or not int8.has_int8_products():
        print(f"nothing to measure: {reason or 'oneDNN has no int8 products here'}")
        return
    torch.manual_seed(0)
    part = 16 if args.tiny else 1
    width, mlp, heads, rows = WIDTH // part, MLP // part, max(1, HEADS // part), ROWS // part
    report: dict[str, Any] = {
        "benchmark": "tiles",
        **machine(torch.device("cpu")),
        "command": shlex.join(["benchmarks/tiles.py", *(sys.argv[1:] if given is None else given)]),
        "rounds": args.rounds,
        "wide": products(width, 3 * width + 2 * mlp, args.rounds, rows=rows),
        "narrow": products(width + mlp, width, args.rounds, rows=rows),
        "attention": attentions(args.rounds, rows=rows, kept=rows * 2 // 3, heads=heads),
    }
    grid, text = ((4, 4), 32) if args.tiny else (IMAGE, TEXT)
    report["blocks"] = blocks(args.rounds, heads=heads, double=1, single=1 if args.tiny else 4, grid=grid, text=text)
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
