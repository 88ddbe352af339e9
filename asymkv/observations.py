"""What queries say about rows: attention mass, curvature of the output, cost of merging neighbours.

Everything is accumulated over blocks of queries, so that ``[H, Q, T]`` never exists for a whole prompt. Notation of one
query: ``s`` scaled logit without log n, ``p`` its probability (cardinality included), ``o`` the output, ``v`` a row's
mean value, ``u = p (v - o)`` the derivative of the output with respect to ``s``.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from asymkv.ops import rows as row_ops
from asymkv.rope import Rope
from asymkv.upload import upload
from asymkv.view import RowView

# A pair's weight stays away from 0 and 1, so that a long run of pairs cannot hang on one of its members.
WEIGHT_RANGE = (0.02, 0.98)
QUERY_WINDOW = 32  # queries remembered in decode, where the method does not ask for more


def block_elements(device: torch.device) -> int:
    """Logits in memory at a time: on a CPU 2 MiB in fp32, the size of a core's cache; a GPU needs more to be busy."""
    return 1 << 19 if device.type == "cpu" else 1 << 24


def statistic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of a stored curvature of keys: squares need the range of fp32, not its digits."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.bfloat16


class QueryRing:
    """The last ``size`` decode queries of each row of a layer since its last compaction.

    ``queries [B, H, W, D]`` and ``positions [B, W]`` (-1 = empty slot); ``cursor [B]``: queries taken in so far.
    """

    def __init__(self, like: Tensor, size: int = QUERY_WINDOW) -> None:
        batch, heads, _, dim = like.shape
        # Normal tensors even under inference_mode, so that a later step outside it may write to them.
        with torch.inference_mode(False):
            self.queries = torch.zeros(batch, heads, size, dim, dtype=like.dtype, device=like.device)
            self.positions = torch.full((batch, size), -1, dtype=torch.long, device=like.device)
        self.cursor = [0] * batch

    @property
    def nbytes(self) -> int:
        return self.queries.untyped_storage().nbytes() + self.positions.untyped_storage().nbytes()

    @property
    def empty(self) -> bool:
        return not any(self.cursor)

    @property
    def full(self) -> bool:
        """Whether the next query of some row would be the first to push another one out."""
        return max(self.cursor) == self.positions.shape[1]

    def push(self, query: Tensor, positions: Tensor, counts: list[int]) -> None:
        """Adds ``counts[b]`` queries, one or none, per row: ``[B, H, 1, D]`` at ``positions [B, 1]``.

        A row's oldest gives way.
        """
        size = self.positions.shape[1]
        slots = [n % size for n in self.cursor]
        if len(set(slots)) == 1 and all(counts):
            self.queries[:, :, slots[0]] = query[:, :, 0]
            self.positions[:, slots[0]] = positions[:, 0]
        else:
            taken = [[row, slots[row]] for row, count in enumerate(counts) if count]
            rows, at = upload(taken, query.device).view(-1, 2).unbind(1)
            self.queries[rows, :, at] = query[rows, :, 0].to(self.queries.dtype)
            self.positions[rows, at] = positions[rows, 0]
        self.cursor = [n + c for n, c in zip(self.cursor, counts, strict=True)]

    def clear(self) -> None:
        self.positions.fill_(-1)
        self.cursor = [0] * len(self.cursor)

    def forget(self, rows: list[bool]) -> None:
        """Clears the given rows of the batch; the others' queries do not depend on their company."""
        if all(rows):
            self.clear()
        else:
            self.positions[torch.tensor(rows, device=self.positions.device)] = -1
            self.cursor = [0 if gone else n for n, gone in zip(self.cursor, rows, strict=True)]

    def take_back(self, counts: list[int]) -> None:
        """Removes the newest ``counts[b]`` queries of each row; what they have pushed out does not come back."""
        size = self.positions.shape[1]
        for row, (count, end) in enumerate(zip(counts, self.cursor, strict=True)):
            left = max(end - count, 0)
            self.positions[row, [i % size for i in range(max(left, end - size), end)]] = -1
            self.cursor[row] = left if left > end - size else 0

    def select(self, rows: Tensor) -> None:
        """Reorders the batch."""
        index = rows.tolist()
        with torch.inference_mode(False):
            self.queries, self.positions = self.queries[index], self.positions[index]
        self.cursor = [self.cursor[row] for row in index]

    def clone(self) -> QueryRing:
        """A deep copy."""
        out = copy.copy(self)
        out.select(torch.arange(len(self.cursor)))
        return out


