"""Plain PyTorch references: the specification that fast code is accepted against."""

from __future__ import annotations

import torch
from torch import Tensor


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
    return out.reshape(batch, heads, queries, -1).to(query.dtype), lse.reshape(batch, heads, queries)


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
        cardinality: ``[B, H_kv, T]``, tokens a row stands for; 0 = absent row.
        scale: factor of ``q.k``; None = ``D ** -0.5``.
        causal_tail: the last so many rows are the queries' own tokens, causal among themselves.

    Returns:
        ``out [B, H, Q, D_v]`` in the query's dtype; ``lse [B, H, Q]``, the natural log of the denominator, in fp32
        (fp64 for fp64 input). No row at all: out 0, lse -inf.

    Raises:
        ValueError: for shapes that do not fit.
    """
    if query.ndim != 4 or keys.ndim != 4 or query.shape[1] % keys.shape[1]:
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
    bias = torch.log(cardinality.to(compute_dtype(query)))[:, :, None]
    if causal_tail:
        bias = bias + causal_tail_bias(query.shape[2], keys.shape[2], causal_tail, query.device)
    return biased_attention(query, keys, values, bias, query.shape[-1] ** -0.5 if scale is None else scale)
