"""The kernels compile for every card without one, spill no register, and fit into its shared memory.

`make test` compiles the largest attention kernels and all others for two cards; `make test-gpu-kernels` everything, and
prints a table for docs/log.md.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from limner.model.gpu.launch import tile_for

triton = pytest.importorskip("triton")

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that one block may have, by compute capability (CUDA C++ Programming Guide, table 30)."""
HALF, FLOAT = "*bf16", "*fp32"
FEW = (86, 90)
AMD = ("gfx90a", "gfx942", "gfx1100")


def attention(
    form: str, cap: int, *, even: bool, dim: int = 128
) -> tuple[str, dict[str, str], dict[str, Any], dict[str, int]]:
    """Name, types, constants and options of an attention kernel, as `attention_triton` launches it."""
    tile = tile_for((cap // 10, cap % 10), narrow=form != "plain")
    kept = {"plain": HALF, "int8": "*i8", "fp8": "*u8"}[form]
    types = dict.fromkeys(("q", "k_own", "v_own", "out"), HALF) | {"k_ref": kept, "v_ref": kept}
    types |= dict.fromkeys(("k_scale", "v_scale", "ref_bias", "own_bias"), FLOAT)
    fp8 = "" if form != "fp8" else "native" if cap >= 89 else "bits"
    flags = {"REFS": True, "SCALED": form != "plain", "FP8": fp8, "REF_BIASED": not even, "OWN_BIASED": False}
    constants = {"DIM": dim, "ROWS": tile.rows, "KEYS": tile.keys, "EVEN_REFS": even, "EVEN_OWN": even, "WIDE": False}
    return "attend", types, constants | flags, {"num_warps": tile.warps, "num_stages": tile.stages}


ROWS: list[tuple[str, dict[str, str], dict[str, Any], dict[str, int]]] = [
    (
        "norm_rope",
        dict.fromkeys(("q", "k", "v", "q_out", "k_out", "v_out", "q_weight", "k_weight"), HALF)
        | {"cos": FLOAT, "sin": FLOAT},
        {"DIM": 128, "HEADS": 8},
        {"num_warps": 4},
    ),
    ("modulated_norm", dict.fromkeys(("x", "shift", "scale", "out"), HALF), {"BLOCK": 4096}, {"num_warps": 8}),
    ("add_gated", dict.fromkeys(("x", "gate", "change", "out"), HALF), {"BLOCK": 1024}, {"num_warps": 4}),
    ("gate", dict.fromkeys(("x", "out"), HALF), {"BLOCK": 1024}, {"num_warps": 4}),
    ("quantize_int8", {"x": HALF, "values": "*i8", "scale": FLOAT}, {"BLOCK": 16384}, {"num_warps": 16}),
    ("quantize_fp8", {"x": HALF, "values": "*fp8e4nv", "scale": FLOAT}, {"BLOCK": 16384}, {"num_warps": 16}),
    (
        "scale_product",
        {"product": "*i32", "row_scale": FLOAT, "column_scale": FLOAT, "out": HALF},
        {"BLOCK": 1024},
        {"num_warps": 4},
    ),
    (
        "merge",
        dict.fromkeys(("first", "second", "out"), HALF) | dict.fromkeys(("first_lse", "second_lse", "out_lse"), FLOAT),
        {"DIM": 128, "ROWS": 16},
        {"num_warps": 4},
    ),
]


def compiled(
    name: str, types: dict[str, str], constants: dict[str, Any], options: dict[str, int], *, target: Any
) -> Any:
    """Compile a kernel as a launch with klein's sizes would: pointers and distances are multiples of 16."""
    from triton.compiler import ASTSource

    from limner.model.gpu import kernels

    kernel: Any = getattr(kernels, name)
    signature, hints = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        other = "fp32" if argument in ("eps", "factor") else "i32"
        signature[argument] = "constexpr" if argument in constants else types.get(argument, other)
        if argument in types or argument.endswith(("_row", "_head", "_image", "width")):
            hints[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    return triton.compile(source, target=target, options={**options, "enable_fp_fusion": True})


def registers_and_stack(made: Any) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack: spilled registers."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        done = subprocess.run([program, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+)", done.stdout)
    return int(found[0]), int(found[1])


def check(case: tuple[str, dict[str, str], dict[str, Any], dict[str, int]], cap: int) -> str:
    """Compile for a card; return a row of the table."""
    from triton.backends.compiler import GPUTarget

    made = compiled(*case, target=GPUTarget("cuda", cap, 32))
    registers, stack = registers_and_stack(made)
    assert stack == 0, f"{case[0]} on sm_{cap} spills {stack} bytes"
    assert made.metadata.shared <= SHARED[cap] << 10
    if case[0] == "attend":
        wanted = {9: "wgmma.mma_async", 10: "tcgen05.mma"}.get(cap // 10, "mma.sync")
        assert wanted in made.asm["ptx"]
    return f"| sm_{cap} | {case[0]} {case[2].get('FP8', '')} | {registers} | {made.metadata.shared} | {stack} |"


def exists_there(name: str, cap: int) -> bool:
    return name != "quantize_fp8" or cap >= 89  # before Ada there are no products in fp8


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


@pytest.mark.parametrize("cap", FEW)
def test_kernels_compile(cap: int) -> None:
    check(attention("int8", cap, even=False), cap)
    for case in ROWS:
        if exists_there(case[0], cap):
            check(case, cap)


EVERYTHING = pytest.mark.skipif(not os.environ.get("LIMNER_COMPILE"), reason="a minute; make test-gpu-kernels runs it")


@EVERYTHING
@pytest.mark.parametrize("cap", SHARED)
def test_everything_compiles(cap: int) -> None:
    for form in ("plain", "int8", "fp8"):
        for even in (True, False):
            print(check(attention(form, cap, even=even), cap), form, "even" if even else "odd, weights")
        check(attention(form, cap, even=False, dim=64), cap)
    for case in ROWS:
        if exists_there(case[0], cap):
            print(check(case, cap))


@EVERYTHING
@pytest.mark.parametrize("arch", AMD)
def test_everything_compiles_for_amd(arch: str) -> None:
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    for form in ("plain", "int8", "fp8"):
        made = compiled(*attention(form, 80, even=False), target=target)
        assert made.asm["hsaco"]
        assert made.metadata.shared <= 64 << 10
    for case in ROWS:
        if case[0] != "quantize_fp8":
            assert compiled(*case, target=target).asm["hsaco"]
