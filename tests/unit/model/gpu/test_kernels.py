"""Triton's kernels in its interpreter, against the formulas, in layouts that are views; then inside a whole transformer."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from tests.support.tiny import make_transformer, relative_error
from tests.support.triton_kernels import interpreted_kernels
from torch import Tensor, nn

from limner import InvalidRequest
from limner.config import TransformerConfig
from limner.model import rows
from limner.model.attention import KeyWeights, attend
from limner.model.gpu import attention_triton, fused, launch, products, with_lse
from limner.model.kv import AnyLayerKV, LayerKV, quantize_layer
from limner.model.rope import Rope
from limner.model.rows import FusedRows, Heads, Rows, rows_of
from limner.model.transformer import Transformer
from limner.tokens import image_ids, reference_ids, text_ids

pytest.importorskip("triton")
# float32: sums in another order. bfloat16: weights of the softmax are rounded to it, and the interpreter cuts instead
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    with torch.no_grad(), interpreted_kernels():
        yield


def views(*shape: int, dtype: torch.dtype, num: int) -> list[Tensor]:
    """Parts of one projection, as a single-stream block has them."""
    batch, rows, heads, dim = shape
    both = torch.randn(batch, rows, num * heads * dim + 8).to(dtype)
    return [both[..., i * heads * dim : (i + 1) * heads * dim].unflatten(-1, (heads, dim)) for i in range(num)]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("form", ["plain", "int8", "fp8"])
@pytest.mark.parametrize(("num", "refs", "batch", "ref_batch"), [(64, 64, 1, 1), (37, 70, 2, 1), (3, 1, 2, 2)])
def test_attention(dtype: torch.dtype, form: str, num: int, refs: int, batch: int, ref_batch: int) -> None:
    q, k, v = views(batch, num, 2, 32, dtype=dtype, num=3)
    plain = LayerKV(*views(ref_batch, refs, 2, 32, dtype=dtype, num=2))
    kept: AnyLayerKV = plain if form == "plain" else quantize_layer(plain, form)
    wide = LayerKV(*(x.double() for x in kept.dense(torch.float32)))
    exact = q.double(), k.double(), v.double()
    expected = attend(*exact, references=wide, kernel="dense")
    assert relative_error(attend(q, k, v, references=kept, kernel="triton"), expected) <= LIMITS[dtype]
    spans, own = ((refs, 0.4),), ((num - 1, 1.0), (1, 0.0))
    weights = KeyWeights(cached=spans, own=own)
    expected = attend(*exact, references=wide, weights=weights, kernel="dense")
    found = attend(q, k, v, references=kept, weights=weights, kernel="triton")
    assert relative_error(found, expected) <= 2 * LIMITS[dtype]
    place = torch.empty(batch, num, 90, dtype=dtype)[..., 10:74].unflatten(-1, (2, 32))
    attention_triton.attend(q, k, v, references=kept, out=place)
    assert torch.equal(place, attend(q, k, v, references=kept, kernel="triton"))


def test_attention_without_references_and_with_left_out_ones() -> None:
    q, k, v = views(1, 40, 2, 16, dtype=torch.float32, num=3)
    kept = LayerKV(*views(1, 70, 2, 16, dtype=torch.float32, num=2))
    alone = attend(q, k, v, kernel="triton")
    assert relative_error(alone, attend(q.double(), k.double(), v.double(), kernel="dense")) <= 1e-6
    left_out = attend(q, k, v, references=kept, weights=KeyWeights(cached=((70, 0.0),)), kernel="triton")
    assert relative_error(left_out, alone) <= 1e-6
    with pytest.raises(ValueError, match="weights are of 7 keys, there are 70"):
        attend(q, k, v, references=kept, weights=KeyWeights(cached=((7, 1.0),)), kernel="triton")
    kept.k[0, 3, 0, 1] = math.nan
    assert attend(q, k, v, references=kept, kernel="triton")[:, :, 0].isnan().all()


def test_tokens_that_lie_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets of over 2^31 values, as views of long sequences have them. Memory that is not touched is not taken."""
    memory = torch.empty((1 << 31) + 64, dtype=torch.float16)
    far = memory.as_strided((1, 3, 2, 16), (1 << 31, 1 << 30, 16, 1))
    x, k, v = views(1, 3, 2, 16, dtype=torch.float16, num=3)
    angle, weight = torch.randn(3, 8), torch.rand(16).half()
    rope, found = (angle.cos(), angle.sin()), torch.empty(1, 3, 2, 16).half()
    near = torch.empty_like(found)
    far.copy_(x)
    fused.norm_rope([far], [weight], [found], eps=1e-6, table=rope)
    fused.norm_rope([x], [weight], [near], eps=1e-6, table=rope)
    assert torch.equal(found, near)
    expected = attend(x, k, v, kernel="triton")
    assert torch.equal(attend(far, k, v, kernel="triton"), expected)
    copied: list[Tensor] = []
    readable = attention_triton._readable
    monkeypatch.setattr(attention_triton, "_readable", lambda t: copied.append(t) or readable(t))
    attention_triton.attend(far, k, v, out=far)
    assert torch.equal(far, expected)
    assert not any(t is far for t in copied)
    on_meta = torch.empty_strided((1, 3, 2, 16), (1 << 31, 1 << 30, 16, 1), device="meta")  # of keys: copied
    assert attention_triton._readable(on_meta).is_contiguous()
    assert attention_triton._readable(on_meta[:, :1]).stride(1) == 1 << 30


