"""What the queries of a replay say about stored rows (``asymkv.reconstruction``).

A scorer writes statistics of rows that stay with them: ``SCORE``, what dropping a row costs, and, where rows may merge,
``PAIR``, what merging a row into the next one of its head costs, and what a merge weighs keys by: ``SHARE`` of a row's
key in that pair, or ``CURVATURE`` of each of its dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from asymkv.layer import CompressedLayer
from asymkv.observations import WEIGHT_RANGE, PairCost, statistic_dtype, turned_back
from asymkv.rope import Rope
from asymkv.storage import RaggedStorage

SCORE = "score"  # 0 = never judged
KEPT = -1.0  # score of rows that always stay: a prefix
PAIR = "pair"  # inf = there is no such pair any more
SHARE = "share"  # 0 = unknown
CURVATURE = "curvature"  # [D], before RoPE
FAINTEST = 1e-30  # lowest score of a judged row: an underflow must not look like a row that was never judged
# Logits in memory at a time: 16 MiB in fp32; on a CPU what its cache holds.
BLOCK_ELEMENTS, BLOCK_ELEMENTS_CPU = 1 << 22, 1 << 18
# What is left of a softmax counts as no less: o is v but for rounding where a row has all the attention.
LEAST_REST = 1e-3
CURRENCIES = ("attention", "output_error")
MERGED_WEIGHTS = ("cardinality", "output_error", "output", "loss")


@dataclass(frozen=True)
class ReplayQueries:
    """One replay in one layer; t tokens, of which row b of the batch has ``counts[b]``.

    Args:
        q: ``[B, H, t, D]``, rotated.
        counts: tokens per row of the batch.
        out: ``[B, H, t, D]``, the attention output over everything stored and the replay itself.
        past_lse, own_lse: ``[B, H, t]``, log-sum-exp over the stored rows, and over the replay's own keys; with a tape
            the first is over both and the second -inf, for scorers that ask for no more than their sum.
        hidden: ``[B, t, hidden_size]``, what the queries were projected from.
        scale: of the logits.
        rope: what keys and queries were rotated by.
    """

    q: Tensor
    counts: list[int]
    out: Tensor
    past_lse: Tensor
    own_lse: Tensor
    hidden: Tensor
    scale: float
    rope: Rope

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic."""
        return torch.promote_types(self.q.dtype, torch.float32)

    def per_head(self, x: Tensor, heads: int) -> Tensor:
        """``[B, H, t, ...]`` as ``[N, G, t, ...]``, N = B * H_kv, in the dtype of the arithmetic."""
        return x.reshape(heads, -1, *x.shape[2:]).to(self.dtype)

    def absent(self) -> Tensor:
        """``[B, t]`` bool: columns that are no token."""
        counts = torch.tensor(self.counts, device=self.q.device)
        return torch.arange(self.q.shape[2], device=self.q.device) >= counts[:, None]


class Scorer(Protocol):
    """Judges rows by the queries of a replay."""

    def score(self, layer: CompressedLayer, seen: ReplayQueries, begin: Tensor, end: Tensor) -> None:
        """Writes the statistics of each head's rows at positions from ``begin`` to ``end``, both ``[B * H_kv]``."""


@dataclass(frozen=True)
class RangeMaximum:
    """KVzip's score: the highest probability that any query of the replay, in any head of the group, gives a row.

    The softmax runs over the first rows, the range's rows and the replay's own tokens, so that its cost per token does
    not grow with the context.

    Args:
        anchor: rows at positions below this are in every softmax.
        weigh: KVzip+: probabilities times the norm of the value through the output projection, over the norm of the
            query's hidden state.
    """

    anchor: int
    weigh: bool = False

    def score(self, layer: CompressedLayer, seen: ReplayQueries, begin: Tensor, end: Tensor) -> None:
        """See :class:`Scorer`."""
        storage = layer.storage
        storage.add_column(SCORE, (), torch.float32)
        rows = subset(storage, begin, end, self.anchor)
        if not rows.place.shape[1]:
            return
        fade = seen.hidden.norm(dim=-1, dtype=seen.dtype).log() if self.weigh else torch.zeros_like(seen.own_lse[:, 0])
        fade = torch.where(seen.absent(), torch.inf, fade.to(seen.dtype)).repeat_interleave(layer.kv_heads, 0)
        keys = storage.columns["keys"][rows.place].to(seen.dtype)
        bias = torch.where(rows.present, storage.columns["log_n"][rows.place], -torch.inf).to(seen.dtype)
        queries, own_lse = (seen.per_head(x, storage.heads) for x in (seen.q, seen.own_lse))
        best = strongest(queries * seen.scale, keys, bias, own_lse, fade).exp()
        if self.weigh:
            assert layer.output_weight is not None
            values = storage.columns["values"][rows.place].to(best.dtype)
            best = best * through_output(layer, values).norm(dim=-1)
        score = best.amax(1).clamp(min=FAINTEST, max=None if self.weigh else 1)
        storage.columns[SCORE][rows.place[rows.scored]] = score[rows.scored].float()


