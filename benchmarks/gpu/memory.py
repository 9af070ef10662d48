"""What it takes: K/V and weights from page-locked host memory, and several seeds over the same references."""

from __future__ import annotations

import time
from typing import Any

import torch

from gpu.measure import Part, Run, relative_error
from gpu.speed import bench, case
from limner.model.kv import ReferenceKV
from limner.model.transfer import to_host

__all__ = ["PARTS"]


@torch.no_grad()
def kept_on_host(run: Run) -> None:
    """K/V of references in page-locked memory, copied layer by layer, beside K/V on the device."""
    both, shape = bench(run), case(run, 1 if run.tiny else 4)
    given = both.inputs(shape)
    kv = both.ours.prefill(given["ref"], given["ref_ids"])
    want, gib = both.limner(shape, given, cached=kv), kv.nbytes / 2**30
    there = run.seconds(lambda: both.limner(shape, given, cached=kv), rounds=1)
    start = time.perf_counter()
    host = ReferenceKV(layers=to_host(kv.layers, page_locked=run.cuda))
    down = time.perf_counter() - start

    def call() -> Any:
        return both.limner(shape, given, cached=host)

    equal = torch.equal(call(), want)
    seconds = {"device": round(there, 4), "host": round(run.seconds(call, rounds=1), 4), "to_host": round(down, 3)}
    run.check("K/V on the host", equal, gib_of_kv=round(gib, 3), seconds=seconds, gib=run.peak(call), equal=equal)


@torch.no_grad()
def weights_on_host(run: Run) -> None:
    """Half of the blocks pass through two buffers: seconds a call beside all of them on the device. CUDA only."""
    if not run.cuda:
        run.say("weights on the host", skipped="needs CUDA; tests/unit/memory/test_staged.py pretends it")
        return
    from limner.memory.plan import DEVICE_BASE
    from limner.memory.staged import Staged
    from limner.model.context import InPlace

    both, shape = bench(run), case(run, 1)
    given = both.inputs(shape)
    kv = both.ours.prefill(given["ref"], given["ref_ids"])
    want = both.limner(shape, given, cached=kv)
    all_there = run.seconds(lambda: both.limner(shape, given, cached=kv), rounds=2)
    staged = Staged(1 << 50, run.device)
    model = both.ours
    start = time.perf_counter()
    try:  # whatever fails, other parts find the model on the device
        staged.adopt(model, [*model.transformer_blocks, *model.single_transformer_blocks])
        down = time.perf_counter() - start
        known = staged._staged[model]
        model.use(staging=staged)
        staged.limit = DEVICE_BASE + staged._others() + known.nbytes // 2
        with staged.working(model, growth=0):
            found = both.limner(shape, given, cached=kv)
            half = run.seconds(lambda: both.limner(shape, given, cached=kv), rounds=2)
            passing = len(known.passing)
    finally:
        if model in staged._staged:
            staged.release(model)
        model.use(staging=InPlace())
        model.to(run.device)
    seconds = {"all": round(all_there, 4), "half": round(half, 4), "to_host": round(down, 2)}
    equal = torch.equal(found, want)
    run.check("weights on the host", equal, passing=passing, seconds=seconds, equal=equal)


@torch.no_grad()
def seeds(run: Run) -> None:
    """Four seeds over four references: GiB on top of the weights, K/V included, beside diffusers with its K/V cache."""
    both, number = bench(run), 1 if run.tiny else 4
    shape = case(run, number, batch=4)
    given = both.inputs(shape)
    found = {
        "diffusers_kv": run.peak(lambda: both.diffusers(shape, given, cached=True)),
        "new": run.peak(lambda: both.limner(shape, given)),
    }
    ours, theirs = both.limner(shape, given), both.diffusers(shape, given, cached=True)
    run.say("seeds", references=number, batch=4, gib=found, difference=relative_error(ours, theirs))


PARTS = [Part(kept_on_host, 40), Part(weights_on_host, 40), Part(seeds, 60)]
