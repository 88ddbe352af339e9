"""Triton kernels of Locally Merged Attention over ragged rows.

This module imports Triton at the top: import it only inside functions. Legend: M query rows of a tile,
``m = i * G + g``
for query i and head g of the group; T rows of a block; D head dimension, padded to BLOCK_D, a power of two, by masks.
Logits, sums and results of products are fp32; exponentials are to the base 2, with ``log2(e)`` folded into the scale.

Three things are for the interpreter, which has no GPU: it cannot run loops whose bounds lie in device memory, so that
BLOCKS > 0 gives a fixed count instead; its products of half types are wrong, so that UPCAST makes operands fp32; and it
truncates to bf16 where hardware rounds.
"""

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
# Triton's own functions are compiled or interpreted once and for all when it is first imported.
TOO_LATE = INTERPRETED and isinstance(tl.sum, triton.JITFunction)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """Product with fp32 sums; "ieee" keeps fp32 operands from becoming TF32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def narrow(x: tl.tensor, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """fp32 in another dtype, rounded to nearest even in the interpreter too."""
    if UPCAST and DTYPE.is_bf16():
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def natural_lse(top: tl.tensor, total: tl.tensor):
    """Natural log of ``2^top * total``; -inf where the total is 0."""
    some = total > 0
    return tl.where(some, (tl.where(some, top, 0.0) + tl.log2(tl.where(some, total, 1.0))) * LN2, float("-inf"))


@triton.jit
def attend_block(
    acc: tl.tensor, top: tl.tensor, total: tl.tensor, q: tl.tensor, at: tl.tensor,
    k_ptr: tl.tensor, v_ptr: tl.tensor, log_n_ptr: tl.tensor, position_ptr: tl.tensor,
    row: tl.tensor, end: tl.tensor, scale: tl.tensor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Online softmax over the rows ``[row, min(row + BLOCK_T, end))`` of a head, whose pointers are given."""
    t = tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    present = row + t < end
    keep = present[:, None] & (d < D)[None, :]
    offset = row.to(tl.int64) * D
    tile = t[:, None] * D + d[None, :]
    k = tl.load(k_ptr + offset + tile, mask=keep, other=0.0)
    s = dot(q, tl.trans(k), UPCAST, "ieee") * scale
    if log_n_ptr is not None:
        s += tl.load(log_n_ptr + row + t, mask=present, other=0.0)[None, :] * LOG2E
    seen = present[None, :]
    if position_ptr is not None:
        seen = seen & (tl.load(position_ptr + row + t, mask=present, other=0)[None, :] <= at[:, None])
    s = tl.where(seen, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    # A query that has seen nothing yet subtracts 0, not -inf: no NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    fade = tl.exp2(top - base)
    p = tl.exp2(s - base[:, None])
    v = tl.load(v_ptr + offset + tile, mask=keep, other=0.0)
    acc = acc * fade[:, None] + dot(narrow(p, v.dtype, UPCAST), v, UPCAST, "ieee")
    return acc, new_top, total * fade + tl.sum(p, 1)


@triton.jit(do_not_specialize=["kv_heads", "queries"])
def attend_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, log_n_ptr: tl.tensor, position_ptr: tl.tensor,
    at_ptr: tl.tensor, start_ptr: tl.tensor, length_ptr: tl.tensor, out_ptr: tl.tensor, lse_ptr: tl.tensor,
    stride_qb: tl.tensor, stride_qh: tl.tensor, stride_qi: tl.tensor,
    kv_heads: tl.tensor, queries: tl.tensor, scale: tl.tensor,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCKS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of queries over one split of one head's rows; grid (tiles, splits, heads).

    Writes ``out [B, H, Q, splits, D]`` and the natural ``lse [B, H, Q, splits]``. Of several splits, ``out`` stays
    unwritten where ``lse`` is -inf.
    """
    split, head = tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    inside = m < GROUP * queries
    i = (m // GROUP).to(tl.int64)
    own = head % kv_heads * GROUP + m % GROUP
    batch = (head // kv_heads).to(tl.int64)
    offset = batch * stride_qb + i * stride_qi + own.to(tl.int64) * stride_qh
    q = tl.load(q_ptr + offset[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
    at = m
    if at_ptr is not None:
        at = tl.minimum(tl.load(at_ptr + batch * queries + i, mask=inside, other=-1), 0x7FFFFFFF).to(tl.int32)
    start = tl.load(start_ptr + head)
    length = tl.load(length_ptr + head).to(tl.int32)
    k_ptr, v_ptr = k_ptr + start * D, v_ptr + start * D
    if log_n_ptr is not None:
        log_n_ptr += start
    if position_ptr is not None:
        position_ptr += start
    # Splits share a head's own rows evenly, whatever the capacity that fixed the grid.
    share = (length + splits * BLOCK_T - 1) // (splits * BLOCK_T) * BLOCK_T
    begin = split * share
    end = tl.minimum(begin + share, length)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    if BLOCKS > 0:
        for block in range(BLOCKS):
            acc, top, total = attend_block(acc, top, total, q, at, k_ptr, v_ptr, log_n_ptr, position_ptr,
                                           begin + block * BLOCK_T, end, scale, D, BLOCK_D, BLOCK_T, UPCAST)
    else:
        for block in range((end - begin + BLOCK_T - 1) // BLOCK_T):
            acc, top, total = attend_block(acc, top, total, q, at, k_ptr, v_ptr, log_n_ptr, position_ptr,
                                           begin + block * BLOCK_T, end, scale, D, BLOCK_D, BLOCK_T, UPCAST)
    target = ((batch * kv_heads * GROUP + own) * queries + i) * splits + split
    tl.store(lse_ptr + target, natural_lse(top, total), mask=inside)
    written = inside & ((total > 0) | (splits == 1))
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + target[:, None] * D + d[None, :], narrow(out, out_ptr.dtype.element_ty, UPCAST),
             mask=written[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    part_ptr: tl.tensor, part_lse_ptr: tl.tensor, out_ptr: tl.tensor, lse_ptr: tl.tensor, splits: tl.tensor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Merges the splits of one query by their log-sum-exp; grid (B * H * Q).

    ``part [B * H * Q, splits, D]`` and ``part_lse`` are fp32; a split with lse -inf is not read.
    """
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    lse = tl.load(part_lse_ptr + row * splits + s, mask=s < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2((lse - top) * LOG2E)
    total = tl.sum(weight, 0)
    keep = (lse > float("-inf"))[:, None] & (d < D)[None, :]
    part = tl.load(part_ptr + (row * splits + s)[:, None] * D + d[None, :], mask=keep, other=0.0)
    out = tl.sum(weight[:, None] * part, 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * D + d, narrow(out, out_ptr.dtype.element_ty, UPCAST), mask=d < D)
    tl.store(lse_ptr + row, natural_lse(top * LOG2E, total))
