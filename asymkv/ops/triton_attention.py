"""Locally Merged Attention over ragged rows by Triton: split-KV decode, and chunks of new tokens.

One kernel reads the flat buffers once per KV head, with the queries of its group in the rows of a tile; log n is added
to the logits in fp32. A second one merges the splits. Nothing waits for the device: lengths are read there, and the
grid depends on host numbers only, so that a decode step can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from asymkv.ops.triton_launch import (
    Launch,
    available,
    blocks,
    check_inputs,
    check_table,
    interpreted,
    power_of_two,
)

__all__ = ["attend", "attend_launches", "available", "choose_splits"]

KERNELS = "asymkv.ops.triton_kernels"
MAX_SPLITS = 64  # the merging kernel holds all parts of a query in registers
MIN_SPLIT_ROWS = 128  # below, starting a program costs more than its rows
GOOD_SPLIT_ROWS = 512  # smaller programs than needed even out ragged heads; down to here they cost nothing
INTERPRETER_SPLITS = 3
WAVES = 8  # programs beyond these waves even out nothing more
SCRATCH_BYTES = 1 << 26  # of the parts of a call in fp32, which grow with its queries, whatever its rows


class Tile(NamedTuple):
    """Rows of queries and of keys in a tile, warps per program, stages of the pipeline, programs an SM holds."""

    block_m: int
    block_t: int
    warps: int
    stages: int
    resident: int


def choose_tile(rows: int, dim: int, dtype: torch.dtype) -> Tile:
    """The tile for ``rows = G * Q`` query rows per KV head.

    Shared memory and registers are what the compiler reports for sm_90. Decode (up to 32 rows) is bound by memory: K
    and V blocks of 16 KiB each in 3 stages take 72 KiB, three programs to an SM of 227 KiB, 64 KiB or more in flight.
    Chunks are bound by arithmetic: 64 query rows per 4 warps for the tensor cores, and as many key rows as registers
    hold without spilling. fp32 runs on plain FMA units, with operands in registers: small tiles.
    """
    block_m = max(16, power_of_two(rows))
    wide = dim > 128
    if dtype == torch.float32:
        block_m = min(block_m, 32)
        return Tile(block_m, 32 if dim == 64 else 16, 8 if block_m == 32 and dim > 64 else 4, 2, 2)
    if block_m <= 32:
        return Tile(block_m, 128 if dim == 64 else 32 if wide else 64, 4, 3, 3)
    if block_m == 64:
        return Tile(64, 32 if wide else 64, 4, 2, 2)
    return Tile(128, 32 if wide else 64, 8, 2 if wide else 3, 1)


@functools.lru_cache(maxsize=1024)
def choose_splits(programs: int, max_rows: int, slots: int) -> int:
    """Splits of the rows of a head, from host numbers only.

    The fewest that fill the processors nearly as well as any number does, then doubled while splits stay long and waves
    are few: equal waves of programs, and heads of unequal length even out.

    Args:
        programs: heads times query tiles.
        max_rows: rows of the longest head.
        slots: programs that the device runs at a time.
    """
    most = max(1, min(MAX_SPLITS, blocks(max_rows, MIN_SPLIT_ROWS)))

    def filled(splits: int) -> float:
        return programs * splits / (blocks(programs * splits, slots) * slots)

    best = max(filled(s) for s in range(1, most + 1))
    splits = next(s for s in range(1, most + 1) if filled(s) >= 0.9 * best)
    while 2 * splits <= most and 2 * splits * GOOD_SPLIT_ROWS <= max_rows and 2 * splits * programs <= WAVES * slots:
        splits *= 2
    return splits


def most_splits(elements: int) -> int:
    """Splits whose parts of ``elements`` output numbers each fit into the scratch memory; at least one."""
    return max(1, SCRATCH_BYTES // (4 * max(elements, 1)))


@functools.cache
def processors(device: torch.device) -> int:
    """SMs of a device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    log_n: Tensor | None,
    position: Tensor,
    start: Tensor,
    length: Tensor,
    query_positions: Tensor | None,
    scale: float,
    max_rows: int,
    *,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Locally Merged Attention of queries over the rows of each KV head; forward only.

    Args:
        query: ``[B, H, Q, D]``, rotated; fp32, fp16 or bf16; D in ``DIMS``, contiguous.
        keys: ``[R, D]`` flat buffer, contiguous; head h owns rows ``start[h] ... start[h] + length[h] - 1``.
        values: ``[R, D]`` likewise.
        log_n: ``[R]`` fp32 log cardinality; None: every row is a single token, and none of its cost is paid.
        position: ``[R]`` int32, of each row's last token; read only with ``query_positions``.
        start: ``[N]`` int64 on the device, ``N = B * H_kv``, ``H = H_kv * G``.
        length: ``[N]`` int64 on the device.
        query_positions: ``[B, Q]`` int64: a query sees rows up to its position (-1: none). None: every query sees all.
        scale: factor of ``q.k``.
        max_rows: an upper bound of ``length`` known to the host; fixes the grid.
        splits: parts of the rows of a head that run in parallel; None: chosen for the device.

    Returns:
        ``out [B, H, Q, D]`` in the query's dtype and ``lse [B, H, Q]`` in fp32, the natural log of the denominator; 0
        and -inf where a query sees no row.

    Raises:
        ValueError: for shapes, dtypes or devices that are not served, or if a gradient is needed.
    """
    _check(query, keys, values, log_n, position, start, length, query_positions)
    batch, heads, queries, dim = query.shape
    if splits is None:
        splits = INTERPRETER_SPLITS
        if query.is_cuda:
            rows = queries * (batch * heads // max(start.shape[0], 1))
            tile = choose_tile(rows, dim, query.dtype)
            programs = start.shape[0] * blocks(rows, tile.block_m)
            splits = choose_splits(programs, max_rows, tile.resident * processors(query.device))
            splits = min(splits, most_splits(query.numel()))
    if not 1 <= splits <= MAX_SPLITS:
        raise ValueError(f"splits must be from 1 to {MAX_SPLITS}; found {splits}")
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    if out.numel():
        inputs = (query, keys, values, log_n, position, query_positions, start, length)
        for launch in attend_launches(*inputs, out, lse, scale, max_rows, splits, interpreted()):
            launch.run(query.device)
    return out, lse


def attend_launches(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    log_n: Tensor | None,
    position: Tensor,
    query_positions: Tensor | None,
    start: Tensor,
    length: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    max_rows: int,
    splits: int,
    interpret: bool,
) -> list[Launch]:
    """The kernels of one call, which write ``out [B, H, Q, D]`` and ``lse [B, H, Q]``; tensors may be meta.

    Other arguments as :func:`attend`; ``interpret`` fixes what Triton's interpreter needs fixed.
    """
    batch, heads, queries, dim = query.shape
    kv_heads = start.shape[0] // batch
    group = heads // kv_heads
    tile = choose_tile(group * queries, dim, query.dtype)
    part, part_lse = out, lse
    if splits > 1:
        part = torch.empty(batch, heads, queries, splits, dim, dtype=torch.float32, device=query.device)
        part_lse = torch.empty(batch, heads, queries, splits, dtype=torch.float32, device=query.device)
    if query_positions is not None:
        query_positions = query_positions.contiguous()
    args = (query, keys, values, log_n, position if query_positions is not None else None, query_positions, start,
            length, part, part_lse, *query.stride()[:3], kv_heads, queries, scale * math.log2(math.e))  # fmt: skip
    padded = power_of_two(dim)
    constants = {
        "GROUP": group, "D": dim, "BLOCK_D": padded, "BLOCK_M": tile.block_m, "BLOCK_T": tile.block_t,
        "BLOCKS": max(1, blocks(max_rows, splits * tile.block_t)) if interpret else 0, "UPCAST": interpret,
    }  # fmt: skip
    grid = (blocks(group * queries, tile.block_m), splits, batch * kv_heads)
    launches = [Launch(KERNELS, "attend_kernel", grid, args, constants, tile.warps, tile.stages)]
    if splits > 1:
        constants = {"D": dim, "BLOCK_D": padded, "BLOCK_S": power_of_two(splits), "UPCAST": interpret}
        merged = (part, part_lse, out, lse, splits)
        launches.append(Launch(KERNELS, "merge_kernel", (batch * heads * queries, 1, 1), merged, constants, 4, 1))
    return launches


def _check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    log_n: Tensor | None,
    position: Tensor,
    start: Tensor,
    length: Tensor,
    query_positions: Tensor | None,
) -> None:
    if torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad or values.requires_grad):
        raise ValueError("the Triton kernels have no backward; found an input that requires a gradient under "
                         "torch.enable_grad. Use torch.no_grad(), or the backend 'sdpa'")
    if query.ndim != 4:
        raise ValueError(f"query must be [B, H, Q, D]; found {list(query.shape)}")
    if keys.ndim != 2 or values.shape != keys.shape or not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError(f"keys and values must be contiguous [R, D] of equal shape; found {list(keys.shape)}, "
                         f"strides {keys.stride()}, and {list(values.shape)}, strides {values.stride()}")
    check_inputs(query=query, keys=keys, values=values)
    batch, heads = query.shape[:2]
    count = start.shape[0] if start.ndim == 1 else -1
    if count % max(batch, 1) or (query.numel() and (count < 1 or batch * heads % count)):
        raise ValueError(f"start must be [B * H_kv] with H = {heads} a multiple of H_kv for B = {batch}; "
                         f"found {list(start.shape)}")
    rows = (keys.shape[0],)
    check_table("start", start, (count,), torch.int64, query)
    check_table("length", length, (count,), torch.int64, query)
    check_table("position", position, rows, torch.int32, query)
    if log_n is not None:
        check_table("log_n", log_n, rows, torch.float32, query)
    if query_positions is not None:
        check_table("query_positions", query_positions, (batch, query.shape[2]), torch.int64, query)
