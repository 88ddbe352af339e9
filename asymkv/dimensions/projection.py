"""One layer's rows in fewer dimensions: projecting new tokens, and giving attention's output back.

Legend: B batch, H query heads, H_kv KV heads, t tokens, D head size, r stored size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from asymkv.models.adapter import FamilyAdapter


@dataclass(frozen=True)
class Linear:
    """A folded linear map: ``weight [out, in]`` and ``bias [out]``."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in (self.weight, self.bias) if x is not None)


@dataclass(frozen=True)
class Folded:
    """Projections of a layer with the basis in their weights (ZACK, arXiv 2408.04107).

    Args:
        value: hidden states to values ``[H_kv * r]``.
        output: attention's output ``[H * r]`` to hidden states.
        query: hidden states to queries ``[H * r]``, and ``key`` to keys ``[H_kv * r]``: only without rotary positions.
    """

    value: Linear
    output: Linear
    query: Linear | None = None
    key: Linear | None = None


@dataclass(frozen=True)
class Projection:
    """What one layer's rows are multiplied with, cut to the stored size.

    Dot products ``q'.k'`` of projected queries and keys stand for ``q.k`` (with the factor of the full size), and
    ``out' outputs^T`` for attention's output, with ``out'`` over projected values.

    Args:
        keys: ``[H_kv, D, r]``, for keys after RoPE; None = as they are.
        values: ``[H_kv, D, r]``; None = as they are.
        queries: ``[H_kv, D, r]``, for queries after RoPE; given with ``keys``.
        outputs: ``[H_kv, D, r]``; given with ``values``.
        folded: weights that have (some of) these in them; None = multiplied at run time.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    queries: Tensor | None = None
    outputs: Tensor | None = None
    folded: Folded | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of these tensors, each once, and of the weights that they were folded into."""
        bases = {x.data_ptr(): x for x in (self.keys, self.values, self.queries, self.outputs) if x is not None}
        linears = [] if self.folded is None else [x for x in vars(self.folded).values() if x is not None]
        return sum(x.untyped_storage().nbytes() for x in bases.values()) + sum(x.nbytes for x in linears)

    def widths(self, head_dim: int) -> tuple[int, int]:
        """Stored sizes of keys and of values of heads of the given size."""
        key, value = (head_dim if x is None else x.shape[2] for x in (self.keys, self.values))
        return key, value

    @property
    def turns(self) -> bool:
        """Whether queries and keys come out of :meth:`project` at full size, to be rotated by their positions."""
        return self.folded is None or self.folded.query is None

    def project(self, adapter: FamilyAdapter, module: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, H, t, D]`` and keys ``[B, H_kv, t, D]`` before RoPE, values ``[B, H_kv, t, r]``.

        Queries and keys have the stored size already where that is folded.

        Args:
            hidden: ``[B, t, hidden_size]``.
        """
        if self.folded is None:
            q, k, v = adapter.project(module, hidden)
            return q, k, narrowed(v, self.values)
        kv_heads = _size(self.values)[0]
        v = _heads(self.folded.value(hidden), kv_heads)
        if self.folded.query is None or self.folded.key is None:
            return *adapter.project_keys(module, hidden), v
        width = _size(self.keys)[2]
        q, k = self.folded.query(hidden), self.folded.key(hidden)
        return _heads(q, q.shape[-1] // width), _heads(k, kv_heads), v

    def narrow(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries ``[B, H, t, D]`` and keys ``[B, H_kv, t, D]`` in stored coordinates, with r for D."""
        return (narrowed(query, self.queries), narrowed(key, self.keys)) if self.turns else (query, key)

    def output(self, adapter: FamilyAdapter, module: Any, out: Tensor) -> Tensor:
        """Attention's output over stored values ``[B, H, t, r]`` to hidden states ``[B, t, hidden_size]``."""
        if self.folded is not None:
            return self.folded.output(out.transpose(1, 2).flatten(2))
        if self.outputs is not None:
            out = narrowed(out, self.outputs.transpose(1, 2))
        return adapter.output(module, out.transpose(1, 2).flatten(2))

    def output_weight(self, weight: Tensor) -> Tensor:
        """The output projection ``[hidden, H * D]`` for stored values, ``[hidden, H * r]``."""
        return weight if self.outputs is None else fold_output(weight, self.outputs)


def narrowed(x: Tensor, basis: Tensor | None) -> Tensor:
    """``x [B, H, t, D]`` times the basis ``[H_kv, D, r]`` of each head's KV head, ``[B, H, t, r]``; None: as it is."""
    if basis is None:
        return x
    basis = basis.to(x.device, x.dtype)
    batch, heads, tokens, size = x.shape
    return (x.reshape(batch, len(basis), -1, size) @ basis).view(batch, heads, tokens, -1)


def fold_input(weight: Tensor, bias: Tensor | None, basis: Tensor) -> Linear:
    """A projection to heads, ``weight [H * D, hidden]``, followed by ``basis [H_kv, D, r]``: in fp64, then rounded."""
    wide = basis.to(weight.device, torch.float64)
    grouped = weight.double().view(len(basis), -1, basis.shape[1], weight.shape[1])
    folded = torch.einsum("kdr,kgdi->kgri", wide, grouped).flatten(0, 2).to(weight.dtype)
    if bias is None:
        return Linear(folded, None)
    by_head = bias.double().view(len(basis), -1, basis.shape[1])
    return Linear(folded, torch.einsum("kdr,kgd->kgr", wide, by_head).flatten().to(bias.dtype))


def fold_output(weight: Tensor, basis: Tensor) -> Tensor:
    """``R^T W_O``: the output projection ``[hidden, H * D]`` after ``basis [H_kv, D, r]``, ``[hidden, H * r]``."""
    grouped = weight.detach().double().view(weight.shape[0], len(basis), -1, basis.shape[1])
    return torch.einsum("okgd,kdr->okgr", grouped, basis.to(weight.device, torch.float64)).flatten(1).to(weight.dtype)


def _heads(x: Tensor, heads: int) -> Tensor:
    """``[B, t, heads * r]`` as ``[B, heads, t, r]``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _size(basis: Tensor | None) -> torch.Size:
    assert basis is not None  # folded weights come with the bases that are in them
    return basis.shape
