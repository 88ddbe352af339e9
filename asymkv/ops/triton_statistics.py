"""What queries say about rows, by Triton: attention mass, and the sums behind the curvature of keys.

The fused counterparts of :func:`asymkv.observations.attention_mass` and :func:`asymkv.observations.key_curvature`: one
pass over queries and rows with a known log-sum-exp, and no ``[H, Q, T]`` tensor.
"""

from __future__ import annotations

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

__all__ = ["attention_mass", "available", "key_curvature"]

KERNELS = "asymkv.ops.triton_statistics_kernels"


class Tile(NamedTuple):
    """Queries and rows of a tile, warps per program, stages of the pipeline."""

    block_m: int
    block_t: int
    warps: int
    stages: int


def choose_mass_tile(dim: int, dtype: torch.dtype) -> Tile:
    """Half types run on tensor cores; fp32 on FMA units, with operands in registers."""
    if dtype == torch.float32:
        return Tile(32, 32, 4, 2)
    return Tile(64, 64 if dim > 128 else 128, 4 if dim > 128 else 8, 2)


def choose_curvature_tile(dim: int, dtype: torch.dtype) -> Tile:
    """Keys, values and three fp32 sums per row stay in registers: as many rows as sm_90 holds without spilling."""
    if dtype == torch.float32:
        return Tile(16, 16, 8, 1) if dim > 128 else Tile(32, 32, 8 if dim > 64 else 4, 1)
    return Tile(32, 32 if dim > 128 else 64, 8, 2)


def attention_mass(
    query: Tensor,
    keys: Tensor,
    log_n: Tensor,
    position: Tensor,
    query_position: Tensor,
    lse: Tensor,
    scale: float,
) -> Tensor:
    """Attention that each row received, cardinality included, summed over queries.

    Args:
        query: ``[N, G, Q, D]``, N = batch x KV heads; any strides but the last.
        keys: ``[N, T, D]``; a view into a longer buffer is not copied.
        log_n: ``[N, T]`` fp32 log cardinality; -inf = absent row.
        position: ``[N, T]`` int32.
        query_position: ``[N, Q]`` int64; a query sees rows up to it; -1 = no query.
        lse: ``[N, G, Q]`` fp32, natural, of all that a query sees (scale and log n included); -inf = sees nothing.
        scale: factor of ``q.k``.

    Returns:
        ``[N, G, T]`` fp32.

    Raises:
        ValueError: for shapes, dtypes or devices that are not served.
    """
    _check(log_n, position, query_position, lse, query=query, keys=keys)
    heads, group, queries, _ = query.shape
    mass = torch.zeros(heads, group, keys.shape[1], dtype=torch.float32, device=query.device)
    if mass.numel() and queries:
        mass_launch(query, keys, log_n, position, query_position, lse, mass, scale, interpreted()).run(query.device)
    return mass


