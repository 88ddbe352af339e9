"""Locally Merged Attention through stock FlashAttention: one sequence per head and cardinality.

FlashAttention takes no bias, but rows of equal cardinality n share theirs: their part of the output needs none, and log
n is added to its log-sum-exp. So each run of rows of one head with one n, a segment, is a sequence of a single
variable-length call, and the parts are merged by their log-sum-exp. Exact for any n; rows must lie in
:func:`class_order`. Legend: N heads (batch x KV heads), S segments, G query heads per KV head.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from asymkv.upload import upload

MAX_SEQUENCES = 65_535  # of a call: FlashAttention's grid has one in y for each


class Varlen(Protocol):
    """Attention of many sequences in one call; the internal form of every FlashAttention."""

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        cu_q: Tensor,
        start_k: Tensor,
        used_k: Tensor,
        max_q: int,
        max_k: int,
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        """Sequence s has queries ``cu_q[s] ... cu_q[s + 1]`` and rows ``start_k[s] ... start_k[s] + used_k[s]``.

        Args:
            query: ``[T_q, H_q, D]``.
            keys: ``[T_k, 1, D]``.
            values: ``[T_k, 1, D]``.
            cu_q: ``[S + 1]`` int32.
            start_k: ``[S + 1]`` int32; the last entry is ignored.
            used_k: ``[S]`` int32.
            max_q: an upper bound of queries per sequence.
            max_k: an upper bound of ``used_k``.
            scale: factor of ``q.k``.
            causal: the last query of a sequence sees its last row, the one before sees one row less, and so on.

        Returns:
            ``out [T_q, H_q, D]`` and natural ``lse [H_q, T_q]`` fp32; whatever they like where a query sees no row.
        """


def find_varlen(dtype: torch.dtype = torch.bfloat16) -> Varlen | None:
    """The first FlashAttention that can be called here on a dtype, fp16 or bf16.

    flash-attn, fa3-fwd (bf16 only), the one inside CUDA builds of PyTorch.
    """
    if not torch.cuda.is_available():
        return None
    wraps = (_flash_attn, _fa3, _builtin) if dtype == torch.bfloat16 else (_flash_attn, _builtin)
    for wrap in wraps:
        found = wrap()
        if found is not None:
            return found
    return None


def _flash_attn() -> Varlen | None:
    """flash-attn >= 2.8. Its public function lacks ``seqused_k``, without which spare rows would be read."""
    low = _import("flash_attn.flash_attn_interface", "_flash_attn_varlen_forward")
    if low is None:
        return None

    def varlen(
        query: Tensor, keys: Tensor, values: Tensor, cu_q: Tensor, start_k: Tensor, used_k: Tensor,
        max_q: int, max_k: int, scale: float, causal: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse, *_ = low(query, keys, values, cu_q, start_k, max_q, max_k, 0.0, scale, causal, seqused_k=used_k)
        return out, lse

    return varlen


def _fa3() -> Varlen | None:
    """fa3-fwd: Hopper, bf16 only."""
    high = _import("fa3_fwd_interface", "flash_attn_varlen_func")
    if high is None or torch.cuda.get_device_capability()[0] != 9:
        return None

    def varlen(
        query: Tensor, keys: Tensor, values: Tensor, cu_q: Tensor, start_k: Tensor, used_k: Tensor,
        max_q: int, max_k: int, scale: float, causal: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        # num_splits 0 = its own heuristic; its default of 1 leaves SMs idle in decode.
        out, lse, *_ = high(query, keys, values, cu_q, start_k, max_q, max_k, seqused_k=used_k, softmax_scale=scale,
                            causal=causal, num_splits=0 if max_q == 1 else 1, return_attn_probs=True)
        return out, lse

    return varlen


def _builtin() -> Varlen | None:
    """FlashAttention 2 inside PyTorch; only arguments that its op has in every version from 2.10 on."""
    if not torch.backends.cuda.is_flash_attention_available() or torch.cuda.get_device_capability()[0] < 8:
        return None

    def varlen(
        query: Tensor, keys: Tensor, values: Tensor, cu_q: Tensor, start_k: Tensor, used_k: Tensor,
        max_q: int, max_k: int, scale: float, causal: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, keys, values, cu_q, start_k, max_q, max_k, 0.0, causal, False, scale=scale, seqused_k=used_k
        )
        return out, lse

    return varlen


def _import(module: str, name: str) -> Any:
    """A function of an optional package, or None. A package built for another PyTorch fails with OSError."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, OSError):
        return None


