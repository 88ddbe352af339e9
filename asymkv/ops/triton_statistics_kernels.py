"""Triton kernels of what queries say about rows; see :mod:`asymkv.ops.triton_kernels` for conventions and legend.

A program owns a block of rows and loops over blocks of queries: tiles are ``[rows T, queries M]``, and probabilities
never leave the registers. Queries of one KV head are numbered ``m = g * Q + i``.
"""

import triton
import triton.language as tl

from asymkv.ops.triton_kernels import LOG2E, dot


@triton.jit
def row_tables(
    log_n_ptr: tl.tensor, position_ptr: tl.tensor, row: tl.tensor, rows: tl.tensor,
    stride_nt: tl.tensor, stride_pt: tl.tensor,
):  # fmt: skip
    """log2 n of rows, -inf beyond the last, and their positions."""
    log_n = tl.load(log_n_ptr + row * stride_nt, mask=row < rows, other=float("-inf")) * LOG2E
    return log_n, tl.load(position_ptr + row * stride_pt, mask=row < rows, other=0)


@triton.jit
def query_tables(at_ptr: tl.tensor, lse_ptr: tl.tensor, m: tl.tensor, queries: tl.tensor, count: tl.tensor):
    """Which queries say anything, their positions, and lse to the base 2; inf, so that p is 0, for the others."""
    at = tl.load(at_ptr + m % queries, mask=m < count, other=-1)
    lse = tl.load(lse_ptr + m, mask=m < count, other=float("-inf"))
    active = (at >= 0) & (lse > float("-inf"))
    return active, tl.minimum(at, 0x7FFFFFFF).to(tl.int32), tl.where(active, lse * LOG2E, float("inf"))


@triton.jit
def probabilities(s: tl.tensor, log_n: tl.tensor, position: tl.tensor, at: tl.tensor, lse: tl.tensor):
    """``[T, M]``: the share of each query's attention that a row receives, cardinality included."""
    seen = position[:, None] <= at[None, :]
    return tl.exp2(tl.where(seen, s + log_n[:, None], float("-inf")) - lse[None, :])


