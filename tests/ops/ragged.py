"""Ragged rows in flat buffers, with spare rows that must never be read, and attention over them in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asymkv.ops import reference

SPARE = 3  # rows of NaN behind each head's own
HEAD_LENS = [[1], [0, 3], [5, 1, 130, 7]]


@dataclass
class Ragged:
    """Heads are batch x KV heads; ``query [B, H, Q, D]``; other columns flat, ``[R, ...]``."""

    query: Tensor
    keys: Tensor
    values: Tensor
    cardinality: Tensor
    position: Tensor
    start: list[int]
    length: list[int]
    scale: float

    @property
    def log_n(self) -> Tensor:
        spare = torch.full_like(self.position, True, dtype=torch.bool)
        for begin, rows in zip(self.start, self.length, strict=True):
            spare[begin : begin + rows] = False
        return self.cardinality.float().log().masked_fill(spare, torch.nan)

    def table(self, name: str) -> Tensor:
        return torch.tensor(getattr(self, name), dtype=torch.int64, device=self.query.device)


def make_ragged(head_lens, dim, dtype, *, queries=1, group=2, batch=1, most=10_000, seed=0, device="cpu") -> Ragged:
    g = torch.Generator().manual_seed(seed)
    rows = sum(head_lens) + SPARE * len(head_lens)
    start = [sum(head_lens[:i]) + SPARE * i for i in range(len(head_lens))]
    heads = len(head_lens) // batch * group
    query = torch.randn(batch, queries, heads, dim, generator=g).transpose(1, 2).to(dtype)
    keys, values = (torch.full((rows, dim), torch.nan, dtype=dtype) for _ in range(2))
    position = torch.zeros(rows, dtype=torch.int32)
    for begin, n in zip(start, head_lens, strict=True):
        keys[begin : begin + n] = torch.randn(n, dim, generator=g).to(dtype)
        values[begin : begin + n] = torch.randn(n, dim, generator=g).to(dtype)
        position[begin : begin + n] = torch.randperm(2 * n, generator=g)[:n].sort().values.int()
    # Many classes, small ones included, up to the most.
    n = (most ** torch.rand(rows, generator=g)).round().int()
    query, keys, values, n, position = (x.to(device) for x in (query, keys, values, n, position))
    return Ragged(query, keys, values, n, position, start, list(head_lens), dim**-0.5)


def attention64(x: Ragged, *, with_n: bool = True, seen: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """``out [B, H, Q, D]`` and ``lse [B, H, Q]`` in fp64 on the CPU; ``seen[h]`` is ``[Q, length[h]]`` bool."""
    batch, heads, queries, dim = x.query.shape
    rows = x.query.cpu().double().reshape(len(x.start), -1, queries, dim)
    parts = []
    for head, (begin, n) in enumerate(zip(x.start, x.length, strict=True)):
        keys, values, cardinality = (c[begin : begin + n].cpu().double() for c in (x.keys, x.values, x.cardinality))
        bias = (cardinality.log() if with_n else torch.zeros(n).double()).expand(queries, n)
        if seen is not None:
            bias = bias.masked_fill(~seen[head], -torch.inf)
        parts.append(reference.biased_attention(rows[head][None], keys[None, None], values[None, None],
                                                bias[None, None], x.scale))  # fmt: skip
    out, lse = (torch.cat(column) for column in zip(*parts, strict=True))
    return out.reshape(batch, heads, queries, dim), lse.reshape(batch, heads, queries)


def plain_varlen(query, keys, values, cu_q, start_k, used_k, max_q, max_k, scale, causal):
    """The protocol in plain PyTorch; as FlashAttention, says inf where a query sees no row, and leaves NaN there."""
    assert cu_q.dtype == start_k.dtype == used_k.dtype == torch.int32 and len(start_k) == len(cu_q) == len(used_k) + 1
    out = torch.full_like(query, torch.nan)
    lse = torch.full(query.shape[1::-1], torch.inf)
    for first, end, begin, used in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), start_k.tolist(), used_k.tolist(),
                                       strict=False):  # fmt: skip
        assert end - first <= max_q and 0 <= used <= max_k
        if used and end > first:
            k, v = (x[begin : begin + used, 0].double() for x in (keys, values))
            s = query[first:end].double() @ k.T * scale  # [q, H_q, T]
            if causal:
                s = s + reference.causal_tail_bias(end - first, used, used, s.device)[:, None]
            out[first:end] = (s.softmax(-1) @ v).to(out.dtype)
            lse[:, first:end] = s.logsumexp(-1).T.float()
    return out, lse