def test_attention_is_one_operator_of_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = views(1, 9, 2, 16, dtype=torch.float32, num=3)
    plain = LayerKV(*views(1, 7, 2, 16, dtype=torch.float32, num=2))
    kept = [None, plain, quantize_layer(plain, "int8")]
    expected = [attend(q, k, v, references=one, kernel="triton") for one in kept]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    called: list[int] = []
    operator = torch.ops.limner.attend
    monkeypatch.setattr(torch.ops.limner, "attend", lambda *args: (called.append(len(args[3])), operator(*args)))
    for one, result in zip(kept, expected, strict=True):
        assert torch.equal(attend(q, k, v, references=one, kernel="triton"), result)
    assert called == [2, 2, 4]


def test_attention_refuses_what_it_cannot_do() -> None:
    q, k, v = views(1, 4, 2, 48, dtype=torch.float32, num=3)
    with pytest.raises(InvalidRequest, match="heads of 16, 32, 64 or 128"):
        attend(q, k, v, kernel="triton")
    q, k, v = views(1, 4, 2, 16, dtype=torch.float32, num=3)
    for wrong in ((k[:, :, :1], v), (k, v[:, :3]), (k.bfloat16(), v.bfloat16())):
        with pytest.raises(ValueError, match="do not fit"):
            attend(q, *wrong, kernel="triton")
    with torch.enable_grad(), pytest.raises(InvalidRequest, match="records no gradients"):
        attend(q.requires_grad_(), k, v, kernel="triton")


