"""Plain PyTorch references: the specification that fast code is accepted against."""

from __future__ import annotations

import torch
from torch import Tensor

from asymkv.ops import checks


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 input: the dtype of logits, exp and sums."""
    return torch.promote_types(x.dtype, torch.float32)


def biased_attention(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention with an additive logit bias (log cardinality; -inf = not seen).

    Args:
        query: ``[B, H, Q, D]``.
        keys: ``[B, H_kv, T, D]``.
        values: ``[B, H_kv, T, D_v]``.
        bias: broadcasts to ``[B, H_kv, Q, T]``.
        scale: factor of the logits.

    Returns:
        ``out [B, H, Q, D_v]`` in the query's dtype and ``lse [B, H, Q]`` in fp32 (fp64 for fp64 input); a query that
        sees no row gets 0 and -inf.
    """
    dtype = compute_dtype(query)
    batch, heads, queries, dim = query.shape
    kv_heads, rows = keys.shape[1], keys.shape[2]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, queries, dim).to(dtype)
    logits = torch.einsum("bhgqd,bhtd->bhgqt", grouped, keys.to(dtype)) * scale + bias.to(dtype)[:, :, None]
    top = logits.amax(-1, keepdim=True) if rows else logits.new_full((*logits.shape[:-1], 1), -torch.inf)
    weights = torch.exp(logits - torch.where(top.isinf(), 0, top))
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("bhgqt,bhtd->bhgqd", weights, values.to(dtype)) / torch.where(total == 0, 1, total)
    lse = (top + torch.log(total)).squeeze(-1)
    return out.reshape(batch, heads, queries, values.shape[-1]).to(query.dtype), lse.reshape(batch, heads, queries)


def causal_tail_bias(queries: int, rows: int, tail: int, device: torch.device) -> Tensor:
    """``[queries, rows]``: -inf where query i would look past its own row in the last ``tail`` rows, else 0."""
    own = torch.arange(rows, device=device)[None] - (rows - tail)
    last = torch.arange(queries, device=device)[:, None] + (tail - queries)
    return torch.zeros(queries, rows, device=device).masked_fill(own > last, -torch.inf)


def lma_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cardinality: Tensor,
    *,
    scale: float | None = None,
    causal_tail: int = 0,
) -> tuple[Tensor, Tensor]:
    """Locally Merged Attention (AsymKV, arXiv 2506.05410, section 1.4 of the method) over dense rows.

    ``out = sum_i n_i exp(s q.k_i) v_i / sum_i n_i exp(s q.k_i)``: softmax over ``s q.k + log n`` with mean values, so
    that rows with equal keys merge losslessly. ``n = 1`` everywhere is ordinary attention.

    Args:
        query: ``[B, H, Q, D]``.
        keys: ``[B, H_kv, T, D]`` with ``H`` a multiple of ``H_kv``.
        values: ``[B, H_kv, T, D_v]``, means of the members of a row.
        cardinality: ``[B, H_kv, T]``, tokens a row stands for; 0 = absent row, whatever its key and value hold.
        scale: factor of ``q.k``; None = ``D ** -0.5``.
        causal_tail: the last so many rows are the queries' own tokens, causal among themselves.

    Returns:
        ``out [B, H, Q, D_v]`` in the query's dtype; ``lse [B, H, Q]``, the natural log of the denominator, in fp32
        (fp64 for fp64 input). No row at all: out 0, lse -inf.

    Raises:
        ValueError: for shapes that do not fit.
    """
    shapes = query.ndim == keys.ndim == 4 and query.shape[::3] == keys.shape[::3] and keys.shape[1]
    if not shapes or query.shape[1] % keys.shape[1]:
        raise ValueError(f"query [B, H, Q, D] and keys [B, H_kv, T, D], H a multiple of H_kv; found "
                         f"{tuple(query.shape)} and {tuple(keys.shape)}")
    if values.shape[:3] != keys.shape[:3] or cardinality.shape != keys.shape[:3]:
        raise ValueError(f"values and cardinality must match keys {tuple(keys.shape[:3])}; found "
                         f"{tuple(values.shape)} and {tuple(cardinality.shape)}")
    if not 0 <= causal_tail <= keys.shape[2] or (causal_tail and causal_tail < query.shape[2]):
        raise ValueError(f"causal_tail must be 0, or from the number of queries {query.shape[2]} to that of rows "
                         f"{keys.shape[2]}; found {causal_tail}")
    if (cardinality < 0).any():
        raise ValueError(f"cardinality must be >= 0; found {cardinality.min().item()}")
    absent = (cardinality == 0)[..., None]
    if absent.any():  # a probability of 0 times what is not finite would not be 0
        keys, values = keys.masked_fill(absent, 0), values.masked_fill(absent, 0)
    bias = torch.log(cardinality.to(compute_dtype(query)))[:, :, None]
    if causal_tail:
        bias = bias + causal_tail_bias(query.shape[2], keys.shape[2], causal_tail, query.device)
    return biased_attention(query, keys, values, bias, query.shape[-1] ** -0.5 if scale is None else scale)