def key_curvature(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    log_n: Tensor,
    position: Tensor,
    query_position: Tensor,
    lse: Tensor,
    out: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Sums over queries of ``energy = p^2 |v - o|^2`` with squares and products of query components.

    Args:
        values: ``[N, T, D]``, as ``keys``.
        out: ``[N, G, Q, D]``, the attention output of each query, in the query's dtype.

    Other arguments as :func:`attention_mass`.

    Returns:
        ``square [N, T, D]`` fp32, the sum of ``energy q_d^2``, and ``product [N, T, D // 2]`` fp32, that of
        ``energy q_d q_(d + D/2)``; without the scale.

    Raises:
        ValueError: for shapes, dtypes or devices that are not served.
    """
    _check(log_n, position, query_position, lse, query=query, keys=keys, values=values, out=out)
    heads, _, queries, dim = query.shape
    rows = keys.shape[1]
    square = torch.zeros(heads, rows, dim, dtype=torch.float32, device=query.device)
    product = torch.zeros(heads, rows, dim // 2, dtype=torch.float32, device=query.device)
    if square.numel() and queries:
        inputs = (query, keys, values, log_n, position, query_position, lse, out)
        curvature_launch(*inputs, square, product, scale, interpreted()).run(query.device)
    return square, product


def mass_launch(
    query: Tensor,
    keys: Tensor,
    log_n: Tensor,
    position: Tensor,
    query_position: Tensor,
    lse: Tensor,
    mass: Tensor,
    scale: float,
    interpret: bool,
) -> Launch:
    """The kernel that writes ``mass [N, G, T]``; tensors may be meta. Arguments as :func:`attention_mass`."""
    heads, group, queries, dim = query.shape
    tile = choose_mass_tile(dim, query.dtype)
    args = (query, keys, log_n, position, query_position.contiguous(), lse.contiguous(), mass, *query.stride()[:3],
            *keys.stride()[:2], *log_n.stride(), *position.stride(), group, queries, keys.shape[1],
            scale * math.log2(math.e))  # fmt: skip
    constants = {
        "D": dim, "BLOCK_D": power_of_two(dim), "BLOCK_M": tile.block_m, "BLOCK_T": tile.block_t,
        "BLOCKS": blocks(queries, tile.block_m) if interpret else 0, "UPCAST": interpret,
    }  # fmt: skip
    grid = (blocks(keys.shape[1], tile.block_t), group, heads)
    return Launch(KERNELS, "mass_kernel", grid, args, constants, tile.warps, tile.stages)


def curvature_launch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    log_n: Tensor,
    position: Tensor,
    query_position: Tensor,
    lse: Tensor,
    out: Tensor,
    square: Tensor,
    product: Tensor,
    scale: float,
    interpret: bool,
) -> Launch:
    """The kernel that writes ``square`` and ``product``; tensors may be meta. Arguments as :func:`key_curvature`."""
    heads, group, queries, dim = query.shape
    tile = choose_curvature_tile(dim, query.dtype)
    args = (query, keys, values, log_n, position, query_position.contiguous(), lse.contiguous(), out, square, product,
            *query.stride()[:3], *out.stride()[:3], *keys.stride()[:2], *values.stride()[:2], *log_n.stride(),
            *position.stride(), group, queries, keys.shape[1], scale * math.log2(math.e))  # fmt: skip
    constants = {
        "HALF": dim // 2, "BLOCK_H": power_of_two(dim // 2), "BLOCK_M": tile.block_m, "BLOCK_T": tile.block_t,
        "BLOCKS": blocks(group * queries, tile.block_m) if interpret else 0, "UPCAST": interpret,
        # Three TF32 products instead of one keep fp32's accuracy on tensor cores (the energy is positive, and
        # rounding errors of 2^-21 do not cancel signal); fp32 input asks for exact products.
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32x3",
    }  # fmt: skip
    grid = (blocks(keys.shape[1], tile.block_t), heads, 1)
    return Launch(KERNELS, "curvature_kernel", grid, args, constants, tile.warps, tile.stages)


def _check(log_n: Tensor, position: Tensor, query_position: Tensor, lse: Tensor, **tensors: Tensor) -> None:
    query, keys = tensors["query"], tensors["keys"]
    if query.ndim != 4 or keys.ndim != 3 or keys.shape[0] != query.shape[0]:
        raise ValueError(f"query must be [N, G, Q, D] and keys [N, T, D]; found {list(query.shape)}, "
                         f"{list(keys.shape)}")
    for name, like in (("values", keys), ("out", query)):
        if name in tensors and tensors[name].shape != like.shape:
            raise ValueError(f"{name} must be {list(like.shape)}; found {list(tensors[name].shape)}")
    check_inputs(**tensors)
    heads, group, queries, _ = query.shape
    check_table("log_n", log_n, (heads, keys.shape[1]), torch.float32, query)
    check_table("position", position, (heads, keys.shape[1]), torch.int32, query)
    check_table("query_position", query_position, (heads, queries), torch.int64, query)
    check_table("lse", lse, (heads, group, queries), torch.float32, query)