@triton.jit
def query_offset(m: tl.tensor, queries: tl.tensor, stride_g: tl.tensor, stride_i: tl.tensor):
    """Where query m of a KV head begins."""
    return (m // queries).to(tl.int64) * stride_g + (m % queries).to(tl.int64) * stride_i


@triton.jit
def mass_block(
    total: tl.tensor, k: tl.tensor, log_n: tl.tensor, position: tl.tensor, q_ptr: tl.tensor, at_ptr: tl.tensor,
    lse_ptr: tl.tensor, first: tl.tensor, queries: tl.tensor, stride_qi: tl.tensor, scale: tl.tensor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    m = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    active, at, lse = query_tables(at_ptr, lse_ptr, m, queries, queries)
    q = tl.load(q_ptr + m.to(tl.int64)[:, None] * stride_qi + d[None, :],
                mask=active[:, None] & (d < D)[None, :], other=0.0)
    s = dot(k, tl.trans(q), UPCAST, "ieee") * scale
    return total + tl.sum(probabilities(s, log_n, position, at, lse), 1)


@triton.jit(do_not_specialize=["group", "queries", "rows"])
def mass_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, log_n_ptr: tl.tensor, position_ptr: tl.tensor, at_ptr: tl.tensor,
    lse_ptr: tl.tensor, mass_ptr: tl.tensor,
    stride_qn: tl.tensor, stride_qg: tl.tensor, stride_qi: tl.tensor, stride_kn: tl.tensor, stride_kt: tl.tensor,
    stride_nn: tl.tensor, stride_nt: tl.tensor, stride_pn: tl.tensor, stride_pt: tl.tensor,
    group: tl.tensor, queries: tl.tensor, rows: tl.tensor, scale: tl.tensor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCKS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """``mass [N, G, T]``; grid (blocks of rows, G, N)."""
    g, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    k = tl.load(k_ptr + head * stride_kn + row[:, None] * stride_kt + d[None, :],
                mask=(row < rows)[:, None] & (d < D)[None, :], other=0.0)
    log_n, position = row_tables(log_n_ptr + head * stride_nn, position_ptr + head * stride_pn, row, rows,
                                 stride_nt, stride_pt)
    q_ptr += head * stride_qn + g.to(tl.int64) * stride_qg
    at_ptr += head * queries
    lse_ptr += (head * group + g) * queries
    total = tl.zeros([BLOCK_T], tl.float32)
    if BLOCKS > 0:
        for block in range(BLOCKS):
            total = mass_block(total, k, log_n, position, q_ptr, at_ptr, lse_ptr, block * BLOCK_M, queries, stride_qi,
                               scale, D, BLOCK_D, BLOCK_M, UPCAST)
    else:
        for first in range(0, queries, BLOCK_M):
            total = mass_block(total, k, log_n, position, q_ptr, at_ptr, lse_ptr, first, queries, stride_qi,
                               scale, D, BLOCK_D, BLOCK_M, UPCAST)
    tl.store(mass_ptr + (head * group + g) * rows + row, total, mask=row < rows)


@triton.jit
def load_halves(ptr: tl.tensor, keep: tl.tensor, h: tl.tensor, HALF: tl.constexpr):
    """The two halves of rows that begin at ``ptr [rows, 1]``."""
    keep = keep[:, None] & (h < HALF)[None, :]
    low = tl.load(ptr + h[None, :], mask=keep, other=0.0)
    return low, tl.load(ptr + HALF + h[None, :], mask=keep, other=0.0)


@triton.jit
def square_norm(low: tl.tensor, high: tl.tensor):
    """``|x|^2`` of rows in fp32."""
    low, high = low.to(tl.float32), high.to(tl.float32)
    return tl.sum(low * low, 1) + tl.sum(high * high, 1)


@triton.jit
def curvature_block(
    low: tl.tensor, high: tl.tensor, product: tl.tensor, k_low: tl.tensor, k_high: tl.tensor, v_low: tl.tensor,
    v_high: tl.tensor, v_square: tl.tensor, log_n: tl.tensor, position: tl.tensor,
    q_ptr: tl.tensor, out_ptr: tl.tensor, at_ptr: tl.tensor, lse_ptr: tl.tensor,
    stride_qg: tl.tensor, stride_qi: tl.tensor, stride_og: tl.tensor, stride_oi: tl.tensor,
    first: tl.tensor, count: tl.tensor, queries: tl.tensor, scale: tl.tensor,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m = first + tl.arange(0, BLOCK_M)
    h = tl.arange(0, BLOCK_H)
    active, at, lse = query_tables(at_ptr, lse_ptr, m, queries, count)
    # Masked by activity, so that whatever a silent query holds is never multiplied.
    o_low, o_high = load_halves(out_ptr + query_offset(m, queries, stride_og, stride_oi)[:, None], active, h, HALF)
    cross = dot(v_low, tl.trans(o_low), UPCAST, "ieee") + dot(v_high, tl.trans(o_high), UPCAST, "ieee")
    distance = tl.maximum(v_square[:, None] + square_norm(o_low, o_high)[None, :] - 2 * cross, 0.0)
    q_low, q_high = load_halves(q_ptr + query_offset(m, queries, stride_qg, stride_qi)[:, None], active, h, HALF)
    s = dot(k_low, tl.trans(q_low), UPCAST, "ieee") + dot(k_high, tl.trans(q_high), UPCAST, "ieee")
    p = probabilities(s * scale, log_n, position, at, lse)
    energy = p * p * distance
    q_low, q_high = q_low.to(tl.float32), q_high.to(tl.float32)
    low += dot(energy, q_low * q_low, False, PRECISION)
    high += dot(energy, q_high * q_high, False, PRECISION)
    product += dot(energy, q_low * q_high, False, PRECISION)
    return low, high, product


@triton.jit(do_not_specialize=["group", "queries", "rows"])
def curvature_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, log_n_ptr: tl.tensor, position_ptr: tl.tensor,
    at_ptr: tl.tensor, lse_ptr: tl.tensor, out_ptr: tl.tensor, square_ptr: tl.tensor, product_ptr: tl.tensor,
    stride_qn: tl.tensor, stride_qg: tl.tensor, stride_qi: tl.tensor, stride_on: tl.tensor, stride_og: tl.tensor,
    stride_oi: tl.tensor, stride_kn: tl.tensor, stride_kt: tl.tensor, stride_vn: tl.tensor, stride_vt: tl.tensor,
    stride_nn: tl.tensor, stride_nt: tl.tensor, stride_pn: tl.tensor, stride_pt: tl.tensor,
    group: tl.tensor, queries: tl.tensor, rows: tl.tensor, scale: tl.tensor,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCKS: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``square [N, T, 2 * HALF]`` and ``product [N, T, HALF]``; grid (blocks of rows, N)."""
    head = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    inside = row < rows
    k_low, k_high = load_halves(k_ptr + head * stride_kn + row[:, None] * stride_kt, inside, h, HALF)
    v_low, v_high = load_halves(v_ptr + head * stride_vn + row[:, None] * stride_vt, inside, h, HALF)
    v_square = square_norm(v_low, v_high)
    log_n, position = row_tables(log_n_ptr + head * stride_nn, position_ptr + head * stride_pn, row, rows,
                                 stride_nt, stride_pt)
    q_ptr += head * stride_qn
    out_ptr += head * stride_on
    at_ptr += head * queries
    lse_ptr += head * group * queries
    low = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    high = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    product = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    if BLOCKS > 0:
        for block in range(BLOCKS):
            low, high, product = curvature_block(
                low, high, product, k_low, k_high, v_low, v_high, v_square, log_n, position, q_ptr, out_ptr, at_ptr,
                lse_ptr, stride_qg, stride_qi, stride_og, stride_oi, block * BLOCK_M, group * queries, queries, scale,
                HALF, BLOCK_H, BLOCK_M, UPCAST, PRECISION)  # fmt: skip
    else:
        for first in range(0, group * queries, BLOCK_M):
            low, high, product = curvature_block(
                low, high, product, k_low, k_high, v_low, v_high, v_square, log_n, position, q_ptr, out_ptr, at_ptr,
                lse_ptr, stride_qg, stride_qi, stride_og, stride_oi, first, group * queries, queries, scale,
                HALF, BLOCK_H, BLOCK_M, UPCAST, PRECISION)  # fmt: skip
    keep = inside[:, None] & (h < HALF)[None, :]
    square = square_ptr + (head * rows + row)[:, None] * (2 * HALF) + h[None, :]
    tl.store(square, low, mask=keep)
    tl.store(square + HALF, high, mask=keep)
    tl.store(product_ptr + (head * rows + row)[:, None] * HALF + h[None, :], product, mask=keep)