@dataclass(frozen=True)
class Displacement:
    """What an action on rows changes for the query that it changes most for, against everything that is stored.

    An action changes the probabilities of its rows by ``d``: dropping row j by ``-p_j``; merging rows j and k by
    cardinality gives each of their tokens the logit ``(n_j s_j + n_k s_k) / (n_j + n_k)``, which is exact for keys that
    are merged after RoPE. The currency "attention" is the probability that moves (total variation) before the softmax
    closes the gap, never less than what moves after; the currency "output_error" is what moves of the attention's
    output, ``|sum d (v - o)|`` through the output projection over ``1 + sum d``, since the softmax fills the gap.

    Args:
        currency: "attention" or "output_error".
        pairs: also judge the merges.
        weights: what a merge weighs keys by; "output_error": the share that displaces least of the output, which the
            cost of the merge then is for; "output": the Gauss-Newton diagonal of the output. "cardinality" and "loss"
            (:func:`asymkv.curvature.replay_chunk_fisher`) leave nothing here.
    """

    currency: str = "attention"
    pairs: bool = False
    weights: str = "cardinality"

    def score(self, layer: CompressedLayer, seen: ReplayQueries, begin: Tensor, end: Tensor) -> None:
        """See :class:`Scorer`."""
        storage = layer.storage
        storage.add_column(SCORE, (), torch.float32)
        if self.pairs:
            storage.add_column(PAIR, (), torch.float32)
        rows = subset(storage, begin, end, 0)
        if not rows.place.shape[1]:
            return
        work = _Costs(layer, seen, rows, self.currency == "output_error" or self.weights in ("output_error", "output"))
        self._weigh(storage, work, rows, seen.rope)
        drop, pair = work.largest(self.currency == "output_error", self.pairs)
        storage.columns[SCORE][rows.place[rows.scored]] = drop.clamp(min=FAINTEST)[rows.scored].float()
        if pair is not None:
            follows = torch.nn.functional.pad(rows.scored[:, 1:], (0, 1))
            pair = torch.where(follows, torch.nn.functional.pad(pair, (0, 1)), torch.inf)
            storage.columns[PAIR][rows.place[rows.scored]] = pair[rows.scored].float()

    def _weigh(self, storage: RaggedStorage, work: _Costs, rows: Subset, rope: Rope) -> None:
        """Writes what merges weigh keys by."""
        place = rows.place[rows.scored]
        if self.weights == "output_error":
            work.share = work.best_share()
            storage.add_column(SHARE, (), torch.float32)
            follows = torch.nn.functional.pad(rows.scored[:, 1:], (0, 1))
            known = torch.where(follows, torch.nn.functional.pad(work.share[:, 0, 0], (0, 1)), 0)
            storage.columns[SHARE][place] = known[rows.scored].float()
        elif self.weights == "output":
            storage.add_column(CURVATURE, work.keys.shape[-1:], statistic_dtype(storage.columns["keys"].dtype))
            found = work.curvature(rope, storage.columns["position"][rows.place])
            storage.columns[CURVATURE][place] = found[rows.scored].to(storage.columns[CURVATURE].dtype)


