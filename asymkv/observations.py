"""What queries say about rows: attention mass, curvature of the output, cost of merging neighbours.

Everything is accumulated over blocks of queries, so that ``[H, Q, T]`` never exists for a whole prompt. Notation of one
query: ``s`` scaled logit without log n, ``p`` its probability (cardinality included), ``o`` the output, ``v`` a row's
mean value, ``u = p (v - o)`` the derivative of the output with respect to ``s``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from asymkv.view import RowView

BLOCK_ELEMENTS = 1 << 23  # logits in memory at a time: 32 MiB in fp32
QUERY_WINDOW = 32  # queries remembered in decode


class QueryRing:
    """The last ``QUERY_WINDOW`` decode queries of a layer since its last compaction.

    ``queries [B, H, W, D]`` and ``positions [B, W]`` (-1 = empty slot).
    """

    def __init__(self, like: Tensor) -> None:
        batch, heads, _, dim = like.shape
        self.queries = like.new_zeros(batch, heads, QUERY_WINDOW, dim)
        self.positions = torch.full((batch, QUERY_WINDOW), -1, dtype=torch.long, device=like.device)
        self.cursor = 0

    @property
    def nbytes(self) -> int:
        return self.queries.untyped_storage().nbytes() + self.positions.untyped_storage().nbytes()

    @property
    def full(self) -> bool:
        return self.cursor == QUERY_WINDOW

    def push(self, query: Tensor, positions: Tensor) -> None:
        """Adds one query per row: ``[B, H, 1, D]`` at ``positions [B, 1]``; the oldest gives way."""
        slot = self.cursor % QUERY_WINDOW
        self.queries[:, :, slot] = query[:, :, 0]
        self.positions[:, slot] = positions[:, 0]
        self.cursor += 1

    def clear(self) -> None:
        self.positions.fill_(-1)
        self.cursor = 0

    def select(self, rows: Tensor) -> None:
        """Reorders the batch."""
        self.queries, self.positions = self.queries[rows], self.positions[rows]


class QueryBlocks:
    """Probabilities of all queries over all rows, a block of queries at a time."""

    def __init__(self, view: RowView) -> None:
        if view.queries is None or view.query_positions is None:
            raise ValueError("these rows carry no queries: the method must list 'queries' in its needs")
        self.view = view
        self.bias = view.bias()
        self.dtype = self.bias.dtype
        self.keys = view.keys.to(self.dtype)
        batch, self.kv_heads, rows, _ = view.keys.shape
        per_query = batch * view.queries.shape[1] * rows
        self.size = max(1, min(view.queries.shape[2], BLOCK_ELEMENTS // max(per_query, 1)))

    def __iter__(self) -> Iterator[QueryBlock]:
        queries, positions = self.view.queries, self.view.query_positions
        assert queries is not None and positions is not None
        batch, heads, total, dim = queries.shape
        grouped = queries.view(batch, self.kv_heads, heads // self.kv_heads, total, dim)
        for begin in range(0, total, self.size):
            q = grouped[:, :, :, begin : begin + self.size].to(self.dtype)
            yield self._block(q, positions[:, begin : begin + self.size])

    def _block(self, q: Tensor, positions: Tensor) -> QueryBlock:
        logits = torch.einsum("bhgqd,bhtd->bhgqt", q, self.keys) * self.view.scale
        later = self.view.positions[:, :, None] > positions[:, None, :, None]  # [B, H_kv, Q, T]
        bias = torch.where(later, -torch.inf, self.bias[:, :, None])[:, :, None]
        # A query that is absent, or sees nothing, has no probabilities: 0, not NaN.
        probs = torch.softmax(logits + bias, dim=-1).nan_to_num(nan=0.0)
        return QueryBlock(q, logits, probs)


@dataclass
class QueryBlock:
    """``queries [B, H_kv, G, Q, D]``, ``logits`` (scaled, without log n) and ``probs``, ``[B, H_kv, G, Q, T]``."""

    queries: Tensor
    logits: Tensor
    probs: Tensor


def attention_mass(view: RowView, *, per_query_head: bool = False) -> Tensor:
    """Attention that each row received, cardinality included, summed over queries.

    Returns:
        ``[B, H_kv, T]`` summed over the query heads of a group; ``[B, H_kv, G, T]`` with ``per_query_head``.
    """
    total: Tensor | None = None
    for block in QueryBlocks(view):
        mass = block.probs.sum(3)
        total = mass if total is None else total + mass
    assert total is not None
    return total if per_query_head else total.sum(2)


def exposure(view: RowView) -> Tensor:
    """``[B, H_kv, T]`` fp32: how many of the queries could see each row (at least 1)."""
    positions = view.query_positions
    assert positions is not None
    ordered = positions.sort(dim=-1).values
    rows = view.positions.flatten(1).long()
    before = torch.searchsorted(ordered, rows.contiguous())
    return (positions.shape[1] - before).clamp(min=1).view_as(view.positions).float()


def key_curvature(view: RowView) -> Tensor:
    """Diagonal Gauss-Newton of the attention output with respect to each key, in pre-RoPE coordinates.

    ``h_d = sum_q |u|^2 (ds/dk_d)^2`` where ``ds/dk`` is the query turned back by the row's rotary position, times the
    scale. Positive semi-definite, forward only (specs of the method: section 5.4).

    Returns:
        ``[B, H_kv, T, D]``.
    """
    dim = view.keys.shape[-1]
    half = dim // 2
    values = view.values.to(torch.promote_types(view.values.dtype, torch.float32))
    square, product = 0.0, 0.0
    for block in QueryBlocks(view):
        energy = _output_energy(block.probs, values)
        weight = energy.flatten(2, 3).transpose(-1, -2)  # [B, H_kv, T, G * Q]
        q = block.queries.flatten(2, 3)
        square = square + weight @ q.square()
        product = product + weight @ (q[..., :half] * q[..., half:])
    # Turning back by angle a: (q_d cos a + q_d' sin a)^2 and (q_d' cos a - q_d sin a)^2, expanded.
    unit = torch.zeros_like(view.keys, dtype=values.dtype)
    unit[..., :half] = 1
    turned = view.rope.rotate(unit, view.rotary_positions)
    cos, sin = turned[..., :half], turned[..., half:]
    first, second = square[..., :half], square[..., half:]
    low = first * cos**2 + second * sin**2 + 2 * product * cos * sin
    high = second * cos**2 + first * sin**2 - 2 * product * cos * sin
    return torch.cat((low, high), dim=-1).clamp(min=0) * view.scale**2


def _output_energy(probs: Tensor, values: Tensor) -> Tensor:
    """``|u|^2 = p^2 |v - o|^2`` of each query and row, ``[B, H_kv, G, Q, T]``."""
    out = torch.einsum("bhgqt,bhtd->bhgqd", probs, values)
    cross = torch.einsum("bhgqd,bhtd->bhgqt", out, values)
    norm = values.square().sum(-1)[:, :, None, None]
    return probs.square() * (norm - 2 * cross + out.square().sum(-1, keepdim=True)).clamp(min=0)


@dataclass
class PairCost:
    """Second-order output error of merging rows j and j + 1 with key weight w on j (specs of the method: 5.9).

    ``error(w) = (1-w)^2 a - 2 w (1-w) b + w^2 c``; all ``[B, H_kv, T - 1]``.
    """

    a: Tensor
    b: Tensor
    c: Tensor

    @property
    def weight(self) -> Tensor:
        """The best w in [0, 1]; one half where every w costs the same."""
        total = self.a + 2 * self.b + self.c
        best = (self.a + self.b) / torch.where(total > 0, total, 1)
        return torch.where(total > 0, best, 0.5).clamp(0, 1)

    def error(self, weight: Tensor) -> Tensor:
        """The error at a given weight, >= 0."""
        rest = 1 - weight
        return (rest**2 * self.a - 2 * weight * rest * self.b + weight**2 * self.c).clamp(min=0)


def pair_cost(view: RowView) -> PairCost:
    """Cost of merging each row with its successor, summed over queries and the heads of a group."""
    values = view.values.to(torch.promote_types(view.values.dtype, torch.float32))
    norm = values.square().sum(-1)[:, :, None, None]
    inner = (values[:, :, 1:] * values[:, :, :-1]).sum(-1)[:, :, None, None]
    a = b = c = 0.0
    for block in QueryBlocks(view):
        p, s = block.probs, block.logits
        out = torch.einsum("bhgqt,bhtd->bhgqd", p, values)
        cross = torch.einsum("bhgqd,bhtd->bhgqt", out, values)
        square = out.square().sum(-1, keepdim=True)
        energy = p.square() * (norm - 2 * cross + square).clamp(min=0)
        distance = (s[..., 1:] - s[..., :-1]).square()
        mixed = p[..., :-1] * p[..., 1:] * (inner - cross[..., :-1] - cross[..., 1:] + square)
        a = a + (distance * energy[..., :-1]).sum((2, 3))
        c = c + (distance * energy[..., 1:]).sum((2, 3))
        b = b + (distance * mixed).sum((2, 3))
    return PairCost(a, b, c)
