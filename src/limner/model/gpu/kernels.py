"""Kernels in Triton: the arithmetic of blocks on a GPU. `limner.model.gpu.launch` alone imports this file and Triton.

Shapes: B batch, S sequence of queries, R reference keys, T own keys, H heads, D head dimension, C width, N outputs. Every
tensor has its last axis contiguous; distances of the other axes are arguments, in values: `*_image` of one image to the
next, `*_row` of tokens, `*_head` of heads. A program is one block of rows. All arithmetic is in float32 and rounds once.

`WIDE` casts the operands of a matrix product to float32: Triton's interpreter multiplies bfloat16 wrongly. Functions that
take it are right with it and without; on a GPU it is False.
"""

import triton
import triton.language as tl

__all__ = [
    "add_gated",
    "attend",
    "gate",
    "merge",
    "modulated_norm",
    "norm_rope",
    "quantize_fp8",
    "quantize_int8",
    "scale_product",
]


@triton.jit
def _wide_e4m3(bits):
    """fp8 (E4M3) as bytes to float32 where the card cannot: the exponent's bias is 7 there and 127 here."""
    wide = bits.to(tl.uint32)
    value = (((wide & 0x80) << 24) | ((wide & 0x7F) << 20)).to(tl.float32, bitcast=True)
    return value * 1.329227995784916e36  # 2^120


@triton.jit
def _attend_part(
    q,
    acc,
    total,
    top,
    k,
    v,
    k_scale,
    v_scale,
    bias,
    num,
    k_row,
    v_row,
    scale_row,
    factor,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    EVEN: tl.constexpr,
    SCALED: tl.constexpr,
    FP8: tl.constexpr,
    BIASED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One pass over `num` keys: the running sum of values, of weights, and the running maximum, in powers of 2.

    Offsets of keys are 32 bits wide: `limner.model.gpu.attention_triton` copies what reaches further.
    """
    column = tl.arange(0, DIM)
    for start in range(0, num, KEYS):
        row = start + tl.arange(0, KEYS)
        if EVEN:
            keys = tl.load(k + row[None, :] * k_row + column[:, None])
        else:
            keys = tl.load(k + row[None, :] * k_row + column[:, None], mask=row[None, :] < num, other=0)
        if FP8 == "bits":
            keys = _wide_e4m3(keys)
        elif FP8 == "native":
            keys = keys.to(tl.float8e4nv, bitcast=True)
        if WIDE:  # noqa: SIM108
            scores = tl.dot(q.to(tl.float32), keys.to(tl.float32)) * factor
        else:
            scores = tl.dot(q, keys.to(q.dtype)) * factor
        if SCALED:
            scores = scores * tl.load(k_scale + row * scale_row, mask=row < num, other=0.0)[None, :]
        if BIASED:
            scores = scores + tl.load(bias + row, mask=row < num, other=0.0)[None, :]
        if not EVEN:
            scores = tl.where(row[None, :] < num, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        if SCALED:
            weights = weights * tl.load(v_scale + row * scale_row, mask=row < num, other=0.0)[None, :]
        if EVEN:
            values = tl.load(v + row[:, None] * v_row + column[None, :])
        else:
            values = tl.load(v + row[:, None] * v_row + column[None, :], mask=row[:, None] < num, other=0)
        if FP8 == "bits":
            values = _wide_e4m3(values)
        elif FP8 == "native":
            values = values.to(tl.float8e4nv, bitcast=True)
        if WIDE:
            acc += tl.dot(weights.to(q.dtype).to(tl.float32), values.to(tl.float32))
        else:
            acc = tl.dot(weights.to(q.dtype), values.to(q.dtype), acc)
        top = higher
    return acc, total, top


# fmt: off
@triton.jit
def attend(
    q, k_ref, v_ref, k_scale, v_scale, ref_bias, k_own, v_own, own_bias, out,
    num_q, num_ref, num_own, heads,
    q_image, q_row, q_head,
    kr_image, kr_row, kr_head, vr_image, vr_row, vr_head, scale_image, scale_row,
    ko_image, ko_row, ko_head, vo_image, vo_row, vo_head,
    out_image, out_row, out_head,
    factor,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    REFS: tl.constexpr,
    SCALED: tl.constexpr,
    FP8: tl.constexpr,
    REF_BIASED: tl.constexpr,
    OWN_BIASED: tl.constexpr,
    EVEN_REFS: tl.constexpr,
    EVEN_OWN: tl.constexpr,
    WIDE: tl.constexpr,
):
    # fmt: on
    """softmax(q [k_ref | k_own]^T / sqrt(D)) [v_ref | v_own] in one pass; `factor` is log2(e) / sqrt(D).

    Nothing is joined before and nothing merged after. References may be int8 or fp8 with a scale for each key and head,
    applied to scores and weights; fp8 comes as bytes, and `FP8` says how to read them. Biases are powers of 2, added to the
    scores of keys; -inf leaves a key out.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    image = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    column = tl.arange(0, DIM)
    here = row[:, None] < num_q
    far = row[:, None].to(tl.int64)
    query = tl.load(q + image * q_image + head * q_head + far * q_row + column[None, :], mask=here, other=0.0)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), -1e30, tl.float32)  # finite: keys that are left out at the start have the weight 0, not NaN
    if REFS:
        acc, total, top = _attend_part(
            query,
            acc,
            total,
            top,
            k_ref + image * kr_image + head * kr_head,
            v_ref + image * vr_image + head * vr_head,
            k_scale + image * scale_image + head,
            v_scale + image * scale_image + head,
            ref_bias,
            num_ref,
            kr_row,
            vr_row,
            scale_row,
            factor,
            DIM,
            KEYS,
            EVEN_REFS,
            SCALED,
            FP8,
            REF_BIASED,
            WIDE,
        )
    acc, total, top = _attend_part(
        query,
        acc,
        total,
        top,
        k_own + image * ko_image + head * ko_head,
        v_own + image * vo_image + head * vo_head,
        k_scale,
        v_scale,
        own_bias,
        num_own,
        ko_row,
        vo_row,
        scale_row,
        factor,
        DIM,
        KEYS,
        EVEN_OWN,
        False,
        "",
        OWN_BIASED,
        WIDE,
    )
    place = out + image * out_image + head * out_head + far * out_row + column[None, :]
    tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask=here)


