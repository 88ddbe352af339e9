"""LMA through PyTorch's fused attention: log cardinality as an additive fp32 mask."""

from __future__ import annotations

import torch
from torch import Tensor

from asymkv.ops import reference


def biased_attention(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`asymkv.ops.reference.biased_attention`; differentiable in query, keys and values.

    ``bias`` must broadcast to ``[B, H_kv, Q, T]``. K and V are never expanded to query heads: one query folds its
    group into the query axis, several queries read K and V through a zero stride.
    """
    query, keys, values, size = _one_width(query, keys, values)
    batch, heads, queries, dim = query.shape
    kv_heads, rows = keys.shape[1], keys.shape[2]
    if not _fused(query) or rows == 0:
        out, lse = reference.biased_attention(query, keys, values, bias, scale)
        return out[..., :size], lse
    group = heads // kv_heads
    bias = bias.expand(batch, kv_heads, -1, rows).reshape(batch * kv_heads, 1, -1, rows)
    if bias.shape[2] == 1:
        q = query.reshape(batch * kv_heads, 1, group * queries, dim)
        k, v = keys.reshape(-1, 1, rows, dim), values.reshape(-1, 1, rows, dim)
    else:
        q = query.reshape(batch * kv_heads, group, queries, dim)
        k = keys.reshape(-1, 1, rows, dim).expand(-1, group, -1, -1)
        v = values.reshape(-1, 1, rows, dim).expand(-1, group, -1, -1)
    out, lse = _kernel(q, k, v, bias, scale)
    out, lse = out.reshape(batch, heads, queries, dim), lse.reshape(batch, heads, queries)
    # A query that sees nothing is 0/0 in the kernels; the contract says 0 and -inf. Whoever sees row 0 sees something.
    # On a GPU to look is to wait for it, and the mask costs little.
    unseen = torch.isneginf(bias).all(-1) if query.is_cuda or bool(torch.isneginf(bias[..., 0]).any()) else None
    if unseen is not None and (query.is_cuda or bool(unseen.any())):
        blank = unseen.view(batch, kv_heads, 1, -1).expand(-1, -1, group, queries).reshape(batch, heads, queries)
        out = out.masked_fill(blank[..., None], 0)
        lse = lse.masked_fill(blank, -torch.inf)
    return out[..., :size], lse


def causal_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Plain causal attention of tokens among themselves, ``Q == T``: no mask in memory.

    Shapes and result as :func:`biased_attention`.
    """
    query, keys, values, size = _one_width(query, keys, values)
    batch, heads, queries, dim = query.shape
    kv_heads = keys.shape[1]
    if not _fused(query):
        bias = reference.causal_tail_bias(queries, queries, queries, query.device)
        out, lse = reference.biased_attention(query, keys, values, bias[None, None], scale)
        return out[..., :size], lse
    group = heads // kv_heads
    q = query.reshape(batch * kv_heads, group, queries, dim)
    k = keys.reshape(-1, 1, queries, dim).expand(-1, group, -1, -1)
    v = values.reshape(-1, 1, queries, dim).expand(-1, group, -1, -1)
    out, lse = _kernel(q, k, v, None, scale, is_causal=True)
    return out.reshape(batch, heads, queries, dim)[..., :size], lse.reshape(batch, heads, queries)


def joined(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> Tensor:
    """Attention over two sets of rows from that over each, ``[..., D]`` and ``lse [...]``; in the dtype of ``lse``."""
    share = torch.sigmoid(second_lse - first_lse)[..., None]
    return torch.lerp(first.to(share.dtype), second.to(share.dtype), share)


def _one_width(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """The tensors with zeros behind the narrower of keys and values, and the values' own size: kernels want one width.

    On CUDA a multiple of 8, which the fused kernels are built for. A copy, but only where the width is another.
    """
    width = max(keys.shape[-1], values.shape[-1])
    width += -width % 8 if query.is_cuda else 0

    def padded(x: Tensor) -> Tensor:
        return x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1]))

    return padded(query), padded(keys), padded(values), values.shape[-1]


def _fused(query: Tensor) -> bool:
    """Whether a fused kernel that returns the log-sum-exp takes such a query (fp64 on CUDA is not served)."""
    half = query.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return query.device.type == "cpu" or (query.device.type == "cuda" and half)


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """A fused kernel's output and log-sum-exp; ``bias`` broadcasts, and is expanded last: then it takes no memory."""
    aten = torch.ops.aten
    shape = (-1, q.shape[1], q.shape[2], -1)
    if q.device.type == "cpu":
        # fp64 takes an fp64 mask; half types take an fp32 one, which keeps log n exact.
        mask = None if bias is None else bias.to(reference.compute_dtype(q)).expand(shape)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return out, lse
    dtype = q.dtype
    if bias is not None and _rounds(bias, dtype):
        q, k, v = q.float(), k.float(), v.float()
    mask = None if bias is None else _aligned(bias.to(q.dtype)).expand(shape)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        q, k, v, mask, True, 0.0, is_causal, scale=scale
    )
    return out.to(dtype), lse[..., : q.shape[2]]


def _rounds(bias: Tensor, dtype: torch.dtype) -> bool:
    """Whether a mask of a dtype, which is what the memory-efficient kernel takes, would change the bias: log n of 4 to
    8 in bf16 is off by up to 1.6 % of a row's weight."""
    return dtype in (torch.float16, torch.bfloat16) and not torch.equal(bias.to(dtype).to(bias.dtype), bias)


def _aligned(bias: Tensor) -> Tensor:
    """The memory-efficient kernel wants rows of the mask to start at multiples of 16 bytes."""
    rows = bias.shape[-1]
    return torch.nn.functional.pad(bias, (0, -rows % 8))[..., :rows]