class QueryBlocks:
    """Probabilities of all queries over all rows, a block of queries at a time; legend M = G * Q of a block."""

    def __init__(self, view: RowView) -> None:
        if view.queries is None or view.query_positions is None:
            raise ValueError("these rows carry no queries: the method must list 'queries' in its needs")
        self.view = view
        self.dtype = torch.promote_types(view.keys.dtype, torch.float32)
        batch, self.kv_heads, rows, dim = view.keys.shape
        self.heads = batch * self.kv_heads
        self.keys = view.keys.reshape(self.heads, rows, dim).to(self.dtype)
        self.n = torch.where(view.valid, view.cardinality, 0).reshape(self.heads, 1, rows).to(self.dtype)
        self.absent = None if bool(view.valid.all()) else ~view.valid.reshape(self.heads, 1, rows)
        self.positions = view.positions.reshape(self.heads, rows)
        per_query = batch * view.queries.shape[1] * rows
        self.size = max(1, min(view.queries.shape[2], block_elements(view.keys.device) // max(per_query, 1)))

    def __iter__(self) -> Iterator[QueryBlock]:
        queries, positions, lse = self.view.queries, self.view.query_positions, self.view.query_lse
        assert queries is not None and positions is not None
        batch, heads, total, dim = queries.shape
        group = heads // self.kv_heads
        for begin in range(0, total, self.size):
            end = min(begin + self.size, total)
            q = queries[:, :, begin:end].reshape(self.heads, group * (end - begin), dim).to(self.dtype)
            at = positions[:, None, None, begin:end].expand(batch, self.kv_heads, group, -1).reshape(self.heads, -1)
            known = None if lse is None else lse[:, :, begin:end].reshape(self.heads, -1).to(self.dtype)
            yield self._block(q, at, known)

    def _block(self, q: Tensor, at: Tensor, lse: Tensor | None) -> QueryBlock:
        logits = torch.bmm(q * self.view.scale, self.keys.transpose(1, 2))
        seen = at.masked_fill(at < 0, torch.iinfo(torch.int64).max).amin()
        # Rows lie by ascending position: all before this column are seen by every query of the block. On a GPU, to ask
        # is to wait.
        asked = self.absent is None and not at.is_cuda
        first = int((self.positions <= seen).sum(1).amin()) if asked else 0
        weights = logits.clone()
        tail = weights[..., first:]
        later = self.positions[:, None, first:] > at[..., None]
        tail.masked_fill_(later if self.absent is None else later | self.absent[..., first:], -torch.inf)
        if lse is None:
            lse = (weights + self.n.log()).logsumexp(-1)
        # A query that is absent, or sees nothing, has no probabilities: exp(-inf), not NaN.
        lse = torch.where((at < 0) | torch.isneginf(lse), torch.inf, lse)
        return QueryBlock(q, logits, weights.sub_(lse[..., None]).exp_(), self.n)


@dataclass
class QueryBlock:
    """A block of queries, heads flattened.

    ``queries [B * H_kv, M, D]``; ``logits [B * H_kv, M, T]`` scaled, without log n; ``per_token`` the same shape, the
    probability of one token of each row; ``n [B * H_kv, 1, T]``, 0 where absent.
    """

    queries: Tensor
    logits: Tensor
    per_token: Tensor
    n: Tensor

    @property
    def probs(self) -> Tensor:
        """Probabilities of rows, cardinality included; overwrites ``per_token``."""
        return self.per_token.mul_(self.n)


def sampled(view: RowView, most: int | None) -> RowView:
    """The view with at most ``most`` queries per row of the batch, evenly spaced over its own; None = all."""
    queries, positions = view.queries, view.query_positions
    if most is None or queries is None or positions is None or queries.shape[2] <= most:
        return view
    count = (positions >= 0).sum(1, keepdim=True)
    slot = torch.arange(most, device=positions.device)
    # Own counts decide, so that the choice does not depend on what a row is batched with.
    return _with_queries(view, torch.where(count > most, slot * count // most, slot))


def newest(view: RowView, count: int) -> RowView:
    """The view with the ``count`` newest queries of each row of the batch; all where there are fewer."""
    positions = view.query_positions
    if positions is None or positions.shape[1] <= count:
        return view
    return _with_queries(view, positions.argsort(dim=1, descending=True, stable=True)[:, :count])


def _with_queries(view: RowView, index: Tensor) -> RowView:
    """The view with the queries at ``index [B, n]`` only."""
    queries, positions = view.queries, view.query_positions
    assert queries is not None and positions is not None
    wide = index[:, None].expand(-1, queries.shape[1], -1)

    def take(rows: Tensor | None) -> Tensor | None:
        return None if rows is None else rows.gather(2, wide[..., None].expand(-1, -1, -1, rows.shape[3]))

    return dataclasses.replace(
        view,
        queries=take(queries),
        query_positions=positions.gather(1, index),
        query_lse=None if view.query_lse is None else view.query_lse.gather(2, wide),
        query_out=take(view.query_out),
        raw_queries=take(view.raw_queries),
    )


def attention_mass(view: RowView, *, per_query_head: bool = False) -> Tensor:
    """Attention that each row received, cardinality included, summed over queries.

    Returns:
        ``[B, H_kv, T]`` summed over the query heads of a group; ``[B, H_kv, G, T]`` with ``per_query_head``.
    """
    batch, kv_heads, rows = view.valid.shape
    if row_ops.native_columns(view.keys) and view.query_lse is not None:
        query, keys, *rest = _columns(view)
        mass = row_ops.attention_mass(query, keys, *rest, view.scale).view(batch, kv_heads, -1, rows)
        return mass if per_query_head else mass.sum(2)
    total: Tensor | None = None
    for block in QueryBlocks(view):
        per_token = block.per_token
        if per_query_head:
            assert view.queries is not None
            per_token = per_token.view(batch * kv_heads, view.queries.shape[1] // kv_heads, -1, rows)
        mass = per_token.sum(-2)
        total = mass if total is None else total + mass
    assert total is not None
    n = torch.where(view.valid, view.cardinality, 0).to(total.dtype)
    if per_query_head:
        return total.view(batch, kv_heads, -1, rows) * n[:, :, None]
    return total.view(batch, kv_heads, rows) * n


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
    square, product = (x.view(*view.valid.shape, -1) for x in _curvature_sums(view))
    return turned_back(square, product, view.rope, view.rotary_positions) * view.scale**2


def turned_back(square: Tensor, product: Tensor, rope: Rope, positions: Tensor) -> Tensor:
    """Sums of squares of queries, turned back by the rotary position of each row.

    Turning back by angle a gives (q_d cos a + q_d' sin a)^2 and (q_d' cos a - q_d sin a)^2, d' = d + D/2.

    Args:
        square: ``[..., T, D]``, sums of ``q_d^2``, the queries as they were rotated.
        product: ``[..., T, D / 2]``, sums of ``q_d q_d'``.
        rope: the model's.
        positions: ``[..., T]`` that the rows' keys are rotated to.

    Returns:
        ``[..., T, D]`` >= 0.
    """
    half = square.shape[-1] // 2
    unit = torch.zeros_like(square)
    unit[..., :half] = 1
    turned = rope.rotate(unit, positions)
    cos, sin = turned[..., :half], turned[..., half:]
    first, second = square[..., :half], square[..., half:]
    low = first * cos**2 + second * sin**2 + 2 * product * cos * sin
    high = second * cos**2 + first * sin**2 - 2 * product * cos * sin
    return torch.cat((low, high), dim=-1).clamp(min=0)


def _curvature_sums(view: RowView) -> tuple[Tensor, Tensor]:
    """``sum e q_d^2 [B * H_kv, T, D]`` and ``sum e q_d q_(d + D/2) [B * H_kv, T, D / 2]``, e the output energy."""
    one_width = view.keys.shape[-1] == view.values.shape[-1]
    if one_width and row_ops.native_columns(view.keys) and view.query_lse is not None and view.query_out is not None:
        query, keys, *rest = _columns(view)
        values, out = view.values.flatten(0, 1), view.query_out.reshape(query.shape).contiguous()
        return row_ops.key_curvature(query, keys, values, *rest, out, view.scale)
    half = view.keys.shape[-1] // 2
    values = _values(view)
    square: Tensor | float = 0.0
    product: Tensor | float = 0.0
    for block in QueryBlocks(view):
        energy = _output_energy(block.probs, values)[0].transpose(1, 2)  # [B * H_kv, T, M]
        q = block.queries
        square = square + energy @ q.square()
        product = product + energy @ (q[..., :half] * q[..., half:])
    assert isinstance(square, Tensor) and isinstance(product, Tensor)
    return square, product


def _columns(view: RowView) -> tuple[Tensor, ...]:
    """Arguments of the compiled column sums: query, keys, log_n, position, query_position, lse."""
    assert view.queries is not None and view.query_positions is not None and view.query_lse is not None
    batch, kv_heads, _ = view.valid.shape
    _, heads, queries, dim = view.queries.shape
    query = view.queries.reshape(batch * kv_heads, heads // kv_heads, queries, dim).contiguous()
    at = view.query_positions[:, None].expand(-1, kv_heads, -1).reshape(-1, queries).contiguous()
    lse = view.query_lse.reshape(query.shape[:3]).contiguous()
    return query, view.keys.flatten(0, 1), view.bias().flatten(0, 1), view.positions.flatten(0, 1), at, lse


def _values(view: RowView) -> Tensor:
    """``[B * H_kv, T, D]`` in the dtype of the arithmetic."""
    return view.values.flatten(0, 1).to(torch.promote_types(view.values.dtype, torch.float32))


def _output_energy(probs: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``|u|^2 = p^2 |v - o|^2`` of each query and row ``[B * H_kv, M, T]``; ``v.o``; and ``|o|^2 [B * H_kv, M, 1]``."""
    out = probs @ values
    cross = out @ values.transpose(1, 2)
    square = out.square().sum(-1, keepdim=True)
    distance = torch.add(values.square().sum(-1)[:, None] + square, cross, alpha=-2).clamp_(min=0)
    return distance.mul_(probs).mul_(probs), cross, square


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
    values = _values(view)
    inner = (values[:, 1:] * values[:, :-1]).sum(-1)[:, None]
    sums: list[Tensor] = []
    for block in QueryBlocks(view):
        p = block.probs
        energy, cross, square = _output_energy(p, values)
        distance = (block.logits[..., 1:] - block.logits[..., :-1]).square_()
        mixed = (inner + square).sub_(cross[..., :-1]).sub_(cross[..., 1:]).mul_(p[..., :-1]).mul_(p[..., 1:])
        found = [(distance * x).sum(1) for x in (energy[..., :-1], mixed, energy[..., 1:])]
        sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
    shape = (*view.valid.shape[:2], -1)
    a, b, c = (x.view(shape) for x in sums)
    return PairCost(a, b, c)