@triton.jit
def merge(first, first_lse, second, second_lse, out, out_lse, num, DIM: tl.constexpr, ROWS: tl.constexpr):
    """Two results of attention over different keys to the result over both, by their log-sum-exp.

    Rows are (B S H) of `DIM` values, all contiguous, log-sum-exps one float32 a row.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < num
    place = row[:, None] * DIM + tl.arange(0, DIM)[None, :]
    one = tl.load(first_lse + row, mask=here, other=0.0)
    two = tl.load(second_lse + row, mask=here, other=0.0)
    share = 1 / (1 + tl.exp(one - two))
    left = tl.load(first + place, mask=here[:, None], other=0.0).to(tl.float32)
    right = tl.load(second + place, mask=here[:, None], other=0.0).to(tl.float32)
    both = left + share[:, None] * (right - left)
    tl.store(out + place, both.to(out.dtype.element_ty), mask=here[:, None])
    top = tl.maximum(one, two)
    tl.store(out_lse + row, top + tl.log(tl.exp(one - top) + tl.exp(two - top)), mask=here)


@triton.jit
def _norm_rope_heads(x, out, weight, cos, sin, here, place, eps, DIM: tl.constexpr, HEADS: tl.constexpr):
    values = tl.load(x + place, mask=here, other=0.0).to(tl.float32)
    values = values * (1 / tl.sqrt(tl.sum(values * values, 1) / DIM + eps))[:, None]
    values = values * tl.load(weight + tl.arange(0, DIM)).to(tl.float32)[None, :]
    even, odd = tl.split(tl.reshape(values, (HEADS, DIM // 2, 2)))
    pair = tl.arange(0, DIM // 2)
    c = tl.load(cos + pair)[None, :]
    s = tl.load(sin + pair)[None, :]
    turned = tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (HEADS, DIM))
    tl.store(out + place, turned.to(out.dtype.element_ty), mask=here)


@triton.jit
def norm_rope(
    q,
    k,
    v,
    q_out,
    k_out,
    v_out,
    q_weight,
    k_weight,
    cos,
    sin,
    num,
    heads,
    q_image,
    q_row,
    k_image,
    k_row,
    v_image,
    v_row,
    out_image,
    out_row,
    eps,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
):
    """RMSNorm of each head of q and k, then rotation of neighbouring pairs; v as it is: where attention reads them.

    Heads lie one after the other. The programs are (B S, blocks of heads, which of q, k and v); without the last of them
    v is not copied. `q_out`, `k_out` and `v_out` may be a part of longer sequences.
    """
    image = (tl.program_id(0) // num).to(tl.int64)
    token = (tl.program_id(0) % num).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    here = (head < heads)[:, None]
    place = head[:, None] * DIM + tl.arange(0, DIM)[None, :]
    to = image * out_image + token * out_row
    cos += token * (DIM // 2)
    sin += token * (DIM // 2)
    which = tl.program_id(2)
    if which == 0:
        _norm_rope_heads(
            q + image * q_image + token * q_row, q_out + to, q_weight, cos, sin, here, place, eps, DIM, HEADS
        )
    elif which == 1:
        _norm_rope_heads(
            k + image * k_image + token * k_row, k_out + to, k_weight, cos, sin, here, place, eps, DIM, HEADS
        )
    else:
        tl.store(v_out + to + place, tl.load(v + image * v_image + token * v_row + place, mask=here), mask=here)


@triton.jit
def modulated_norm(x, shift, scale, out, num, width, x_row, mod_image, eps, BLOCK: tl.constexpr):
    """LayerNorm(x) (1 + scale) + shift of a row into a contiguous one; `mod_image` is 0 for a shared modulation."""
    row = tl.program_id(0).to(tl.int64)
    image = row // num
    column = tl.arange(0, BLOCK)
    here = column < width
    values = tl.load(x + row * x_row + column, mask=here, other=0.0).to(tl.float32)
    values = tl.where(here, values - tl.sum(values, 0) / width, 0.0)
    values = values * (1 / tl.sqrt(tl.sum(values * values, 0) / width + eps))
    more = tl.load(scale + image * mod_image + column, mask=here, other=0.0).to(tl.float32)
    plus = tl.load(shift + image * mod_image + column, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (values * (1 + more) + plus).to(out.dtype.element_ty), mask=here)


@triton.jit
def add_gated(x, gate, change, out, num, width, x_row, change_row, gate_image, BLOCK: tl.constexpr):
    """x + gate * change, row by row; `gate_image` is 0 if the batch shares the gate. `out` is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    old = tl.load(x + row * x_row + column, mask=here, other=0.0).to(tl.float32)
    new = tl.load(change + row * change_row + column, mask=here, other=0.0).to(tl.float32)
    by = tl.load(gate + (row // num) * gate_image + column, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (old + by * new).to(out.dtype.element_ty), mask=here)


@triton.jit
def gate(x, out, width, x_row, out_row, BLOCK: tl.constexpr):
    """silu(first half) * second half of rows of 2 `width` values, into rows that may be parts of longer ones."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    first = tl.load(x + row * x_row + column, mask=here, other=0.0).to(tl.float32)
    second = tl.load(x + row * x_row + width + column, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + column, (first / (1 + tl.exp(-first)) * second).to(out.dtype.element_ty), mask=here)


@triton.jit
def _wide_row(x, width, x_row, BLOCK: tl.constexpr):
    """The number of this program's row, its columns, which of them are there, and its values in float32."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here = column < width
    return row, column, here, tl.load(x + row * x_row + column, mask=here, other=0.0).to(tl.float32)


@triton.jit
def quantize_int8(x, values, scale, width, x_row, BLOCK: tl.constexpr):
    """A row to int8 in [-127, 127] and its scale, rounded to 8 bits: as `limner.model.int8.quantize_rows` on a CPU."""
    row, column, here, wide = _wide_row(x, width, x_row, BLOCK)
    unit = tl.maximum(tl.max(tl.abs(wide), 0) / 127.0, 1e-30)
    bits = unit.to(tl.uint32, bitcast=True)  # to bfloat16 and back by hand: to the nearest, a tie to the even one
    unit = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    unit += tl.sum(wide * 0.0, 0)  # a maximum passes over NaN, which has to show in the picture's check
    steps = tl.floor(wide * (1.0 / unit) + 0.5)
    steps = tl.minimum(tl.maximum(steps, -127.0), 127.0)
    tl.store(values + row * width + column, steps.to(tl.int8), mask=here)
    tl.store(scale + row, unit)


@triton.jit
def quantize_fp8(x, values, scale, width, x_row, BLOCK: tl.constexpr):
    """A row to fp8 (E4M3) in [-448, 448] and its scale in float32."""
    row, column, here, wide = _wide_row(x, width, x_row, BLOCK)
    unit = tl.maximum(tl.max(tl.abs(wide), 0) / 448.0, 1e-30)
    unit += tl.sum(wide * 0.0, 0)
    narrow = tl.minimum(tl.maximum(wide / unit, -448.0), 448.0)
    tl.store(values + row * width + column, narrow.to(values.dtype.element_ty), mask=here)
    tl.store(scale + row, unit)


@triton.jit
def scale_product(product, row_scale, column_scale, out, width, out_row, BLOCK: tl.constexpr):
    """A product of int8 matrices (int32) times the scales of its row and its columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    whole = tl.load(product + row * width + column, mask=here, other=0).to(tl.float32)
    by = tl.load(column_scale + column, mask=here, other=0.0) * tl.load(row_scale + row)
    tl.store(out + row * out_row + column, (whole * by).to(out.dtype.element_ty), mask=here)