def class_order(cardinality: Tensor, valid: Tensor) -> Tensor:
    """``[N, T]`` int64: the stable order of rows by n ascending among n > 1, then n = 1, then absent rows.

    Args:
        cardinality: ``[N, T]`` integers.
        valid: ``[N, T]`` bool.
    """
    most = torch.iinfo(torch.int64).max
    key = cardinality.long().masked_fill(cardinality == 1, most - 1).masked_fill(~valid, most)
    return key.argsort(dim=-1, stable=True)


@dataclass(frozen=True)
class Segments:
    """Runs of rows of one head and one cardinality; a head's last segment is that of n = 1, and grows.

    Args:
        head: ``[S]`` int64, ascending.
        start: ``[S + 1]`` int32, first row in the flat buffer.
        used: ``[S]`` int32, rows.
        log_n: ``[S]`` fp32.
        last: ``[N]`` int64, each head's segment of n = 1.
        cu_q: ``[S + 1]`` int32, 0 ... S: the queries of a decode step.
        host_last: rows of each head's last segment, known to the host.
        host_merged: the most rows of any other segment.
    """

    head: Tensor
    start: Tensor
    used: Tensor
    log_n: Tensor
    last: Tensor
    cu_q: Tensor
    host_last: list[int]
    host_merged: int

    @property
    def heads(self) -> int:
        return len(self.host_last)

    @property
    def max_rows(self) -> int:
        """Rows of the longest segment."""
        return max(self.host_merged, *self.host_last, 0)

    def grow(self, counts: list[int]) -> None:
        """Takes in ``counts[h]`` rows appended behind those of head h; does not wait for the device."""
        if len(counts) != self.heads:
            raise ValueError(f"counts must have one entry for each of {self.heads} heads; found {len(counts)}")
        self.host_last[:] = [n + c for n, c in zip(self.host_last, counts, strict=True)]
        if len(set(counts)) == 1:
            self.used.index_add_(0, self.last, torch.full_like(self.last, counts[0], dtype=torch.int32))
        else:
            self.used.index_add_(0, self.last, upload(counts, self.used.device, torch.int32))


