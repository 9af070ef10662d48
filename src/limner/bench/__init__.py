"""Measurements against diffusers: steps of an edit (`edit`), and a whole call from prompt to PNG (`whole`)."""

from limner.bench.edit import Bench, BenchCase, as_markdown, geometry, prefill_flops, random_transformer, step_flops
from limner.bench.measure import machine
from limner.bench.whole import WholeBench, whole_markdown

__all__ = [
    "Bench",
    "BenchCase",
    "WholeBench",
    "as_markdown",
    "geometry",
    "machine",
    "prefill_flops",
    "random_transformer",
    "step_flops",
    "whole_markdown",
]
