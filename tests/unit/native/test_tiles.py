"""Products with AMX tiles against float64: shapes on both sides of every block, parts of larger tensors, extremes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.native import has_tiles
from tests.support.tiny import relative_error
from torch import Tensor

from limner.memory.components import tile_space
from limner.native import tiles

pytestmark = has_tiles

BFLOAT16 = 2**-8
"""Half a step of bfloat16, which has 8 bits, of a value: results are rounded once."""
FLOAT32 = 2**-22
"""A sum is rounded to float32, then multiplied by two scales: three roundings of 2^-24."""


def made(rows: int, width: int, features: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activations and their scales, weights and theirs."""
    x = torch.randint(0, 256, (rows, width), dtype=torch.uint8)
    weight = torch.randint(-128, 128, (features, width), dtype=torch.int8)
    return x, torch.rand(rows, 1) * 1e-3 + 1e-4, weight, torch.rand(features) * 1e-2 + 1e-3


def exact(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    return (x.double() - 128) @ weight.double().t() * x_scale.double() * weight_scale.double()


def product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, **how: Any) -> Tensor:
    return tiles.product(x, weight, scales=(x_scale, weight_scale), **how)


def largest(found: Tensor, expected: Tensor) -> float:
    """The largest error of a value relative to that value."""
    return float(((found.double() - expected).abs() / expected.abs().clamp(min=1e-30)).max())


@pytest.mark.parametrize("rows", [1, 5, 16, 33, 400, 1537])
@pytest.mark.parametrize("width", [64, 704])
@pytest.mark.parametrize("features", [32, 96, 448, 832])
def test_products(rows: int, width: int, features: int) -> None:
    given = made(rows, width, features)
    expected = exact(*given)
    wide = product(*given, dtype=torch.float32)
    narrow = product(*given, dtype=torch.bfloat16)
    assert (wide.shape, wide.dtype) == ((rows, features), torch.float32)
    assert largest(wide, expected) <= FLOAT32
    assert torch.equal(narrow, wide.bfloat16())  # rounded once, to the nearest