def build_segments(cardinality: Tensor, start: list[int], length: list[int], device: torch.device) -> Segments:
    """The segments of rows that lie in :func:`class_order`; at compaction time, as it reads cardinalities.

    Args:
        cardinality: ``[R]`` integers, of the flat buffer.
        start: first row of each head.
        length: rows of each head.
        device: of the tables.

    Raises:
        ValueError: rows are not in class order, or a cardinality is below 1.
    """
    table: list[tuple[int, int, int, int]] = []
    last, merged = [], 0
    flat = cardinality.cpu()
    for head, (begin, rows) in enumerate(zip(start, length, strict=True)):
        found, counts = torch.unique_consecutive(flat[begin : begin + rows], return_counts=True)
        classes, sizes = found.tolist(), counts.tolist()
        if not classes or classes[-1] != 1:
            classes, sizes = [*classes, 1], [*sizes, 0]
        if classes[:-1] != sorted(set(classes[:-1]) - {1}) or min(classes) < 1:
            raise ValueError(f"rows of a head must lie by ascending n > 1, then n = 1 (class_order); head {head} has "
                             f"runs of {classes[:8]}")
        for n, size in zip(classes, sizes, strict=True):
            table.append((head, begin, size, n))
            begin += size
        merged = max([merged, *sizes[:-1]])
        last.append(len(table) - 1)
    heads, starts, used, n = (list(column) for column in zip(*table, strict=True)) if table else ([], [], [], [])
    # Normal tensors even under inference_mode: steps outside it write to the lengths.
    with torch.inference_mode(False):
        return Segments(
            head=torch.tensor(heads, dtype=torch.int64, device=device),
            start=torch.tensor([*starts, cardinality.shape[0]], dtype=torch.int32, device=device),
            used=torch.tensor(used, dtype=torch.int32, device=device),
            log_n=torch.tensor([math.log(x) for x in n], dtype=torch.float32, device=device),
            last=torch.tensor(last, dtype=torch.int64, device=device),
            cu_q=torch.arange(len(table) + 1, dtype=torch.int32, device=device),
            host_last=[used[i] for i in last],
            host_merged=merged,
        )


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Segments,
    counts_new: list[int] | None,
    scale: float,
    varlen: Varlen,
) -> tuple[Tensor, Tensor]:
    """Locally Merged Attention over the rows of each KV head, the queries' own tokens already among them.

    Args:
        query: ``[B, H, Q, D]``, rotated.
        keys: ``[R, D]`` flat buffer, rows of each head in class order.
        values: ``[R, D]``.
        segments: of all rows, new ones included; N = B * H_kv heads.
        counts_new: of several queries, how many of each batch row are tokens: the first ``counts_new[b]`` of its Q
            columns, whose rows are the last of each head and causal among themselves. None, and one query: every query
            sees every row.
        scale: factor of ``q.k``.
        varlen: from :func:`find_varlen`.

    Returns:
        ``out [B, H, Q, D]`` in the query's dtype and ``lse [B, H, Q]`` fp32; 0 and -inf where a query sees no row;
        finite, but otherwise undefined, for columns that are no tokens.

    Raises:
        ValueError: for shapes that do not fit.
    """
    if query.ndim != 4:
        raise ValueError(f"query must be [B, H, Q, D]; found {list(query.shape)}")
    batch, heads, queries, dim = query.shape
    if not segments.heads or segments.heads % batch or heads * batch % segments.heads:
        raise ValueError(f"query must be [B, H, Q, D] with B * H a multiple of the heads of segments, and those of B; "
                         f"found {list(query.shape)} and {segments.heads}")
    if keys.ndim != 2 or keys.shape != values.shape or keys.shape[1] != dim:
        raise ValueError(f"keys and values must be [R, {dim}]; found {list(keys.shape)} and {list(values.shape)}")
    group = heads * batch // segments.heads
    # [N, Q, G, D]: a KV head's queries are a sequence, its query heads the heads of it.
    rows = query.reshape(segments.heads, group, queries, dim).transpose(1, 2)
    flat = (keys[:, None], values[:, None])
    used, own = segments.used, None
    if counts_new is not None and queries > 1:
        kv_heads = segments.heads // batch
        new = upload([c for c in counts_new for _ in range(kv_heads)], query.device, torch.int32)
        used = used.index_add(0, segments.last, -new)
        own = _own_tokens(rows, flat, segments, new, scale, varlen)
    parts = rows[segments.head].flatten(0, 1)  # [S * Q, G, D]
    out, lse = _whole_segments(parts, flat, segments, used, scale, varlen)
    found = _blank(out.unflatten(0, (-1, queries)), lse.unflatten(1, (-1, queries)), (used > 0)[:, None])
    index, bias = segments.head, segments.log_n
    if own is not None:
        found = (torch.cat((found[0], own[0])), torch.cat((found[1], own[1])))
        index = torch.cat((index, torch.arange(segments.heads, device=index.device)))
        bias = torch.cat((bias, bias.new_zeros(segments.heads)))
    out, lse = merge(found[0], found[1] + bias[:, None, None], index, segments.heads)
    out = out.to(query.dtype).transpose(1, 2).reshape(batch, heads, queries, dim)
    return out, lse.transpose(1, 2).reshape(batch, heads, queries)