def ragged_append_(
    keys: Tensor, values: Tensor, cardinality: Tensor, log_n: Tensor, position: Tensor, length: Tensor, start: Tensor,
    capacity: Tensor, new_keys: Tensor, new_values: Tensor, new_position: Tensor,
    new_cardinality: Tensor | None = None, counts: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes new rows behind each head's own, in place, and lengthens the heads.

    Args:
        keys: ``[R, D]`` and values ``[R, D_v]``, flat buffers; cardinality, position ``[R]`` int32; log_n ``[R]`` fp32.
        length: ``[N]`` int64 rows of each head, updated; ``start`` and ``capacity`` ``[N]`` int64 where its run lies.
        new_keys: ``[N, t, D]`` any strides but dense rows; new_values likewise; new_position ``[N, t]`` int32.
        new_cardinality: ``[N, t]`` int32 >= 1, None = 1.
        counts: ``[N]`` int64 rows to take per head, from the first; None = t.

    Raises:
        ValueError: for arguments that do not fit, by name; nothing is written then.
    """
    checks.check_append(keys, values, cardinality, log_n, position, length, start, capacity, new_keys, new_values,
                        new_position, new_cardinality, counts)  # fmt: skip
    checks.check_runs(start, length, capacity, keys.shape[0])
    new = new_keys.shape[1]
    take = [new] * length.shape[0] if counts is None else counts.tolist()
    for h, (n, room) in enumerate(zip(take, (capacity - length).tolist(), strict=True)):
        checks.check(0 <= n <= new, f"counts must lie in [0, {new}]; head {h} has {n}")
        checks.check(n <= room, f"capacity must hold the new rows; head {h} has room for {room} and gets {n}")
    if new_cardinality is not None:
        bad = any(bool((row[:n] < 1).any()) for row, n in zip(new_cardinality, take, strict=True))
        checks.check(not bad, "new_cardinality must be >= 1")
    for h, n in enumerate(take):
        at = slice(int(start[h] + length[h]), int(start[h] + length[h]) + n)
        keys[at], values[at], position[at] = new_keys[h, :n], new_values[h, :n], new_position[h, :n]
        cardinality[at] = 1 if new_cardinality is None else new_cardinality[h, :n]
        log_n[at] = cardinality[at].double().log().float()
        length[h] += n


def compaction_layout(destination: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows become one, in the order in which they are stored: groups by their last member.

    Args:
        destination: ``[N, T]`` int64, a row of the group that each row joins, its own destination; -1 = dropped.
        length: ``[N]`` int64, rows of each head; entries behind are ignored.

    Returns:
        order ``[N, T]`` int32, rows by (group, index), dropped and absent ones last; offset ``[N, T + 1]`` int32,
        where each group begins in it (groups that do not exist are empty); count ``[N]`` int64 of groups.

    Raises:
        ValueError: for a malformed plan.
    """
    checks.check_layout(destination, length)
    heads, width = destination.shape
    checks.check(bool(((length >= 0) & (length <= width)).all()), f"length must lie in [0, {width}]")
    index = torch.arange(width, device=destination.device)
    inside = index < length[:, None]
    target = torch.where(inside, destination, -1)
    kept = target >= 0
    bounds = (target >= -1) & (target < length[:, None]) | ~inside
    checks.check(bool(bounds.all()), f"destination must lie in [-1, {int(length.max()) if heads else 0})")
    own = target.clamp(min=0)
    fixed = target.gather(1, own) == own if width else kept
    checks.check(bool(fixed[kept].all()), "destination must be a row that is its own destination")
    newest = torch.full_like(target, -1).scatter_reduce_(1, own, torch.where(kept, index, -1), "amax")
    last = kept & (newest.gather(1, own) == index)
    slot = last.cumsum(1).sub_(1).gather(1, newest.gather(1, own).clamp(min=0))
    slot = torch.where(kept, slot, width)
    order = slot.argsort(dim=1, stable=True)
    members = torch.zeros(heads, width + 1, dtype=torch.int64, device=slot.device).scatter_add_(1, slot, kept.long())
    offset = torch.nn.functional.pad(members[:, :width].cumsum(1), (1, 0))
    return order.int(), offset.int(), last.sum(1)


def ragged_compact(
    keys: Tensor, values: Tensor, cardinality: Tensor, position: Tensor, rotary: Tensor, statistics: list[Tensor],
    key_weight: Tensor | None, order: Tensor, offset: Tensor, inv_freq: Tensor, target_rotary: Tensor | None,
    out_start: Tensor, out_keys: Tensor, out_values: Tensor, out_cardinality: Tensor, out_log_n: Tensor,
    out_position: Tensor, out_statistics: list[Tensor],
) -> None:  # fmt: skip
    """Keeps, drops and merges rows into a fresh buffer.

    A row alone in its group keeps its bits, its key turned if the position policy moves it. Members of a group become
    one row: values by cardinality, cardinalities and statistics added, position of the last member, keys by weight in
    pre-RoPE coordinates, turned forward again. Arithmetic in fp32 (fp64 for fp64 rows), angles formed in fp32.

    Args:
        keys: ``[N, T, D]``, values ``[N, T, D_v]``, cardinality and position ``[N, T]`` int32, rotary ``[N, T]`` int64
            position that a key is rotated to; statistics ``[N, T]`` or ``[N, T, E]``.
        key_weight: ``[N, T, 1]`` or ``[N, T, D]`` fp32 (fp64) >= 0; None, or all 0 in a group = cardinality.
        order, offset: of :func:`compaction_layout`.
        inv_freq: ``[D / 2]`` fp32, angle per position.
        target_rotary: ``[N, T]`` int64 rotary position of each group; None = of the last member (its position).
        out_start: ``[N]`` int64; groups of head h go to flat rows ``out_start[h], ...`` of the ``out_`` buffers.

    Raises:
        ValueError: for arguments that do not fit, by name; nothing is written then.
    """
    args = (keys, values, cardinality, position, rotary, statistics, key_weight, order, offset, inv_freq, target_rotary,
            out_start, out_keys, out_values, out_cardinality, out_log_n, out_position, out_statistics)  # fmt: skip
    checks.check_compact(*args)
    compact_rows(*args)


def compact_rows(
    keys: Tensor, values: Tensor, cardinality: Tensor, position: Tensor, rotary: Tensor, statistics: list[Tensor],
    key_weight: Tensor | None, order: Tensor, offset: Tensor, inv_freq: Tensor, target_rotary: Tensor | None,
    out_start: Tensor, out_keys: Tensor, out_values: Tensor, out_cardinality: Tensor, out_log_n: Tensor,
    out_position: Tensor, out_statistics: list[Tensor],
) -> None:  # fmt: skip
    """:func:`ragged_compact` for rows of any width."""
    head, slot, row = _members(order, offset, cardinality)
    size = (offset[:, 1:] - offset[:, :-1])[head, slot].long()
    target = (position.gather(1, _last_member(order, offset)) if target_rotary is None else target_rotary)[head, slot]
    flat = out_start[head] + slot
    checks.check(_apart(out_start, (offset[:, 1:] > offset[:, :-1]).sum(1), out_keys.shape[0]),
                 "out_start must leave every head its own rows inside out_keys")  # fmt: skip
    alone = size == 1
    single, several = (head[alone], row[alone]), (head[~alone], row[~alone])
    shift = torch.zeros_like(rotary[single]) if target_rotary is None else target[alone] - rotary[single]
    out_keys[flat[alone]] = _turn(keys[single], shift, inv_freq)
    pairs = [(values, out_values), (cardinality, out_cardinality), (position, out_position)]
    for source, out in [*pairs, *zip(statistics, out_statistics, strict=True)]:
        out[flat[alone]] = source[single]
    out_log_n[flat[alone]] = cardinality[single].double().log().float()
    rows, member = flat[~alone].unique(return_inverse=True)
    n = cardinality[several].to(compute_dtype(keys))[:, None]
    sum_n = _total(n, member, rows)
    out_values[rows] = (_total(n * values[several].to(n.dtype), member, rows) / sum_n).to(values.dtype)
    out_cardinality[rows] = _total(cardinality[several].long(), member, rows).int()
    out_log_n[rows] = sum_n[:, 0].log().float()
    newest = torch.full_like(rows, -1).scatter_reduce_(0, member, row[~alone], "amax")
    out_position[rows] = position[several[0].new_zeros(len(rows)).scatter_(0, member, several[0]), newest]
    for source, out in zip(statistics, out_statistics, strict=True):
        out[rows] = _total(source[several].to(compute_dtype(source)), member, rows).to(out.dtype)
    pre = _turn(keys[several].to(n.dtype), -rotary[several], inv_freq)
    merged = _total(n * pre, member, rows) / sum_n
    if key_weight is not None:
        merged = _weighted(key_weight[several], pre, member, rows, merged)
    at = torch.zeros_like(rows).scatter_(0, member, target[~alone].long())
    out_keys[rows] = _turn(merged, at, inv_freq).to(keys.dtype)


def _total(x: Tensor, member: Tensor, rows: Tensor) -> Tensor:
    """Sums of the members of each merged row."""
    return x.new_zeros(len(rows), *x.shape[1:]).index_add_(0, member, x)


def _members(order: Tensor, offset: Tensor, cardinality: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Head, group and row of every kept row, by (head, group, row)."""
    heads, width = order.shape
    rising = (offset[:, 1:] >= offset[:, :-1]).all(1) & (offset[:, 0] == 0) & (offset[:, -1] <= width)
    empty = (offset[:, 1:] == offset[:, :-1]).int()
    checks.check(bool(rising.all()) and bool((empty.diff(dim=1) >= 0).all()),
                 f"offset must ascend from 0 up to {width}, with its empty groups last")  # fmt: skip
    kept = torch.arange(width, device=order.device) < offset[:, -1:]
    head, place = kept.nonzero(as_tuple=True)
    row = order[kept].long()
    checks.check(bool(((row >= 0) & (row < width)).all()), f"order must lie in [0, {width})")
    checks.check(bool((cardinality[head, row] >= 1).all()), "cardinality must be >= 1")
    slot = torch.searchsorted(offset[:, 1:].contiguous(), torch.arange(width, device=order.device).int().expand_as(
        order).contiguous(), right=True)  # fmt: skip
    return head, slot[head, place], row


def _last_member(order: Tensor, offset: Tensor) -> Tensor:
    """``[N, T]``: last row of each group, 0 where there is none."""
    return order.gather(1, (offset[:, 1:].long() - 1).clamp(min=0)).long()


def _apart(start: Tensor, count: Tensor, rows: int) -> bool:
    """Whether runs ascend inside a buffer without touching each other."""
    end = start + count
    return bool((start >= torch.nn.functional.pad(end[:-1], (1, 0))).all()) and bool((end <= rows).all())


def _turn(rows: Tensor, by: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotates keys ``[M, D]`` forward by ``by [M]`` positions in fp32 (fp64); unmoved ones keep their bits."""
    compute = compute_dtype(rows)
    angle = (by[:, None].float() * inv_freq).to(compute)
    cos, sin = angle.cos(), angle.sin()
    low, high = rows.to(compute).chunk(2, dim=-1)
    turned = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
    return torch.where((by == 0)[:, None], rows, turned.to(rows.dtype))


def _weighted(weight: Tensor, pre: Tensor, member: Tensor, rows: Tensor, by_count: Tensor) -> Tensor:
    """Weighted means per group and dimension; ``by_count`` where all weights are 0."""
    # Normalised before summing: squared gradients may be as small as 1e-30.
    top = torch.zeros(len(by_count), weight.shape[1], dtype=weight.dtype, device=weight.device)
    top.scatter_reduce_(0, member[:, None].expand_as(weight), weight, "amax")
    weight = weight / torch.where(top > 0, top, 1)[member]
    mean = _total(weight * pre, member, rows) / _total(weight, member, rows).clamp(min=0.5)
    return torch.where(top > 0, mean, by_count)


def lma_decode(
    query: Tensor, keys: Tensor, values: Tensor, log_n: Tensor | None, start: Tensor, length: Tensor, scale: float,
    position: Tensor | None = None, query_position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Locally Merged Attention of a few queries over the rows of each head of a flat buffer.

    Args:
        query: ``[N, M, D]``: the queries of a KV head, its group of query heads included.
        keys: ``[R, D]``; values ``[R, D_v]``; log_n ``[R]`` fp32, None = all rows are single tokens.
        start, length: ``[N]`` int64.
        scale: factor of the logits.
        position: ``[R]`` int32 and query_position ``[N, M]`` int64: a query sees rows up to its own position.

    Returns:
        out ``[N, M, D_v]``, lse ``[N, M]`` fp32 (fp64 for fp64 rows); 0 and -inf where a query sees nothing.
    """
    if keys.dtype != torch.float64:
        checks.check_decode(query, keys, values, log_n, start, length, scale, position, query_position)
    checks.check_runs(start, length, None, keys.shape[0])
    outs, sums = [], []
    for h, (first, n) in enumerate(zip(start.tolist(), length.tolist(), strict=True)):
        run = slice(first, first + n)
        bias = keys.new_zeros(1, n, dtype=torch.float32) if log_n is None else log_n[None, run]
        if position is not None and query_position is not None:
            bias = torch.where(position[None, run] > query_position[h][:, None], -torch.inf, bias)
        out, lse = biased_attention(query[None, h : h + 1], keys[None, None, run], values[None, None, run],
                                    bias[None, None], scale)  # fmt: skip
        outs.append(out[0, 0])
        sums.append(lse[0, 0])
    if not outs:
        nothing = query.new_zeros(*query.shape[:2], values.shape[1])
        return nothing, query.new_zeros(query.shape[:2], dtype=compute_dtype(query))
    return torch.stack(outs), torch.stack(sums)


def column_probabilities(
    query: Tensor, keys: Tensor, log_n: Tensor, position: Tensor, query_position: Tensor, lse: Tensor, scale: float
) -> Tensor:
    """Attention probabilities ``[N, G, Q, T]``, cardinality included: 0 where a query is absent or saw nothing."""
    compute = compute_dtype(query)
    logits = torch.einsum("ngqd,ntd->ngqt", query.to(compute), keys.to(compute)) * scale
    logits = logits + log_n[:, None, None].to(compute)
    hidden = position[:, None] > query_position[..., None]
    nothing = torch.isneginf(lse)[..., None] | (query_position < 0)[:, None, :, None]
    weights = (logits - torch.where(nothing, 0, lse[..., None].to(compute))).exp()
    return weights.masked_fill(hidden[:, None] | nothing, 0)


def attention_mass(
    query: Tensor, keys: Tensor, log_n: Tensor, position: Tensor, query_position: Tensor, lse: Tensor, scale: float
) -> Tensor:
    """Attention that each row receives, summed over queries.

    Args:
        query: ``[N, G, Q, D]``; keys ``[N, T, D]``; log_n ``[N, T]`` fp32, -inf = absent; position ``[N, T]`` int32.
        query_position: ``[N, Q]`` int64, -1 = absent; lse ``[N, G, Q]`` fp32 of each query over these rows.
        scale: factor of the logits.

    Returns:
        ``[N, G, T]`` fp32.
    """
    if query.dtype != torch.float64:
        checks.check_statistics(query, keys, keys, log_n, position, query_position, lse)
    return column_probabilities(query, keys, log_n, position, query_position, lse, scale).sum(2)


def key_curvature(
    query: Tensor, keys: Tensor, values: Tensor, log_n: Tensor, position: Tensor, query_position: Tensor, lse: Tensor,
    out: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums over queries from which the diagonal output Gauss-Newton of each key follows (section 5.4 of the method).

    With ``p`` a row's probability and ``e = p^2 |v - o|^2``: ``sum e q_d^2`` and ``sum e q_d q_(d + D/2)``.

    Args:
        query, keys, log_n, position, query_position, lse, scale: as in :func:`attention_mass`.
        values: ``[N, T, D]``; out ``[N, G, Q, D]``, the attention output of each query.

    Returns:
        ``[N, T, D]`` and ``[N, T, D / 2]`` fp32.
    """
    if query.dtype != torch.float64:
        checks.check_statistics(query, keys, values, log_n, position, query_position, lse, out)
    p = column_probabilities(query, keys, log_n, position, query_position, lse, scale)
    compute = compute_dtype(query)
    gap = values[:, None, None].to(compute) - out[:, :, :, None].to(compute)
    energy = p.square() * gap.square().sum(-1)
    q = query.to(compute)
    low, high = q.chunk(2, dim=-1)
    return torch.einsum("ngqt,ngqd->ntd", energy, q.square()), torch.einsum("ngqt,ngqd->ntd", energy, low * high)