@pytest.mark.parametrize(
    ("dtype", "heads", "dim"), [(torch.float32, 9, 16), (torch.bfloat16, 3, 64), (torch.float16, 3, 32)]
)
def test_rows(dtype: torch.dtype, heads: int, dim: int) -> None:
    """Every operation of a block is torch's in float32, rounded once; the interpreter cuts bfloat16, so by a whole step."""
    limit = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    ours, plain, width = FusedRows(), Rows(), heads * dim
    x = torch.randn(2, 2, width + 16)[..., 16:].to(dtype)  # rows of a longer sequence
    mlp = torch.randn(2, 2, 2 * width + 8)[..., : 2 * width].to(dtype) * 3

    def check(found: Tensor, expected: Tensor) -> None:
        assert found.dtype == dtype
        assert relative_error(found, expected) <= limit

    for mod in (torch.randn(3 * width).to(dtype), torch.randn(2, 1, 3 * width).to(dtype)):
        shift, scale, gate = mod.chunk(3, dim=-1)
        wide = shift.float(), scale.float()
        check(ours.norm(x, shift, scale, eps=1e-6), plain.norm(x.float(), *wide, eps=1e-6))
        check(ours.add(x, gate, mlp[..., :width]), plain.add(x.float(), gate.float(), mlp[..., :width].float()))
    check(ours.gated_silu(mlp), plain.gated_silu(mlp.float()))
    attended = x.unflatten(-1, (heads, dim))
    check(ours.join_gated(attended, mlp), plain.join_gated(attended.float(), mlp.float()))

    norms = [nn.RMSNorm(dim, eps=1e-6) for _ in range(4)]
    for norm in norms:
        norm.weight.normal_()
    angle = torch.randn(5, dim // 2)
    rope = Rope(angle.cos(), angle.sin())
    streams = [views(2, num, heads, dim, dtype=dtype, num=3) for num in (2, 3)]

    def streams_of(cast: torch.dtype) -> list[Heads]:
        return [
            Heads(q=q.to(cast), k=k.to(cast), v=v.to(cast), norm_q=norms[2 * i], norm_k=norms[2 * i + 1])
            for i, (q, k, v) in enumerate(streams)
        ]

    for num, table in ((2, rope), (1, rope.at(slice(2)))):
        found = ours.attention_input(streams_of(dtype)[:num], table)
        for one, expected in zip(found, plain.attention_input(streams_of(torch.float32)[:num], table), strict=True):
            check(one, expected)
    check(ours.norm_rope(streams[0][0], norms[0], table), plain.norm_rope(streams[0][0].float(), norms[0], table))


def test_rows_that_are_wrong_on_a_device_do_not_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(2, 16)
    monkeypatch.setattr(rows, "_right", {})
    assert type(rows_of(x)) is FusedRows
    monkeypatch.setattr(rows, "_right", {})
    monkeypatch.setattr(fused, "add_gated", lambda x, gate, change: x - gate * change)
    assert type(rows_of(x)) is Rows
    assert "fused rows on cpu: add is wrong here" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_rows_are_those_of_torch(dtype: torch.dtype) -> None:
    x = (torch.randn(3, 7, 88) * torch.logspace(-4, 4, 7)[:, None])[..., 8:].to(dtype)
    x[0, 0] = 0
    x[1, 2, 3] = math.nan
    for kind in (torch.int8, products.FP8):
        values, scale = products.quantize(x, kind)
        expected, expected_scale = products.quantize_plain(x, kind)
        whole = ~expected_scale[:, 0].isnan()
        assert scale[:, 0].isnan().tolist() == (~whole).tolist()
        assert (~whole).sum() == 1
        assert relative_error(scale[whole], expected_scale[whole]) <= 1e-7
        same = (values[whole].float() == expected[whole].float()).float().mean()
        # the interpreter's fp8 takes a tie away from zero, and loses the carry into the exponent
        assert same >= (1 if kind == torch.int8 else 0.9)


def test_a_product_is_scaled_in_one_pass() -> None:
    values, scale = products.quantize(torch.randn(40, 64), torch.int8)
    weight, weight_scale = torch.randint(-127, 128, (24, 64), dtype=torch.int8), torch.rand(24)
    expected = (values.double() * scale) @ (weight.double() * weight_scale[:, None]).t()
    found = products.int8_product(values, scale, weight, weight_scale, dtype=torch.float32)
    assert relative_error(found, expected) <= 1e-7


@pytest.mark.parametrize("batch", [1, 2])
def test_merged_parts_are_attention_over_both(batch: int) -> None:
    q, k, v = views(batch, 9, 2, 16, dtype=torch.float32, num=3)
    kept = LayerKV(*views(1, 21, 2, 16, dtype=torch.float32, num=2))
    weights = KeyWeights(cached=((10, 0.3), (11, 1.0)))
    expected = attend(
        q.double(), k.double(), v.double(), references=LayerKV(*(x.double() for x in kept)), weights=weights
    )
    called: list[str] = []
    launched = launch.launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fused, "launch", lambda name, *args, **options: (called.append(name), launched(name, *args, **options))
        )
        found = attend(q, k, v, references=kept, weights=weights, kernel="flash")
    assert called == ["merge", "merge"]
    assert relative_error(found, expected) <= 1e-6
    assert set(with_lse.CALLS) >= {"flash", "flash3", "flash4", "cudnn", "efficient"}


@pytest.mark.parametrize(("dtype", "form"), [(torch.float32, None), (torch.bfloat16, "int8")])
def test_a_whole_transformer(dtype: torch.dtype, form: str | None) -> None:
    """Prefill and velocity with every kernel at once, beside the path of a CPU."""
    theirs = make_transformer(double=1, single=2)
    model = Transformer(TransformerConfig.from_diffusers(theirs.config))
    model.load_state_dict(theirs.state_dict())
    model = model.to(dtype)
    img, txt, ref = (torch.randn(*shape).to(dtype) for shape in ((2, 4, 16), (2, 2, 48), (1, 3, 16)))
    places = {"img_ids": image_ids((2, 2)), "txt_ids": text_ids(2), "ref_weights": ((1, 0.5), (2, 1.0))}
    ref_ids = reference_ids([(1, 1), (1, 2)])
    found: list[list[Tensor]] = []
    for fusing in (True, False):
        assert type(rows_of(img)) is FusedRows
        with pytest.MonkeyPatch.context() as patch:
            if not fusing:
                patch.setattr(launch, "_interpreted", False)
                assert type(rows_of(img)) is not FusedRows
            model.kernel = "triton" if fusing else "dense"
            kept = model.prefill(ref, ref_ids, quantization=form)
            velocity = model(img, txt, torch.tensor([0.7, 0.2]), **places, references=kept)
            found.append([velocity, *(layer.k.float() for layer in kept.kv)])
    for ours, expected in zip(*found, strict=True):
        # a value between two steps of the format may go to the other one
        limit = 2e-6 if dtype == torch.float32 else 5e-2
        assert relative_error(ours, expected) <= (limit if form is None else max(limit, 2e-3))
