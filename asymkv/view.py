"""A layer's rows as methods see them: dense tensors, one padded table for all heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from asymkv.rope import Rope

if TYPE_CHECKING:
    from asymkv.budgets.layers import Request


@dataclass
class RowView:
    """Rows of one layer at a compaction. Legend: B batch, H query heads, H_kv KV heads, T widest head, D head size.

    Rows of a head lie by ascending position; entries beyond ``lengths`` are absent (``valid`` False). A method that
    changes kept rows (CaM's values, upstream AsymKV) edits these tensors; the executor reads them.

    Args:
        keys: ``[B, H_kv, T, D]``, rotated to ``rotary_positions``.
        values: ``[B, H_kv, T, D]``, means of the members.
        cardinality: ``[B, H_kv, T]`` int32.
        positions: ``[B, H_kv, T]`` int32, own-token position of the last member.
        rotary_positions: ``[B, H_kv, T]`` int64, position a key is rotated to.
        valid: ``[B, H_kv, T]`` bool.
        lengths: ``[B, H_kv]`` int64, rows now.
        budget: ``[B, H_kv]`` int64, rows to keep.
        tokens: ``[B]`` int64, own tokens seen, the newest included.
        prompt: whether this follows a prefill chunk (else decode).
        queries: ``[B, H, Q, D]``, rotated, if the method needs them.
        query_positions: ``[B, Q]`` int64, -1 where absent.
        query_lse: ``[B, H, Q]``, the log-sum-exp of each query over these very rows, if it is known.
        query_out: ``[B, H, Q, D]``, the attention output of each query over these very rows, if it is known.
        statistics: per-row columns that ride along, ``[B, H_kv, T, ...]``.
        evidence: what is known for this compaction only, first dimensions ``[B, H_kv]``; gone afterwards.
        layer: index of the layer.
        raw_queries: ``[B, H, Q, D]``, the queries before RoPE, if they are at hand.
        requests: what was asked for, per row of the batch; None: nothing is to be lost there.
        output_weight: ``[hidden, H * D]``, the layer's output projection, if the method needs "output_weight".
        learned: what the method was taught of this layer beforehand (``Method.prepare_layers``), ``[H_kv, ...]``.
        memory: what the method remembers from one compaction of this layer to the next, tensors ``[B, ...]``; the
            layer's own dict, to be filled in place with new tensors.
        scale: factor of the logits.
        rope: the model's rotary embedding.
    """

    keys: Tensor
    values: Tensor
    cardinality: Tensor
    positions: Tensor
    rotary_positions: Tensor
    valid: Tensor
    lengths: Tensor
    budget: Tensor
    tokens: Tensor
    prompt: bool
    scale: float
    rope: Rope
    queries: Tensor | None = None
    query_positions: Tensor | None = None
    query_lse: Tensor | None = None
    query_out: Tensor | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)
    evidence: dict[str, Tensor] = field(default_factory=dict)
    layer: int = 0
    raw_queries: Tensor | None = None
    output_weight: Tensor | None = None
    requests: Sequence[Request | None] = ()
    learned: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)

    @property
    def excess(self) -> Tensor:
        """``[B, H_kv]``: rows that a head must lose."""
        return (self.lengths - self.budget).clamp(min=0)

    @property
    def context_tokens(self) -> Tensor:
        """``[B]`` int64: own tokens once the announced prompt is in, generated ones included; else those seen."""
        asked = [0 if request is None else request.longest for request in self.requests]
        return self.tokens.maximum(torch.tensor(asked, device=self.tokens.device)) if asked else self.tokens

    def protected(self, sink_size: int, window_size: int) -> Tensor:
        """``[B, H_kv, T]`` bool: sinks and the recent window, by position, and absent rows."""
        newest = (self.tokens - window_size)[:, None, None]
        return (self.positions < sink_size) | (self.positions >= newest) | ~self.valid

    def bias(self) -> Tensor:
        """``[B, H_kv, T]``: log n of a row, -inf where absent, in the dtype of the arithmetic."""
        dtype = torch.promote_types(self.keys.dtype, torch.float32)
        return torch.where(self.valid, self.cardinality.to(dtype).log(), -torch.inf)

    def queries_before_rope(self) -> Tensor:
        """``[B, H, Q, D]``: the queries as they were projected, turned back where they are not at hand."""
        if self.raw_queries is not None:
            return self.raw_queries
        if self.queries is None or self.query_positions is None:
            raise ValueError("these rows carry no queries: the method must list 'queries' in its needs")
        return self.rope.rotate(self.queries, -self.query_positions[:, None].expand(self.queries.shape[:3]))

    def unrotate(self, rows: Tensor) -> Tensor:
        """``[B, H_kv, T, D]`` in pre-RoPE coordinates of each row."""
        return self.rope.rotate(rows, -self.rotary_positions)


def lowest(score: Tensor, count: Tensor, allowed: Tensor) -> Tensor:
    """Marks the ``count`` lowest scores among the allowed entries of each head.

    Args:
        score: ``[B, H_kv, T]``.
        count: ``[B, H_kv]`` how many to take.
        allowed: ``[B, H_kv, T]`` bool.

    Returns:
        ``[B, H_kv, T]`` bool. Of equal scores the higher position is taken first, so that results are reproducible.
    """
    order = torch.where(allowed, score.nan_to_num(nan=torch.inf), torch.inf)
    # Not allowed entries sort behind allowed ones, also where an allowed score is infinite.
    by_score = score.shape[-1] - 1 - order.flip(-1).argsort(dim=-1, stable=True)
    by_score = by_score.gather(-1, (~allowed).gather(-1, by_score).to(torch.uint8).argsort(dim=-1, stable=True))
    rank = torch.empty_like(by_score)
    rank.scatter_(-1, by_score, torch.arange(score.shape[-1], device=score.device).expand_as(by_score))
    return (rank < count[..., None]) & allowed
