"""Attention over a ragged layer, and the registry of backends.

Every backend has one contract: ``out, lse`` of Locally Merged Attention over the rows of each KV head.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from asymkv.ops import reference, sdpa
from asymkv.ops.reference import lma_attention

if TYPE_CHECKING:
    from asymkv.layer import CompressedLayer

__all__ = ["BACKENDS", "lma_attention", "ragged_attention", "resolve_backend"]

BACKENDS = {"sdpa": sdpa.biased_attention, "reference": reference.biased_attention}


def resolve_backend(name: str) -> str:
    """The backend in force: ``name``, or for "auto" ``ASYMKV_BACKEND``, or "sdpa".

    Raises:
        ValueError: for an unknown name; lists the known ones.
    """
    found = os.environ.get("ASYMKV_BACKEND", "sdpa") if name == "auto" else name
    if found not in BACKENDS:
        raise ValueError(f"unknown backend {found!r}; allowed: {['auto', *BACKENDS]}")
    return found


def ragged_attention(
    query: Tensor,
    layer: CompressedLayer,
    *,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Locally Merged Attention of queries over all rows that a layer stores.

    Args:
        query: ``[B, H, Q, D]``, rotated.
        layer: the rows; each KV head serves ``H / H_kv`` query heads.
        query_positions: ``[B, Q]`` positions in each row's own tokens: a query sees rows up to its own position. None:
            every query sees every row (decode of the newest token).
        scale: factor of ``q.k``; None = ``D ** -0.5``.
        backend: a name in ``BACKENDS``, or "auto".

    Returns:
        ``out [B, H, Q, D]`` in the query's dtype, ``lse [B, H, Q]`` in fp32 (fp64 for fp64 input); 0 and -inf where a
        query sees no row.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    attend = BACKENDS[resolve_backend(backend)]
    rows = layer.storage
    if attend is sdpa.biased_attention and query_positions is not None and layer.only_own_tokens(query.shape[2]):
        return sdpa.causal_attention(query, layer.dense("keys"), layer.dense("values"), scale)
    bias = row_bias(rows.log_n(), rows.valid(), layer.dense("position"), query_positions, layer.kv_heads)
    return attend(query, layer.dense("keys"), layer.dense("values"), bias, scale)


def row_bias(
    log_n: Tensor | None, valid: Tensor | None, positions: Tensor, query_positions: Tensor | None, kv_heads: int
) -> Tensor:
    """Additive logit bias: log n of a row, -inf where it is absent or lies after the query.

    Args:
        log_n: ``[B * H_kv, T]`` fp32, or None if every row is a single token.
        valid: ``[B * H_kv, T]`` bool, or None if every row is present.
        positions: ``[B, H_kv, T]``.
        query_positions: ``[B, Q]`` or None.

    Returns:
        ``[B, H_kv, Q or 1, T]`` fp32.
    """
    batch, _, width = positions.shape
    bias = torch.zeros(1, 1, 1, 1, device=positions.device) if log_n is None else log_n.view(batch, kv_heads, 1, width)
    hidden = None if valid is None else ~valid.view(batch, kv_heads, 1, width)
    if query_positions is not None:
        later = positions[:, :, None] > query_positions[:, None, :, None]
        hidden = later if hidden is None else hidden | later
    if hidden is not None:
        bias = torch.where(hidden, -torch.inf, bias)
    return bias.expand(batch, kv_heads, -1, width)
