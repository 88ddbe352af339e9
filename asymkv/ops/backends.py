"""Attention backends over ragged rows: one contract, chosen by name or by what the device has.

Legend: B batch, H query heads, H_kv KV heads, N = B x H_kv, Q queries, D head size.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from asymkv.ops import extension, flash, reference, sdpa, triton_attention, triton_launch
from asymkv.ops.rows import fits

if TYPE_CHECKING:
    from asymkv.storage import RaggedStorage

# More queries than this (heads of a group counted) are a matrix product, which PyTorch's kernels do faster.
MAX_CPP_QUERIES = 32
# From so many queries on, a mask of queries x rows costs more than it is worth. Below, one pass rounds half types once.
MIN_CHUNK_APART = 128


@dataclass(frozen=True)
class Problem:
    """One call of attention.

    Args:
        query: ``[B, H, Q, D]``, rotated.
        rows: the stored rows of all N heads.
        positions: ``[B, Q]`` positions of the queries, which see rows up to their own; None = every row.
        counts: how many of the Q columns are tokens, per row of the batch; their rows are the newest of each head.
            None = unknown, or the queries' own rows are not stored.
        scale: factor of ``q.k``.
    """

    query: Tensor
    rows: RaggedStorage
    positions: Tensor | None
    counts: list[int] | None
    scale: float

    @property
    def kv_heads(self) -> int:
        return self.rows.heads // self.query.shape[0]

    @property
    def differentiable(self) -> bool:
        """Whether a gradient must flow, which only PyTorch's own operators let it."""
        return torch.is_grad_enabled() and self.query.requires_grad

    @property
    def only_own_tokens(self) -> bool:
        """Whether the queries' own rows are all there is: plain causal attention."""
        return self.positions is not None and self.rows.even and (
            self.rows.width == self.query.shape[2] and not self.rows.merged
        )

    @property
    def has_own_chunk(self) -> bool:
        """Whether the newest Q rows of every head are the queries' own tokens, and Q is worth a pass of its own."""
        queries = self.query.shape[2]
        own = self.positions is not None and self.counts is not None and all(n == queries for n in self.counts)
        return own and self.rows.width > queries >= MIN_CHUNK_APART

    def dense(self, name: str) -> Tensor:
        """A column as ``[B, H_kv, T, ...]``."""
        column = self.rows.dense(name)
        return column.view(self.query.shape[0], self.kv_heads, *column.shape[1:])


@dataclass(frozen=True)
class Backend:
    """A way to compute Locally Merged Attention over ragged rows.

    Args:
        attend: ``out [B, H, Q, D_v]`` in the query's dtype, ``lse [B, H, Q]`` fp32 (fp64 for fp64); 0 and -inf where
            a query sees no row.
        missing: why it cannot run on a device with this head size and dtype; None = it can.
        one_width: whether keys and values must be of one size.
    """

    attend: Callable[[Problem], tuple[Tensor, Tensor]]
    missing: Callable[[torch.device, int, torch.dtype], str | None]
    one_width: bool = False

    def lacks(self, device: torch.device, widths: Iterable[tuple[int, int]], dtype: torch.dtype) -> str | None:
        """Why it cannot serve layers of these sizes of keys and values; None = it can."""
        for key, value in dict.fromkeys(widths):
            why = self.missing(device, key, dtype) or self.missing(device, value, dtype)
            if why is None and self.one_width and key != value:
                why = f"it takes keys and values of one size; they are {key} and {value}"
            if why is not None:
                return why
        return None


