"""Attention kernels against the formula in float64, at lengths that fill no block, in layouts that are views."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny import relative_error
from torch import Tensor

from limner.errors import InvalidRequest
from limner.model.attention import CPU_KERNELS, KeyWeights, attend, choose_kernel
from limner.model.kv import LayerKV, quantize_layer
from limner.native import kernels as native
from limner.native import tiles

# rounding of the result alone: 2^-9; `chunked` rounds scores and weights too
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
has_native = pytest.mark.skipif(native.native_library() is None, reason="no AVX-512 BF16 or no C compiler")
has_tiles = pytest.mark.skipif(tiles.why_missing() is not None, reason="no AMX or no C compiler")
IN_C = {"native": native.takes, "tiles": tiles.takes}
in_c = pytest.mark.parametrize(
    "kernel", [pytest.param("native", marks=has_native), pytest.param("tiles", marks=has_tiles)]
)


def skip_without(kernel: str, dtype: torch.dtype, dim: int) -> None:
    if kernel in IN_C and not IN_C[kernel](torch.device("cpu"), dtype, dim):
        pytest.skip(f"{kernel} does not take heads of {dim} in {dtype} on this CPU")


def truth(q: Tensor, k: Tensor, v: Tensor, k_ref: Tensor, v_ref: Tensor) -> Tensor:
    k, v = (torch.cat([r.expand(q.shape[0], -1, -1, -1), x], 1).double() for r, x in ((k_ref, k), (v_ref, v)))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("kernel", sorted(CPU_KERNELS))
@pytest.mark.parametrize(
    ("num_own", "num_ref", "heads", "dim", "batch"),
    [
        (1, 0, 1, 16, 1),
        (63, 1, 3, 64, 2),
        (130, 257, 2, 128, 1),
        (257, 1000, 2, 32, 1),
        (300, 0, 5, 64, 1),
        (600, 513, 3, 48, 2),
        (70, 530, 2, 256, 1),
        (33, 15, 2, 96, 1),
    ],
)
def test_kernels_are_the_formula(
    kernel: str, dtype: torch.dtype, num_own: int, num_ref: int, heads: int, dim: int, batch: int
) -> None:
    skip_without(kernel, dtype, dim)
    generator = torch.Generator().manual_seed(num_own)
    # one projection, as a single-stream block has it: q, k and v are views of it
    both = torch.randn(batch, num_own, 3 * heads * dim + 7, generator=generator).to(dtype)
    q, k, v = (both[..., i * heads * dim : (i + 1) * heads * dim].unflatten(-1, (heads, dim)) for i in range(3))
    q = q * 3  # peaked: a few keys have the weight
    k_ref, v_ref = (torch.randn(1, num_ref, heads, dim, generator=generator).to(dtype) for _ in range(2))
    references = LayerKV(k_ref, v_ref) if num_ref else None
    found = attend(q, k, v, references=references, kernel=kernel)
    assert found.shape == q.shape
    last = attend(q[:, num_own // 2 :], k, v, references=references, kernel=kernel)  # fewer queries than own keys
    assert relative_error(last, found[:, num_own // 2 :]) <= LIMITS[dtype]
    limit = LIMITS[dtype] * (5 if (kernel, dtype) in (("chunked", torch.bfloat16), ("dense", torch.bfloat16)) else 1)
    limit *= 2 if dim > 128 else 1  # scores of longer sums, in float32
    assert relative_error(found, truth(q, k, v, k_ref, v_ref)) <= limit


@in_c
def test_bits_depend_on_neither_batch_nor_threads(kernel: str) -> None:
    q, k, v = (torch.randn(2, 1100, 2, 64).bfloat16() for _ in range(3))
    kept = LayerKV(*(torch.randn(1, 600, 2, 64).bfloat16() for _ in range(2)))
    together = attend(q, k, v, references=kept, kernel=kernel)
    alone = attend(q[1:], k[1:], v[1:], references=kept, kernel=kernel)
    assert torch.equal(together[1:], alone)
    assert torch.equal(attend(q[:, 1050:], k, v, references=kept, kernel=kernel), together[:, 1050:])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(attend(q, k, v, references=kept, kernel=kernel), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("kernel", sorted(CPU_KERNELS))
def test_quantized_references_are_their_widened_values(kernel: str, kind: str) -> None:
    skip_without(kernel, torch.bfloat16, 32)
    q, k, v = (torch.randn(2, 70, 3, 32).bfloat16() for _ in range(3))
    narrow = quantize_layer(LayerKV(*(torch.randn(1, 133, 3, 32).bfloat16() * 2 for _ in range(2))), kind)
    expected = attend(q, k, v, references=narrow.dense(torch.bfloat16), kernel=kernel)
    assert torch.equal(attend(q, k, v, references=narrow, kernel=kernel), expected)


@in_c
def test_kernels_in_c_take_extreme_scores(kernel: str) -> None:
    """One key far above the rest, scores that would overflow without their maximum, and equal ones."""
    dim = 16 if kernel == "native" else 32
    q = torch.full((1, 3, 1, dim), 90.0).bfloat16()
    k = torch.randn(1, 700, 1, dim).bfloat16() * 40
    v = torch.randn(1, 700, 1, dim).bfloat16()
    found = attend(q, k, v, kernel=kernel)
    assert torch.isfinite(found).all()
    assert relative_error(found, truth(q, k, v, k[:, :0], v[:, :0])) <= 4e-3
    much = (100, 30) if kernel == "native" else (1000, 3000)
    huge = attend(q * much[0], k * much[1], v, kernel=kernel)
    assert relative_error(huge, truth(q * much[0], k * much[1], v, k[:, :0], v[:, :0])) <= 4e-3
    flat = attend(torch.zeros_like(q), k, v, kernel=kernel)
    assert relative_error(flat[:, :1], v.double().mean(1, keepdim=True)) <= 4e-3
    q[0, 1, 0, 3] = torch.nan  # stays with its query
    broken = attend(q, k, v, kernel=kernel)
    assert broken[0, 1].isnan().all()
    assert torch.equal(broken[:, ::2], found[:, ::2])


@has_native
def test_kernels_in_c_are_chosen_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "takes", lambda *_: False)
    choose, cpu = choose_kernel.__wrapped__, torch.device("cpu")
    monkeypatch.setattr("limner.model.attention._has_amx", lambda: False)
    assert choose(cpu, torch.bfloat16, 128) == "native"
    assert choose(cpu, torch.float32, 128) != "native"
    assert choose(cpu, torch.bfloat16, 24) != "native"
    monkeypatch.setattr("limner.model.attention._has_amx", lambda: True)
    assert choose(cpu, torch.bfloat16, 128) == "flash"
    monkeypatch.setattr(tiles, "takes", lambda device, dtype, dim: dtype == torch.bfloat16 and dim == 128)
    assert choose(cpu, torch.bfloat16, 128) == "tiles"
    assert choose(cpu, torch.float32, 128).startswith("chunked")


@pytest.mark.parametrize("setting", [{"LIMNER_NATIVE": "0"}, {"CC": "/nowhere/cc"}, {"CC": "gcc '"}])
def test_works_without_the_native_kernel(setting: dict[str, str], tmp_path: Path) -> None:
    """Turned off, or with a compiler that is not there: another kernel, and an error that says so if it is asked for."""
    code = (
        "import torch; from limner.model.attention import attend, choose_kernel\n"
        "from limner.errors import InvalidRequest\n"
        "x = torch.randn(1, 9, 2, 16).bfloat16(); attend(x, x, x)\n"
        "print(choose_kernel(x.device, x.dtype, 16))\n"
        "try: attend(x, x, x, kernel='native')\n"
        "except InvalidRequest as error: print(error.field)"
    )
    environment = {"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(tmp_path), **setting}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    chosen, field = done.stdout.split()
    assert chosen in ("chunked", "chunked_float32", "flash")
    assert field == "kernel"


@has_native
@pytest.mark.parametrize("fault", ["open", "empty", "unwritable"])
def test_the_cache_of_built_kernels_is_not_trusted_blindly(fault: str, tmp_path: Path) -> None:
    """A folder that others can write, a library that was cut short, no folder at all: built again, and it runs."""
    folder = tmp_path / "limner"
    folder.mkdir()
    code = (
        "import torch; from limner.native.kernels import native_library\n"
        "from limner.native import kernels\n"
        "print(kernels.takes(torch.device('cpu'), torch.bfloat16, 16), native_library()._name)"
    )

    def run(home: Path) -> list[str]:
        environment = {"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(home)}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    if fault == "unwritable":
        (tmp_path / "file").touch()
        chosen, path = run(tmp_path / "file")
    elif fault == "open":
        folder.chmod(0o777)
        chosen, path = run(tmp_path)
        assert not list(folder.iterdir())
    else:
        (made,) = [path for _, path in [run(tmp_path)]]
        Path(made).write_bytes(b"")
        chosen, path = run(tmp_path)
        assert path == made
    assert chosen == "True"
    assert Path(path).parent == folder or fault != "empty"


def test_native_refuses_what_it_cannot_do() -> None:
    x = torch.randn(1, 4, 1, 16)
    with pytest.raises(InvalidRequest, match="bfloat16"):
        attend(x, x, x, kernel="native")
    with pytest.raises(InvalidRequest, match="meta"):
        attend(x.to("meta"), x.to("meta"), x.to("meta"), kernel="native")


def test_kernels_of_gpus_are_refused_on_a_cpu() -> None:
    x = torch.randn(1, 4, 1, 16)
    for name in ("cudnn", "efficient", "flash3", "triton"):
        with pytest.raises(InvalidRequest, match=f"kernel: '{name}' does not run on"):
            attend(x, x, x, kernel=name)


@in_c
def test_kernels_in_c_check_what_they_are_given(kernel: str) -> None:
    q, k, v = (torch.randn(2, 5, 4, 32).bfloat16() for _ in range(3))
    for wrong in ((k[:, :, :2], v), (k, v[:, :4]), (k.float(), v)):
        with pytest.raises(ValueError, match="do not fit"):
            attend(q, *wrong, kernel=kernel)
    with pytest.raises(ValueError, match="do not fit"):
        attend(q, k, v, references=LayerKV(*(torch.randn(3, 5, 4, 32) for _ in range(2))), kernel=kernel)
    wide = LayerKV(*(torch.randn(1, 5, 4, 32).double() for _ in range(2)))  # rounded to the dtype of the queries
    narrow = LayerKV(*(x.bfloat16() for x in wide))
    found = [attend(q, k, v, references=kept, kernel=kernel) for kept in (wide, narrow)]
    assert torch.equal(*found)


@in_c
@pytest.mark.parametrize("which", ["q", "k", "v", "reference"])
@pytest.mark.parametrize("num", [6, 7, 8])
def test_kernels_in_c_hand_nan_on(which: str, num: int, kernel: str) -> None:
    """A broken weight has to show in the picture's check, not to vanish in a maximum."""
    q, k, v = (torch.randn(1, num, 1, 32).bfloat16() for _ in range(3))
    kept = LayerKV(*(torch.randn(1, 9, 1, 32).bfloat16() for _ in range(2)))
    {"q": q, "k": k, "v": v, "reference": kept.k}[which][0, 2, 0, 3] = float("nan")
    found = attend(q, k, v, references=kept, kernel=kernel)
    assert found[0, 2].isnan().any()
    if which == "reference":
        assert found.isnan().any(-1).all()


