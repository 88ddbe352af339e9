"""Attention over a ragged layer, and the ops on its rows.

Every backend has one contract: ``out, lse`` of Locally Merged Attention over the rows of each KV head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from asymkv.ops.backends import BACKENDS, Problem, differentiable_attention, resolve_backend, row_bias
from asymkv.ops.reference import lma_attention

if TYPE_CHECKING:
    from asymkv.layer import CompressedLayer

__all__ = [
    "BACKENDS", "differentiable_attention", "lma_attention", "ragged_attention", "resolve_backend", "row_bias"
]  # fmt: skip


def ragged_attention(
    query: Tensor,
    layer: CompressedLayer,
    *,
    query_positions: Tensor | None = None,
    counts: list[int] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Locally Merged Attention of queries over all rows that a layer stores.

    Args:
        query: ``[B, H, Q, D]``, rotated, in the coordinates of the stored keys.
        layer: the rows; each KV head serves ``H / H_kv`` query heads.
        query_positions: ``[B, Q]`` positions in each row's own tokens: a query sees rows up to its own position. None:
            every query sees every row (decode of the newest token).
        counts: how many of the Q columns are tokens, per row of the batch, if their rows are the newest of each head.
        scale: factor of ``q.k``; None = ``D ** -0.5``.
        backend: a name in ``BACKENDS``, or "auto".

    Returns:
        ``out [B, H, Q, D_v]`` in the query's dtype, ``lse [B, H, Q]`` in fp32 (fp64 for fp64 input); 0 and -inf where a
        query sees no row.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if backend not in BACKENDS:
        widths = [(query.shape[-1], layer.storage.columns["values"].shape[-1])]
        backend = resolve_backend(backend, query.device, query.shape[-1], query.dtype, widths)
    return BACKENDS[backend].attend(Problem(query, layer.storage, query_positions, counts, scale))