def _whole_segments(
    parts: Tensor, flat: tuple[Tensor, Tensor], segments: Segments, used: Tensor, scale: float, varlen: Varlen
) -> tuple[Tensor, Tensor]:
    """Each of ``parts [S * Q, G, D]`` over all rows of its segment: ``out [S * Q, G, D]`` and ``lse [G, S * Q]``."""
    count = used.shape[0]
    queries = parts.shape[0] // max(count, 1)
    cu_q = segments.cu_q if queries == 1 else segments.cu_q * queries
    found = []
    for first in range(0, count, MAX_SEQUENCES):
        end = min(first + MAX_SEQUENCES, count)
        found.append(varlen(
            parts[first * queries : end * queries], *flat, cu_q[: end - first + 1], segments.start[first : end + 1],
            used[first:end], queries, segments.max_rows, scale, False,
        ))  # fmt: skip
    if len(found) == 1:
        return found[0]
    outs, lses = zip(*found, strict=True)
    return torch.cat(outs), torch.cat(lses, dim=1)


def _own_tokens(
    rows: Tensor, flat: tuple[Tensor, Tensor], segments: Segments, new: Tensor, scale: float, varlen: Varlen
) -> tuple[Tensor, Tensor]:
    """Causal attention of new tokens among themselves: ``out [N, Q, G, D]``, ``lse [N, Q, G]``.

    Args:
        rows: ``[N, Q, G, D]`` queries.
        new: ``[N]`` int32, how many of the Q columns are tokens.
    """
    heads, queries = rows.shape[:2]
    # Columns that are no tokens become a sequence without rows, so that the causal diagonal of the others is right.
    first = torch.arange(heads, device=new.device, dtype=torch.int32) * queries
    cu_q = torch.stack((first, first + new), dim=1).flatten()
    cu_q = torch.cat((cu_q, cu_q.new_full((1,), heads * queries)))
    begin = (segments.start[:-1] + segments.used)[segments.last] - new
    start = torch.cat((begin.repeat_interleave(2), begin[:1]))
    used = torch.stack((new, torch.zeros_like(new)), dim=1).flatten()
    out, lse = varlen(rows.flatten(0, 1), *flat, cu_q, start, used, queries, queries, scale, True)
    token = torch.arange(queries, device=new.device) < new[:, None]
    return _blank(out.unflatten(0, (heads, queries)), lse.unflatten(1, (heads, queries)), token)


def _blank(out: Tensor, lse: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
    """0 and -inf where no row is seen: FlashAttention says inf, -inf or nothing there, depending on the kernel.

    Args:
        out: ``[S, Q, G, D]``.
        lse: ``[G, S, Q]``.
        some: broadcasts to ``[S, Q]``.

    Returns:
        ``out`` and ``lse [S, Q, G]``.
    """
    lse = lse.permute(1, 2, 0).float()
    return out.masked_fill(~some[..., None, None], 0), lse.masked_fill(~some[..., None], -torch.inf)


def merge(out: Tensor, lse: Tensor, index: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Merges parts of attention over disjoint rows, in fp32.

    Args:
        out: ``[S, Q, G, D]``.
        lse: ``[S, Q, G]``, -inf for a part without rows.
        index: ``[S]``, which of the ``heads`` a part belongs to.

    Returns:
        ``out [heads, Q, G, D]`` and ``lse [heads, Q, G]`` fp32.
    """
    wide = index[:, None, None].expand_as(lse)
    top = lse.new_full((heads, *lse.shape[1:]), -torch.inf).scatter_reduce(0, wide, lse, "amax")
    base = torch.where(top.isinf(), 0, top)
    weight = torch.exp(lse - base[index])
    total = torch.zeros_like(base).index_add(0, index, weight)
    merged = base.new_zeros(heads, *out.shape[1:]).index_add(0, index, out.float() * weight[..., None])
    return merged / torch.where(total > 0, total, 1)[..., None], base + total.log()