@in_c
def test_nothing_to_attend(kernel: str) -> None:
    """No queries, and no keys: nothing, and zeros."""
    q, k = torch.randn(1, 5, 2, 32).bfloat16(), torch.randn(1, 0, 2, 32).bfloat16()
    assert attend(q[:, :0], q, q, kernel=kernel).shape == (1, 0, 2, 32)
    assert torch.equal(attend(q, k, k, kernel=kernel), torch.zeros_like(q))


@pytest.mark.parametrize("which", range(5))
def test_each_input_alone_gets_its_gradient(which: int) -> None:
    inputs = [torch.randn(1, n, 2, 16).bfloat16() for n in (4, 4, 4, 6, 6)]
    inputs[which].requires_grad_()
    q, k, v, *kept = inputs
    attend(q, k, v, references=LayerKV(*kept)).float().square().sum().backward()
    gradient = inputs[which].grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    with pytest.raises(InvalidRequest):
        attend(q, k, v, references=LayerKV(*kept), kernel="native")


# weights of keys


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("kernel", sorted(CPU_KERNELS))
def test_weights_multiply_the_terms_of_keys(kernel: str, dtype: torch.dtype, quantized: bool) -> None:
    """Against the formula; 1 changes no bit; 0 is as if the keys were not there."""
    skip_without(kernel, dtype, 32)
    q, k, v = (torch.randn(2, 70, 3, 32).to(dtype) for _ in range(3))
    kept: LayerKV = LayerKV(*(torch.randn(1, 133, 3, 32).to(dtype) for _ in range(2)))
    references = quantize_layer(kept, "int8") if quantized else kept
    dense = references.dense(dtype)
    spans, own = ((50, 0.6), (60, 1.2), (23, 0.0)), ((30, 1.0), (40, 0.3))

    def run(**weights: Any) -> Tensor:
        return attend(q, k, v, references=references, weights=KeyWeights(**weights), kernel=kernel)

    limit = LIMITS[dtype] * (5 if (kernel, dtype) in (("chunked", torch.bfloat16), ("dense", torch.bfloat16)) else 2)
    weight = torch.tensor([w for num, w in (*spans, *own) for _ in range(num)]).double()
    keys, values = (torch.cat([r.expand(2, -1, -1, -1), x], 1).double() for r, x in zip(dense, (k, v), strict=True))
    terms = torch.einsum("bqhd,bkhd->bhqk", q.double(), keys).div(32**0.5).exp() * weight
    expected = torch.einsum("bhqk,bkhd->bqhd", terms / terms.sum(-1, keepdim=True), values)
    assert relative_error(run(cached=spans, own=own), expected) <= limit
    plain = attend(q, k, v, references=references, kernel=kernel)
    assert relative_error(plain, expected) > 10 * limit
    assert torch.equal(run(cached=((50, 1.0), (83, 1.0))), plain)
    without = attend(q, k, v, kernel=kernel)
    assert torch.equal(run(cached=((50, 0.0), (83, 0.0))), without)
    with pytest.raises(ValueError, match="weights are of 7 keys, there are 133"):
        run(cached=((7, 1.0),))