class _Costs:
    """Costs of the actions on W rows of N heads, over blocks of queries."""

    def __init__(self, layer: CompressedLayer, seen: ReplayQueries, rows: Subset, outputs: bool) -> None:
        storage, dtype = layer.storage, seen.dtype
        self.queries = seen.per_head(seen.q, storage.heads) * seen.scale
        lse = seen.per_head(torch.logaddexp(seen.past_lse, seen.own_lse), storage.heads)
        absent = seen.absent().repeat_interleave(layer.kv_heads, 0)[:, None]
        self.lse = lse.masked_fill(absent, 1e30)  # not inf, which a merge's mean would turn into NaN
        self.keys = storage.columns["keys"][rows.place].to(dtype)
        self.n = torch.where(rows.present, storage.columns["cardinality"][rows.place], 0).to(dtype)[:, None, None]
        total = self.n[..., 1:] + self.n[..., :-1]
        self.share = self.n[..., :-1] / total.clamp(min=1)
        if outputs:
            self.values = through_output(layer, storage.columns["values"][rows.place].to(dtype))
            self.out = through_output(layer, seen.per_head(seen.out, storage.heads))

    def largest(self, by_output: bool, pairs: bool) -> tuple[Tensor, Tensor | None]:
        """Cost of dropping each row ``[N, W]``, and of merging each with the next ``[N, W - 1]``."""
        drop = self.keys.new_zeros(self.keys.shape[:2])
        pair = drop[:, 1:].clone() if pairs else None
        for part in query_blocks(self.queries, self.keys.shape[1]):
            per_token = self._per_token(part)
            offset = self._offset(part) if by_output else None
            if pair is not None:
                pair = pair.maximum(self._merge(per_token, offset).amax((1, 2)))
            drop = drop.maximum(self._drop(per_token, offset).amax((1, 2)))
        return drop, pair

    def best_share(self) -> Tensor:
        """Share of each row's key in its merge with the next that displaces least of the output, ``[N, 1, 1, W - 1]``.

        Over all queries, to second order (specs of the method: section 5.9).
        """
        sums = [self.keys.new_zeros(len(self.keys), self.keys.shape[1] - 1) for _ in range(3)]
        for part in query_blocks(self.queries, self.keys.shape[1]):
            per_token = self._per_token(part)
            apart = (per_token[..., 1:] - per_token[..., :-1]).square_()
            p = per_token.exp_().mul_(self.n)
            distance, mixed = self._offset(part)
            energy, mixed = p.square().mul_(distance), mixed.mul_(p[..., :-1]).mul_(p[..., 1:])
            for total, x in zip(sums, (energy[..., :-1], mixed, energy[..., 1:]), strict=True):
                total.add_((apart * x).sum((1, 2)))
        return PairCost(*sums).weight.clamp(*WEIGHT_RANGE)[:, None, None]

    def curvature(self, rope: Rope, positions: Tensor) -> Tensor:
        """Gauss-Newton diagonal of the output with respect to each key before RoPE, ``[N, W, D]``.

        ``h_d = sum_q |p (v - o)|^2 (ds/dk_d)^2`` (specs of the method: section 5.4); positions ``[N, W]``.
        """
        half = self.keys.shape[-1] // 2
        square, product = torch.zeros_like(self.keys), torch.zeros_like(self.keys[..., :half])
        for part in query_blocks(self.queries, self.keys.shape[1]):
            p = self._per_token(part).exp_().mul_(self.n)
            energy = p.square_().mul_(self._offset(part)[0]).flatten(1, 2).transpose(1, 2)
            q = self.queries[:, :, part].flatten(1, 2)  # scaled, as ds/dk is
            square.baddbmm_(energy, q.square())
            product.baddbmm_(energy, q[..., :half] * q[..., half:])
        return turned_back(square, product, rope, positions)

    def _per_token(self, part: slice) -> Tensor:
        """Log probability of one token of each row, ``[N, G, t, W]``."""
        queries = self.queries[:, :, part]
        logits = torch.bmm(queries.flatten(1, 2), self.keys.transpose(1, 2)).view(*queries.shape[:3], -1)
        return logits.sub_(self.lse[:, :, part, None])

    def _offset(self, part: slice) -> tuple[Tensor, Tensor]:
        """``|v - o|^2 [N, G, t, W]`` and ``(v_j - o)(v_k - o) [N, G, t, W - 1]``, through the output projection."""
        values, out = self.values, self.out[:, :, part]
        cross = out @ values.transpose(-1, -2)
        square = out.square().sum(-1, keepdim=True)
        inner = (values[:, :, 1:] * values[:, :, :-1]).sum(-1)[:, :, None]
        distance = (values.square().sum(-1)[:, :, None] + square - 2 * cross).clamp(min=0)
        return distance, inner + square - cross[..., 1:] - cross[..., :-1]

    def _drop(self, per_token: Tensor, offset: tuple[Tensor, Tensor] | None) -> Tensor:
        p = per_token.exp_().mul_(self.n)
        if offset is None:
            return p.clamp_(max=1)
        return p / (1 - p).clamp(min=LEAST_REST) * offset[0].sqrt()

    def _merge(self, per_token: Tensor, offset: tuple[Tensor, Tensor] | None) -> Tensor:
        first, second = per_token[..., :-1], per_token[..., 1:]
        merged = torch.lerp(second, first, self.share.expand_as(first)).exp_()
        a = (merged - first.exp()).mul_(self.n[..., :-1])
        b = merged.sub_(second.exp()).mul_(self.n[..., 1:])
        if offset is None:
            return a.abs().maximum(b.abs()).maximum((a + b).abs())
        distance, mixed = offset
        square = a.square() * distance[..., :-1] + b.square() * distance[..., 1:] + 2 * a * b * mixed
        return square.clamp(min=0).sqrt() / (1 + a + b).clamp(min=LEAST_REST)