def resolve_backend(
    name: str, device: torch.device, head_dim: int, dtype: torch.dtype, widths: Sequence[tuple[int, int]] = ()
) -> str:
    """The backend in force.

    Args:
        name: a backend, or "auto": ``ASYMKV_BACKEND`` if that is set, else the fastest that runs here.
        device, head_dim, dtype: of the cache.
        widths: stored sizes of keys and values of every layer, where they are not the head's.

    Raises:
        ValueError: for an unknown name, or one that cannot run here; lists the others.
    """
    sizes = widths or [(head_dim, head_dim)]
    found = os.environ.get("ASYMKV_BACKEND", "auto") if name == "auto" else name
    if found == "auto":
        if device.type in extension.ADVICE:
            extension.warn_if_missing(device.type)
        return next(n for n in AUTO[device.type == "cuda"] if BACKENDS[n].lacks(device, sizes, dtype) is None)
    if found not in BACKENDS:
        raise ValueError(f"unknown backend {found!r}; allowed: {['auto', *BACKENDS]}")
    why = BACKENDS[found].lacks(device, sizes, dtype)
    if why is not None:
        able = [n for n, b in BACKENDS.items() if b.lacks(device, sizes, dtype) is None]
        raise ValueError(f"backend {found!r} cannot run here: {why}; backends that can: {able}")
    return found


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


def _biased(attend: Callable, p: Problem) -> tuple[Tensor, Tensor]:
    bias = row_bias(p.rows.log_n(), p.rows.valid(), p.dense("position"), p.positions, p.kv_heads)
    return attend(p.query, p.dense("keys"), p.dense("values"), bias, p.scale)


def _reference(p: Problem) -> tuple[Tensor, Tensor]:
    return _biased(reference.biased_attention, p)


def _sdpa(p: Problem) -> tuple[Tensor, Tensor]:
    if p.only_own_tokens:
        return sdpa.causal_attention(p.query, p.dense("keys"), p.dense("values"), p.scale)
    if p.positions is None and not p.rows.strided and not p.differentiable:
        return _head_by_head(p)
    if p.has_own_chunk and not p.differentiable:
        return _past_and_chunk(p)
    return _biased(sdpa.biased_attention, p)


def _past_and_chunk(p: Problem) -> tuple[Tensor, Tensor]:
    """Older rows and the chunk's own by themselves, joined by their log-sum-exp.

    A query sees every older row, so that their mask is one number a row, and the chunk is plain causal attention: no
    mask of queries x rows is made, and half of the chunk's products are not computed. In half types the parts are
    rounded before they are joined, once more than in one pass.
    """
    batch, queries, rows = p.query.shape[0], p.query.shape[2], p.rows
    old = rows.width - queries
    keys, values = (p.dense(name)[:, :, :old] for name in ("keys", "values"))
    own_keys, own_values = (rows.newest(name, queries).unflatten(0, (batch, -1)) for name in ("keys", "values"))
    own, own_lse = sdpa.causal_attention(p.query, own_keys, own_values, p.scale)
    log_n, valid = rows.log_n(), rows.valid()
    bias = torch.zeros(1, 1, device=keys.device) if log_n is None else log_n[:, :old]
    if valid is not None:  # the first old rows of a head are those behind which queries more come
        bias = torch.where(valid[:, queries:], bias, -torch.inf)
    bias = bias.expand(rows.heads, old).reshape(batch, p.kv_heads, 1, old)
    past, past_lse = sdpa.biased_attention(p.query, keys, values, bias, p.scale)
    out = sdpa.joined(past, past_lse, own, own_lse)
    return out.to(p.query.dtype), torch.logaddexp(own_lse, past_lse)


def _head_by_head(p: Problem) -> tuple[Tensor, Tensor]:
    """Decode over heads of different lengths: views of each head's rows instead of a padded copy of all."""
    batch, heads, queries, dim = p.query.shape
    grouped = p.query.reshape(p.rows.heads, 1, -1, queries, dim)
    parts = []
    for head in range(p.rows.heads):
        keys, values = (p.rows.run(name, head)[None, None] for name in ("keys", "values"))
        bias = p.rows.run("log_n", head).view(1, 1, 1, -1) if p.rows.merged else keys.new_zeros(
            1, 1, 1, keys.shape[2], dtype=torch.float32)  # fmt: skip
        parts.append(sdpa.biased_attention(grouped[head], keys, values, bias, p.scale))
    out, lse = (torch.cat(x) for x in zip(*parts, strict=True))
    return out.reshape(batch, heads, queries, -1), lse.reshape(batch, heads, queries)