@pytest.mark.parametrize(("rows", "width", "features"), [(1, 64, 64), (33, 704, 448), (400, 64, 832), (1537, 128, 384)])
def test_gated_products(rows: int, width: int, features: int) -> None:
    """Into a part of longer rows: what lies beside it is as it was."""
    x, x_scale, weight, weight_scale = made(rows, width, features)
    gate, value = exact(x, x_scale, weight, weight_scale).chunk(2, dim=-1)
    expected = F.silu(gate) * value
    place = torch.full((rows, features // 2 + 40), 7.0).bfloat16()
    out = place[:, 8 : 8 + features // 2]
    found = product(x, x_scale, weight, weight_scale, dtype=torch.bfloat16, gated=True, out=out)
    assert found is out
    assert relative_error(out, expected) <= BFLOAT16
    assert largest(out, expected) <= 1.01 * BFLOAT16
    assert (place[:, :8] == 7).all()
    assert (place[:, 8 + features // 2 :] == 7).all()
    fresh = product(x, x_scale, weight, weight_scale, dtype=torch.bfloat16, gated=True)
    assert torch.equal(fresh, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_larger_tensors(dtype: torch.dtype) -> None:
    """Rows and columns of a larger weight, of longer activations, into a part of longer rows: the same bits as of copies."""
    x, x_scale, weight, weight_scale = made(70, 320, 256)
    parts: list[Any] = [x[3:53, 64:256], x_scale[3:53], weight[17:113, 100:292], weight_scale[17:113]]
    place = torch.zeros(50, 200, dtype=dtype)
    expected = product(*(part.clone() for part in parts), dtype=dtype)
    assert torch.equal(product(*parts, dtype=dtype, out=place[:, 33:129]), expected)
    assert torch.equal(place[:, 33:129], expected)
    assert place[:, :33].count_nonzero() == place[:, 129:].count_nonzero() == 0
    # features that are not side by side, as of a transposed matrix, are copied
    parts[2] = parts[2].t().contiguous().t()
    assert torch.equal(product(*parts, dtype=dtype), expected)


@pytest.mark.parametrize(("rows", "features"), [(5, 32), (1537, 96), (800, 832)])
def test_threads_change_no_bit(rows: int, features: int) -> None:
    given = made(rows, 192, features)
    threads, found = torch.get_num_threads(), []
    try:
        for num in (1, 2, 3):
            torch.set_num_threads(num)
            gated = product(*given, dtype=torch.bfloat16, gated=True) if features % 64 == 0 else torch.zeros(1)
            found.append((product(*given, dtype=torch.float32), gated))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for one in found[1:] for a, b in zip(one, found[0], strict=True))


def test_a_row_does_not_depend_on_others() -> None:
    """What is not a number stays in its row; a row alone has the bits that it has among others."""
    x, x_scale, weight, weight_scale = made(40, 128, 64)
    clean = product(x, x_scale, weight, weight_scale, dtype=torch.float32)
    alone = product(x[35:36], x_scale[35:36], weight, weight_scale, dtype=torch.float32)
    assert torch.equal(alone, clean[35:36])
    x_scale[17] = float("nan")
    for gated in (False, True):
        found = product(x, x_scale, weight, weight_scale, dtype=torch.bfloat16, gated=gated)
        assert found.isnan().all(1).tolist() == [i == 17 for i in range(40)]
        assert found.isnan().any(1).tolist() == [i == 17 for i in range(40)]


def test_extreme_values() -> None:
    """Sums are exact in 32 bits at the ends of both ranges, and float32 rounds them once."""
    width = 4096
    one = torch.ones(1)
    for activation, value in ((255, -128), (255, -127), (0, -128), (1, 127), (128, 127)):
        x = torch.full((17, width), activation, dtype=torch.uint8)
        weight = torch.full((32, width), value, dtype=torch.int8)
        found = product(x, one.expand(17)[:, None], weight, one.expand(32), dtype=torch.float32)
        assert (found == float((activation - 128) * value * width)).all()
    # the gate far out on either side: all of its value, or next to nothing
    x, weight = torch.full((4, 64), 255, dtype=torch.uint8), torch.full((64, 64), 127, dtype=torch.int8)
    weight[1:32:2] = -127
    found = product(x, one.expand(4)[:, None], weight, one.expand(64), dtype=torch.bfloat16, gated=True)
    assert (found[:, 1::2].abs() < 1e-20).all()
    assert (found[:, ::2] == torch.tensor((127.0 * 127 * 64) ** 2).bfloat16()).all()


def test_the_widest_sums() -> None:
    """The widest row that is taken: its sum is within 32 bits."""
    width = (1 << 17) - 64
    assert tiles.fits(32, width)
    assert not tiles.fits(32, width + 64)
    x, weight = torch.zeros(1, width, dtype=torch.uint8), torch.full((32, width), -128, dtype=torch.int8)
    found = product(x, torch.ones(1, 1), weight, torch.ones(32), dtype=torch.float32)
    assert (found == 128.0 * 128 * width).all()


def test_no_rows() -> None:
    x, x_scale, weight, weight_scale = made(0, 64, 64)
    for gated, num in ((False, 64), (True, 32)):
        found = product(x, x_scale, weight, weight_scale, dtype=torch.bfloat16, gated=gated)
        assert found.shape == (0, num)


def test_products_of_torch_in_between() -> None:
    """oneDNN's products use the same tiles, in other shapes."""
    given, dense = made(64, 256, 128), torch.randn(64, 200).bfloat16()
    expected, square = product(*given, dtype=torch.float32), dense @ dense.t()
    for _ in range(3):
        assert torch.equal(product(*given, dtype=torch.float32), expected)
        assert torch.equal(dense @ dense.t(), square)


@pytest.mark.parametrize(("rows", "width", "threads"), [(1, 64, 1), (33, 704, 2), (1537, 12288, 16), (900, 20480, 2)])
def test_working_space_is_that_of_the_plan(rows: int, width: int, threads: int) -> None:
    library = tiles._library.loaded
    assert library is not None
    assert library.limner_tiles_space(rows, width, False, threads) == tile_space(rows, width, threads=threads)
    assert library.limner_tiles_space(rows, 2 * width, True, threads) == tile_space(
        rows, width, threads=threads, itemsize=2
    )


def _wrong(name: str) -> tuple[list[Tensor], dict[str, Any]]:
    x, x_scale, weight, weight_scale = made(4, 64, 64)
    how: dict[str, Any] = {"dtype": torch.bfloat16}
    if name == "signed activations":
        x = x.to(torch.int8)
    elif name == "scales of other rows":
        x_scale = x_scale[:3]
    elif name == "scales of other features":
        weight_scale = weight_scale[:32]
    elif name == "another width":
        weight = weight[:, :32]
    elif name == "width":
        x, weight = x[:, :32], weight[:, :32]
    elif name == "features":
        weight, weight_scale = weight[:48], weight_scale[:48]
    elif name == "features of a gate":
        weight, weight_scale, how["gated"] = weight[:32], weight_scale[:32], True
    elif name == "wide weights":
        weight = weight.float()
    elif name == "dtype":
        how["dtype"] = torch.float16
    elif name == "a gate in float32":
        how |= {"dtype": torch.float32, "gated": True}
    elif name == "shape of the place":
        how["out"] = torch.empty(4, 32).bfloat16()
    elif name == "dtype of the place":
        how["out"] = torch.empty(4, 64)
    elif name == "columns apart":
        how["out"] = torch.empty(64, 4).bfloat16().t()
    elif name == "one row for all":
        how["out"] = torch.empty(64).bfloat16().expand(4, 64)
    elif name == "no memory":
        x_scale = x_scale.to("meta")
    return [x, x_scale, weight, weight_scale], how


@pytest.mark.parametrize(
    "name",
    [
        "signed activations",
        "scales of other rows",
        "scales of other features",
        "another width",
        "width",
        "features",
        "features of a gate",
        "wide weights",
        "dtype",
        "a gate in float32",
        "shape of the place",
        "dtype of the place",
        "columns apart",
        "one row for all",
        "no memory",
    ],
)
def test_refused(name: str) -> None:
    given, how = _wrong(name)
    with pytest.raises(ValueError, match="are not for this product"):
        product(*given, **how)


def halves(rows: int, width: int, features: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, width).bfloat16(), (torch.randn(features, width) / width**0.5).bfloat16()


@pytest.mark.parametrize(
    ("rows", "width", "features"),
    [(1, 64, 32), (33, 704, 288), (400, 704, 832), (1537, 64, 832), (1537, 704, 32), (900, 16384, 64)],
)
def test_products_in_bfloat16(rows: int, width: int, features: int) -> None:
    x, weight = halves(rows, width, features)
    expected = x.double() @ weight.double().t()
    wide, narrow = tiles.product(x, weight, dtype=torch.float32), tiles.product(x, weight)
    assert relative_error(wide, expected) < 1e-6  # sums in float32
    assert torch.equal(narrow, wide.bfloat16())  # rounded once, to the nearest


@pytest.mark.parametrize(("rows", "width", "features"), [(1, 64, 64), (33, 704, 320), (400, 64, 832), (1537, 128, 384)])
def test_gated_products_in_bfloat16(rows: int, width: int, features: int) -> None:
    """Into a part of longer rows; what is rounded is the result alone, not gate and value."""
    x, weight = halves(rows, width, features)
    gate, value = (x.double() @ weight.double().t()).chunk(2, dim=-1)
    expected, place = F.silu(gate) * value, torch.full((rows, features // 2 + 40), 7.0).bfloat16()
    found = tiles.product(x, weight, gated=True, out=place[:, 8 : 8 + features // 2])
    assert relative_error(found, expected) < 0.6 * BFLOAT16
    assert (place[:, :8] == 7).all()
    assert (place[:, 8 + features // 2 :] == 7).all()


def test_parts_in_bfloat16_and_threads() -> None:
    """Parts of larger tensors, a row among others or alone, one thread or three: the same bits."""
    x, weight = halves(1600, 320, 900)
    x_part, weight_part = x[3:1563, 64:256], weight[17:849, 100:292]
    expected = tiles.product(x_part.clone(), weight_part.clone(), dtype=torch.float32)
    threads, place = torch.get_num_threads(), torch.zeros(1560, 900)
    try:
        for num in (1, 3):
            torch.set_num_threads(num)
            assert torch.equal(tiles.product(x_part, weight_part, dtype=torch.float32, out=place[:, 8:840]), expected)
    finally:
        torch.set_num_threads(threads)
    assert place[:, :8].count_nonzero() == place[:, 840:].count_nonzero() == 0
    alone = tiles.product(x_part[700:701], weight_part[96:128], dtype=torch.float32)
    assert torch.equal(alone, expected[700:701, 96:128])
    x_part[17, 5] = float("nan")
    found = tiles.product(x_part, weight_part)
    assert found.isnan().any(1).nonzero().flatten().tolist() == [17]


@pytest.mark.parametrize("name", ["float32", "other weights", "float16", "width"])
def test_refused_in_bfloat16(name: str) -> None:
    x, weight = halves(4, 64, 64)
    if name == "float32":
        x, weight = x.float(), weight.float()
    elif name == "other weights":
        weight = weight.float()
    elif name == "float16":
        x, weight = x.half(), weight.half()
    else:
        weight = weight[:, :32]
    with pytest.raises(ValueError, match="are not for this product"):
        tiles.product(x, weight)