@dataclass(frozen=True)
class Subset:
    """Rows of N heads: ``place [N, W]`` in the buffers, ``present [N, W]``, and those to score, ``scored [N, W]``."""

    place: Tensor
    present: Tensor
    scored: Tensor


def subset(storage: RaggedStorage, begin: Tensor, end: Tensor, anchor: int) -> Subset:
    """Rows of each head at positions below ``anchor`` or from ``begin`` to ``end``, both ``[N]`` int64."""
    positions, valid = storage.ordered("position"), storage.valid()
    if valid is not None:
        positions = torch.where(valid, positions, torch.iinfo(torch.int32).max)
    bounds = torch.stack((torch.full_like(begin, anchor), begin, end), 1).int()
    first, low, high = torch.searchsorted(positions.contiguous(), bounds).unbind(1)
    low = low.maximum(first)
    count = first + (high - low).clamp(min=0)
    index = torch.arange(int(count.max()), device=storage.device).expand(storage.heads, -1)
    present = index < count[:, None]
    index = torch.where(index < first[:, None], index, index + (low - first)[:, None])
    place = storage.locate(torch.where(present, index, 0)).clamp(max=storage.columns["position"].shape[0] - 1)
    position = storage.columns["position"][place]
    return Subset(place, present, present & (position >= begin[:, None]) & (position < end[:, None]))

def query_blocks(queries: Tensor, width: int) -> Iterator[slice]:
    """Slices of queries ``[N, G, t, D]`` whose logits over ``width`` rows fit in memory at a time."""
    heads, group, total, _ = queries.shape
    most = BLOCK_ELEMENTS_CPU if queries.device.type == "cpu" else BLOCK_ELEMENTS
    size = max(1, most // (heads * group * width))
    yield from (slice(begin, begin + size) for begin in range(0, total, size))


def strongest(queries: Tensor, keys: Tensor, bias: Tensor, own_lse: Tensor, fade: Tensor) -> Tensor:
    """Highest log probability of each row over the queries of a head, in blocks of queries.

    The softmax of a query runs over the rows and the replay's own keys up to the query's.

    Args:
        queries: ``[N, G, t, D]``, scaled.
        keys: ``[N, W, D]`` of the rows.
        bias: ``[N, W]``, log n of a row, -inf where absent.
        own_lse: ``[N, G, t]``, log-sum-exp of each query over the replay's own keys up to its own.
        fade: ``[N, t]``, taken off a query's log probabilities; inf where it is no token.

    Returns:
        ``[N, G, W]``.
    """
    heads, group, _, _ = queries.shape
    width = keys.shape[1]
    best = queries.new_full((heads, group, width), -torch.inf)
    for part in query_blocks(queries, width):
        block = queries[:, :, part].flatten(1, 2)
        logits = torch.baddbmm(bias[:, None], block, keys.transpose(1, 2)).view(heads, group, -1, width)
        lse = torch.logaddexp(logits.logsumexp(-1), own_lse[:, :, part]) + fade[:, None, part]
        best = best.maximum(logits.sub_(lse[..., None]).amax(2))
    return best


def through_output(layer: CompressedLayer, x: Tensor) -> Tensor:
    """``R x`` with small stand-ins R for each query head's part of the output projection: ``|R x| = |W_O x|``.

    Args:
        layer: whose ``output_weight [hidden, H * D]`` is known.
        x: ``[B * H_kv, W, D]``, or one for each query head of the group, ``[B * H_kv, G, W, D]``.

    Returns:
        ``[B * H_kv, G, W, min(hidden, D)]``.
    """
    assert layer.output_weight is not None
    blocks = layer.output_weight.to(x.dtype).unflatten(1, (layer.kv_heads, -1, x.shape[-1])).movedim(0, 2)
    factor = torch.linalg.qr(blocks, mode="r").R.repeat(layer.batch, 1, 1, 1)
    return (x if x.dim() == 4 else x[:, None]) @ factor.transpose(-1, -2)