def _cpp(p: Problem) -> tuple[Tensor, Tensor]:
    batch, heads, queries, dim = p.query.shape
    grouped = heads // p.kv_heads * queries
    if p.differentiable or p.only_own_tokens or grouped > MAX_CPP_QUERIES:
        return _sdpa(p)
    rows, position, at = p.rows, None, None
    if p.positions is not None:
        position = rows.columns["position"]
        at = p.positions[:, None, None].expand(batch, p.kv_heads, heads // p.kv_heads, queries)
        at = at.reshape(rows.heads, grouped).contiguous()
    out, lse = torch.ops.asymkv.lma_decode(
        p.query.reshape(rows.heads, grouped, dim).contiguous(), rows.columns["keys"], rows.columns["values"],
        rows.columns["log_n"] if rows.merged else None, rows.table("start"), rows.table("length"), p.scale, position,
        at,
    )  # fmt: skip
    return out.view(*p.query.shape[:3], -1), lse.view(p.query.shape[:3])


def _triton(p: Problem) -> tuple[Tensor, Tensor]:
    if p.differentiable or p.only_own_tokens:
        return _sdpa(p)
    columns = p.rows.columns
    return triton_attention.attend(
        p.query, columns["keys"], columns["values"], columns["log_n"] if p.rows.merged else None, columns["position"],
        p.rows.table("start"), p.rows.table("length"), p.positions, p.scale, max(p.rows.capacity),
    )  # fmt: skip


def _flash(p: Problem) -> tuple[Tensor, Tensor]:
    if p.differentiable or p.only_own_tokens or (p.positions is not None and p.counts is None):
        return _sdpa(p)
    columns, several = p.rows.columns, p.query.shape[2] > 1
    varlen = _varlen(p.query.dtype)
    assert varlen is not None
    return flash.attend(
        p.query, columns["keys"], columns["values"], p.rows.segments(), p.counts if several else None, p.scale, varlen
    )


_varlen = functools.cache(flash.find_varlen)


def _always(device: torch.device, head_dim: int, dtype: torch.dtype) -> None:
    return None


def _cpp_missing(device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"it is for the CPU, and the cache is on {device.type}"
    if not extension.loaded():
        return "the C++ extension is not built (pip install --no-build-isolation -e .)"
    if dtype == torch.float64:
        return "it computes in fp32, and the cache is fp64"
    if not fits(head_dim):
        return f"the head size must be a multiple of 8, at most 256; it is {head_dim}"
    return None


def _triton_missing(device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
    why = triton_attention.available()
    if why is not None:
        return why
    if head_dim not in triton_launch.DIMS:
        return f"the head size must be one of {sorted(triton_launch.DIMS)}; it is {head_dim}"
    if device.type != "cuda" and not triton_launch.interpreted():
        return f"it is for CUDA, and the cache is on {device.type}"
    return "it computes in fp32, and the cache is fp64" if dtype == torch.float64 else None


def _flash_missing(device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"FlashAttention is for CUDA, and the cache is on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention takes float16 and bfloat16; the cache is {dtype}"
    if not fits(head_dim):
        return f"the head size must be a multiple of 8, at most 256; it is {head_dim}"
    return "no FlashAttention could be imported" if _varlen(dtype) is None else None


BACKENDS = {
    "triton": Backend(_triton, _triton_missing, one_width=True),
    "flash": Backend(_flash, _flash_missing, one_width=True),
    "cpp": Backend(_cpp, _cpp_missing),
    "sdpa": Backend(_sdpa, _always),
    "reference": Backend(_reference, _always),
}
# In order of preference, without and with a CUDA device.
AUTO = {False: ("cpp", "sdpa"), True: ("triton", "flash", "sdpa")}


def differentiable_attention(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Dense attention that gradients flow through, for a cache with this backend."""
    return reference.biased_attention if backend == "reference" else sdpa.biased_attention
