"""What the released AsymKV code computes (the-scale-lab/Asymkv, commit 6e844dc3), quirks included.

One pair set per layer for all heads; pairs may overlap, and then all but the first of a run drop a row; cardinality is
capped at 5 while values keep the full sum; an epsilon collapses keys whose gradients vanish. Only for reproducing
published numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asymkv.plan import CompactionPlan, keep_rows
from asymkv.view import RowView, lowest

GAMMA = 4096 / math.log(512)
CARDINALITY_CAP = 5
EPSILON = 1e-21
DEFAULTS = {
    "sink_size": 32,
    "window_size": 0,
    "budget": 2080,
    "chunk_size": 512,
    "decode_interval": 0,
    "position_policy": "cardinality",
}


def position_factor(rows: int, sink_size: int, like: Tensor) -> Tensor:
    """``exp(-(i + 1) / gamma)`` of pair i, counted behind the sinks, ``[rows - 1]``: late pairs cost less."""
    index = torch.arange(rows - 1, device=like.device, dtype=like.dtype) - sink_size
    return torch.exp(-(index.clamp(min=0) + 1) / GAMMA)


def upstream_compact(
    keys_pre_rope: Tensor,
    value_sums: Tensor,
    cardinality: Tensor,
    attention_sum: Tensor,
    key_grad: Tensor | None,
    *,
    sink_size: int,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One compression of one layer as the released code does it; sums in the dtype of the inputs.

    Args:
        keys_pre_rope: ``[H_kv, T, D]``.
        value_sums: ``[H_kv, T, D]``, sums (not means) of the members' values.
        cardinality: ``[H_kv, T]``.
        attention_sum: ``[H, T]``: ``exp / sum(n exp)`` summed over the chunk's queries, not times n.
        key_grad: ``[H_kv, T, D]`` gradient of the chunk's loss, or None: keys and values are then averaged.
        sink_size: rows that are never touched.
        budget: rows to keep.

    Returns:
        ``pair_index [K]`` sorted, relative to ``sink_size``; keys, value sums and cardinality of the kept rows.
        ``T <= budget`` returns the inputs and an empty index.
    """
    rows = keys_pre_rope.shape[1]
    if rows <= budget:
        return torch.empty(0, dtype=torch.long, device=keys_pre_rope.device), keys_pre_rope, value_sums, cardinality
    excess = torch.tensor([rows - budget], device=keys_pre_rope.device)
    everything = torch.ones_like(cardinality[:1, :], dtype=torch.bool)
    pairs = _select(cardinality[None], attention_sum[None], excess, sink_size, everything)[0]
    gone, keys, sums, counts = _merge(
        keys_pre_rope[None], value_sums[None], cardinality[None], None if key_grad is None else key_grad[None],
        pairs[None],
    )  # fmt: skip
    keep = ~gone[0]
    index = pairs.nonzero().squeeze(-1) - sink_size
    return index, keys[0][:, keep], sums[0][:, keep], counts[0][:, keep]


def plan(view: RowView, sink_size: int) -> CompactionPlan:
    """The same on a layer's rows: kept rows are edited in place, then the others are dropped.

    A capped cardinality with its full value sum is, in terms of means, ``sum / capped count``.
    """
    n = view.cardinality
    batch, kv_heads, rows = n.shape
    attention = view.evidence["attention_sum"].to(view.keys.dtype).flatten(1, 2)
    pairs = _select(n, attention, view.excess[:, 0], sink_size, view.valid[:, 0])
    sums = view.values * n[..., None].to(view.values.dtype)
    keys = view.unrotate(view.keys).to(view.keys.dtype)
    gone, keys, sums, counts = _merge(keys, sums, n, view.evidence["key_grad"], pairs)
    changed = (torch.nn.functional.pad(pairs, (0, 1)) & ~gone)[:, None].expand_as(n)
    rotated = view.rope.rotate(keys, view.rotary_positions).to(view.keys.dtype)
    view.keys = torch.where(changed[..., None], rotated, view.keys)
    capped = changed | (counts != n)
    view.values = torch.where(capped[..., None], sums / counts[..., None].to(sums.dtype), view.values)
    # A merged row ends where its second member did.
    following = torch.nn.functional.pad(view.positions[..., 1:], (0, 1))
    view.positions = torch.where(changed, following, view.positions)
    view.cardinality = counts.int()
    return keep_rows(view.valid & ~gone[:, None])


def _select(n: Tensor, attention_sum: Tensor, excess: Tensor, sink_size: int, valid: Tensor) -> Tensor:
    """Pairs ``[B, T - 1]`` with the smallest ``(A_i + A_i+1) exp(-(i+1)/gamma) sum_heads(c_i + c_i+1)``, sinks out."""
    group = attention_sum.shape[1] // n.shape[1]
    counts = n.to(attention_sum.dtype)
    mass = (counts.repeat_interleave(group, 1) * attention_sum).sum(1)
    tokens = counts.sum(1)
    rows = n.shape[-1]
    score = (mass[:, :-1] + mass[:, 1:]) * position_factor(rows, sink_size, mass) * (tokens[:, :-1] + tokens[:, 1:])
    inside = torch.arange(rows - 1, device=n.device) >= sink_size
    return lowest(score[:, None], excess[:, None], (inside & valid[:, 1:])[:, None])[:, 0]


def _merge(
    keys: Tensor, sums: Tensor, n: Tensor, gradient: Tensor | None, pairs: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every selected entry i becomes merge(i, i + 1) of the originals; every i + 1 is deleted, merged or not.

    Returns:
        ``gone [B, T]``, and edited keys, value sums and capped cardinalities.
    """
    chosen = torch.nn.functional.pad(pairs, (0, 1))[:, None, :, None]
    gone = torch.nn.functional.pad(pairs, (1, 0))

    def successor(x: Tensor) -> Tensor:
        return torch.cat([x[:, :, 1:], x[:, :, -1:]], dim=2)

    if gradient is None:
        new_keys, new_sums = (keys + successor(keys)) / 2, (sums + successor(sums)) / 2
    else:
        square = gradient.square()
        following = successor(square)
        new_keys = (square * keys + following * successor(keys)) / (square + following + EPSILON)
        new_sums = sums + successor(sums)
    counts = torch.where(chosen[..., 0], n + successor(n), n).clamp(max=CARDINALITY_CAP)
    return gone, torch.where(chosen, new_keys, keys), torch.where(chosen, new_sums, sums), counts
