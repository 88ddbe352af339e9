"""AAGC: attention-guided pruning, then online k-means of what is kept (no paper; the public code's idea, made to work).

Symbols of the public code: B rows, K centroids, P tokens between compactions, Delta judging queries, eta.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from asymkv.budgets import PooledHeads, PooledLayers
from asymkv.checks import check_choice, check_flag, check_integer, check_number
from asymkv.methods import aagc_seed
from asymkv.methods.base import Method
from asymkv.methods.clustering import FOLDED, WORTH, Clusters, farthest_seeds, folded_of, spread_seeds, worth_of
from asymkv.methods.merging import take, wide
from asymkv.observations import attention_mass, exposure, newest
from asymkv.plan import CompactionPlan, keep_rows
from asymkv.view import RowView

if TYPE_CHECKING:
    from asymkv.config import CompressionConfig

SCOPES = ("kv_head", "layer", "global")
UPDATES = ("mean", "ema")
ROPE_MODES = ("post", "derotate")
# Without settings, centroids and recent rows take at most this share of the budget each: the public code's 256 of 1024.
DEFAULT_SHARE = 4


@dataclasses.dataclass(frozen=True)
class AAGC(Method):
    """Prunes to the budget by the attention of the last queries, then folds the kept rows into centroids by k-means.

    Every ``pruning_interval`` own tokens, and at the end of a prompt, if a head holds more rows than its budget: the
    rows that the last ``lookback_window`` queries attend to least are dropped, and those that stay, but for sinks and
    the newest rows, join the nearest of ``num_clusters`` centroids (squared distance of keys; values follow). A head
    then holds sinks, centroids and recent rows, and fills up to the budget again. Centroids are dropped only under
    ``evict_centroids``. A centroid is a row at the position of its newest member, and counts in attention as the tokens
    that it stands for. That log n under-estimates a centroid's mass wherever its keys differ; the second-order
    correction depends on the query, needs an attention that no kernel here has, and is left out.

    Means are computed in fp32 (fp64 for fp64) and stored in the cache's dtype: attention reads them there beside exact
    rows, and a second bank in fp32 would cost as much again as the centroids. In bf16 a centroid of n tokens therefore
    stops following single tokens once one of them moves it by less than 1/512 of its size, at n of some hundreds.

    Args:
        num_clusters: K; None = a quarter of the budget, or what sinks and recent rows leave. At least the budget:
            prune only.
        pruning_interval: P; sets ``chunk_size`` and ``decode_interval`` where those are not given.
        lookback_window: Delta: queries that judge, those of the chunk, or those generated since the last compaction.
        recent_size: newest rows kept exact; None = Delta, at most a quarter of the budget; never below
            ``window_size``.
        kmeans_learning_rate: eta of ``kmeans_update="ema"``.
        score_scope: rows are dropped by the attention of their KV head, of their "layer", or of all layers ("global",
            the public code's); the latter two drop the same rows in every head.
        kmeans_update: "mean" (exact running mean of all tokens ever folded) or "ema": a centroid moves by
            ``1 - (1 - eta)^r`` of the way to the mean of its r new rows.
        kmeans_iters: assignments per compaction; more than one lets old centroids move and join, weighted by tokens.
        count_bias: a centroid counts as its tokens (log n in attention); False: as one.
        rope_mode: "post" clusters keys as they are stored; "derotate" before RoPE, a centroid's key then being turned
            to the mean position of its tokens.
        evict_centroids: before each fold, gives up the centroids whose attention per token is below that of every row
            that their head is about to fold; the slots are refilled at once by the rows farthest from the bank.
            Whatever ``score_scope``, a head asks its own queries: centroids are its own.
        exposure_fix: divides the attention of a row by the number of judging queries that could see it.
        importance: values are means by importance, the attention when a row was folded, instead of by tokens; keys and
            counts are as without. Under "ema", r stays the number of rows, and importance weighs the mean of these.
        seed_compat: the public code's rule: one score for all heads and layers, nothing protected, the whole cache
            replaced by K centroids that a layer's heads share, moved by eta from random rows, counts unused.
        seed: of those random rows.
    """

    title: ClassVar[str] = "AAGC, public code without a paper"

    num_clusters: int | None = None
    pruning_interval: int = 512
    lookback_window: int = 256
    recent_size: int | None = None
    kmeans_learning_rate: float = 0.01
    score_scope: str = "kv_head"
    kmeans_update: str = "mean"
    kmeans_iters: int = 1
    count_bias: bool = True
    rope_mode: str = "post"
    evict_centroids: bool = False
    exposure_fix: bool = False
    importance: bool = False
    seed_compat: bool = False
    seed: int = 0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"queries"})

    @property
    def query_window(self) -> int:
        return self.lookback_window

    @property
    def scope(self) -> str:
        """The scope in force."""
        return "global" if self.seed_compat else self.score_scope

    def defaults(self) -> dict[str, Any]:
        """Chunks and decode compact every P tokens; a common score needs a common choice."""
        out: dict[str, Any] = {"chunk_size": self.pruning_interval, "decode_interval": self.pruning_interval}
        if self.seed_compat:
            out |= {"sink_size": 0, "window_size": 0}
        name = {"layer": "head_budgets", "global": "layer_budgets"}.get(self.scope)
        return out if name is None else {**out, name: "pooled"}

    def validate(self, config: CompressionConfig) -> None:
        """Checks the choices.

        Raises:
            ValueError: for an unknown choice or a number out of range; K, sinks and recent rows that exceed the
                budget; a scope beside another split of the budget; or settings that the public code cannot have.
        """
        super().validate(config)
        check_choice("score_scope", self.score_scope, SCOPES)
        check_choice("kmeans_update", self.kmeans_update, UPDATES)
        check_choice("rope_mode", self.rope_mode, ROPE_MODES)
        for name in ("pruning_interval", "lookback_window", "kmeans_iters"):
            check_integer(name, getattr(self, name), 1)
        for name, least in (("num_clusters", 1), ("recent_size", 0)):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least)
        check_integer("seed", self.seed, 0)
        check_number("kmeans_learning_rate", self.kmeans_learning_rate, 0, 1)
        for name in ("count_bias", "evict_centroids", "exposure_fix", "importance", "seed_compat"):
            check_flag(name, getattr(self, name))
        self._check_together(config)
        if isinstance(config.budget, int):
            self._check_room(torch.tensor([[config.budget]]))

    def _check_together(self, config: CompressionConfig) -> None:
        if self.lookback_window > self.pruning_interval:
            raise ValueError(f"lookback_window must be at most pruning_interval={self.pruning_interval}, the queries "
                             f"between two compactions; found {self.lookback_window}")
        if self.kmeans_iters > 1 and self.kmeans_update == "ema":
            raise ValueError(f"kmeans_update='ema' moves each centroid once; kmeans_iters must be 1, found "
                             f"{self.kmeans_iters}")
        if self.rope_mode == "derotate" and config.positions != "original":
            raise ValueError(f"rope_mode='derotate' needs the tokens' own positions; position_policy must be "
                             f"'original', found {config.positions!r}")
        splits = {"layer": ("head_budgets", config.head_split, PooledHeads),
                  "global": ("layer_budgets", config.layer_split, PooledLayers)}  # fmt: skip
        if self.scope in splits:
            name, found, wanted = splits[self.scope]
            if not isinstance(found, wanted):
                raise ValueError(f"score_scope={self.scope!r} chooses for all heads at once; {name} must be 'pooled', "
                                 f"found {getattr(config, name)!r}")
        if self.seed_compat:
            aagc_seed.check(self, config)

    def check_dimensions(self, *, keys: bool, values: bool) -> None:
        """See :meth:`Method.check_dimensions`."""
        if keys and self.rope_mode == "derotate":
            raise ValueError("rope_mode='derotate' turns stored keys back by their positions, which projected keys do "
                             "not allow; use rope_mode='post' with dimensions='zack', or set keys: false")
        if self.seed_compat:
            raise ValueError("seed_compat=True shares centroids between heads, and rows of fewer dimensions lie in "
                             "each head's own directions; dimensions must be None, found 'zack'")

    def row_bytes(self, head_dim: int, dtype: torch.dtype, config: CompressionConfig) -> int:
        """The column of a row's folded tokens, two fp32 numbers, and that of its importance, one."""
        return 12 if self._keeps_worth else 8

    @property
    def _keeps_worth(self) -> bool:
        """Whether centroids remember the importance folded into them; an ema forgets it."""
        return self.importance and self.kmeans_update == "mean"

    # -- sizes -------------------------------------------------------------------------------------------------------
    def sizes(self, budget: Tensor) -> tuple[Tensor, Tensor]:
        """Recent rows and centroids of heads with so many rows, ``[B, H_kv]`` int64 each."""
        share = budget // DEFAULT_SHARE
        given = share.clamp(max=self.lookback_window) if self.recent_size is None else self.recent_size
        recent = torch.zeros_like(budget) + (0 if self.seed_compat else given)
        recent = recent.clamp(min=self.window_size)
        room = (budget - self.sink_size - recent).clamp(min=0)
        clusters = share.clamp(min=1).minimum(room) if self.num_clusters is None else torch.full_like(
            budget, self.num_clusters)  # fmt: skip
        return recent, clusters

    def _check_room(self, budget: Tensor) -> None:
        recent, clusters = self.sizes(budget)
        full = (clusters < budget) & (self.sink_size + recent + clusters > budget)
        if bool(full.any()):
            b, r, k = (int(x[full][0]) for x in (budget, recent, clusters))
            room = b - self.sink_size - r
            most = f"at most {room} clusters" if room > 0 else (
                f"no clusters, since sinks and recent rows alone, {self.sink_size} + {r}, leave no row")  # fmt: skip
            raise ValueError(f"num_clusters + sink_size + recent rows = {k} + {self.sink_size} + {r} exceed the budget "
                             f"of {b} rows; allowed: {most}, or at least {b} (prune only), or a smaller recent_size, "
                             "window_size or sink_size")

    # -- decision ----------------------------------------------------------------------------------------------------
    def score(self, view: RowView) -> Tensor:
        """Attention of the last queries that each row received, summed over them and the heads of the group.

        With ``exposure_fix``, the sum over the heads of its mean over the queries that could see the row.
        """
        seen = newest(view, self.lookback_window)
        mass = attention_mass(seen)
        return mass / exposure(seen) if self.exposure_fix else mass

    @torch.no_grad()
    def judge(self, view: RowView) -> tuple[Tensor, Tensor]:
        """The score, and the exact rows that are neither sinks nor recent; leaves the score in ``view.evidence``."""
        view.evidence["importance"] = self.score(view)
        return view.evidence["importance"], self._free(view)

    def _free(self, view: RowView) -> Tensor:
        if self.seed_compat:
            return view.valid
        recent, _ = self.sizes(view.budget)
        newest_kept = (view.tokens[:, None] - recent)[..., None]
        exact = (view.positions >= self.sink_size) & (view.positions < newest_kept) & view.valid
        return exact & ~(folded_of(view)[..., 0] > 0)

    def carry_out(self, view: RowView, chosen: Tensor) -> CompactionPlan:
        """Drops the chosen rows and folds the other free ones into the centroids."""
        _, clusters = self.sizes(view.budget)
        losing = chosen.any(-1)
        self._check_room(torch.where(losing, view.budget, torch.iinfo(torch.int64).max // 2))
        acting = (losing & (clusters < view.budget))[..., None]
        if self.seed_compat:
            return aagc_seed.carry_out(self, view, chosen, acting, clusters)
        bank = (folded_of(view)[..., 0] > 0) & acting
        taken = self._free(view) & ~chosen & acting
        if not bool(taken.any()):
            return keep_rows(~chosen & view.valid)
        forgotten = self._forgotten(view, taken, bank)
        gone = self._fold(view, taken, bank & ~forgotten, clusters)
        return keep_rows(~chosen & view.valid & ~forgotten & ~gone)

    def _forgotten(self, view: RowView, taken: Tensor, bank: Tensor) -> Tensor:
        """``[B, H_kv, T]`` bool: centroids that are given up, by their importance per token."""
        if not self.evict_centroids:
            return torch.zeros_like(bank)
        importance = view.evidence["importance"]
        least = torch.where(taken, importance, torch.inf).amin(-1, keepdim=True)
        each = importance / folded_of(view)[..., 0].clamp(min=1)
        # A head that keeps nothing has nothing to compare its centroids with, nor to refill their slots.
        return bank & (each < least) & taken.any(-1, keepdim=True)

    def _fold(self, view: RowView, taken: Tensor, bank: Tensor, clusters: Tensor) -> Tensor:
        """Folds the ``taken`` rows into the ``bank``, both ``[B, H_kv, T]`` bool; the rows that are gone by that."""
        folded = folded_of(view).double()
        own = torch.stack([view.cardinality, view.positions], dim=-1).double()
        folded = torch.where(bank[..., None], folded, own)  # an exact row stands for itself
        turn = folded[..., 1].round().long() if self.rope_mode == "derotate" else None
        keys = wide(view.keys) if turn is None else view.rope.rotate(view.keys, -turn)
        seeds = self._seeds(view, keys.detach(), taken, bank, clusters)
        points = Clusters.of(keys.detach(), taken | bank, seeds | bank, folded[..., 0], self.kmeans_iters)
        tokens = folded[..., 0].gather(2, points.index)
        weight = self._weights(points, bank, tokens).to(keys.dtype)
        worth = weight if not self.importance else self._worth(view, points, bank, tokens).to(keys.dtype)
        slot = points.slots()
        merged = slot & (points.spread(points.total(torch.ones_like(points.index))) > 1)  # others keep their bits
        total = points.total(tokens)
        place = folded[..., 1].gather(2, points.index)
        mean = points.means(place[..., None], tokens)
        key = points.spread(points.means(take(keys, points.index), weight))
        if turn is not None:
            key = view.rope.rotate(key, points.spread(mean)[..., 0].round().long())
        value = points.spread(points.means(take(wide(view.values), points.index), worth))
        view.keys = points.put(view.keys, key, merged)
        view.values = points.put(view.values, value, merged)
        column = points.spread(torch.cat([total[..., None], mean], dim=-1))
        view.statistics[FOLDED] = points.put(folded_of(view), column, slot)
        if self.count_bias:
            view.cardinality = points.put(view.cardinality, points.spread(total), slot)
        stays = points.put(torch.zeros_like(taken), slot, slot)
        return (taken | bank) & ~stays

    def _seeds(self, view: RowView, keys: Tensor, taken: Tensor, bank: Tensor, clusters: Tensor) -> Tensor:
        """``[B, H_kv, T]`` bool: taken rows that become new centroids, as many as the bank is short of.

        Evenly spaced by importance for an empty bank, else the farthest from the bank; no row twice.
        """
        short = (clusters - bank.sum(-1)).clamp(min=0).minimum(taken.sum(-1))
        first = spread_seeds(view.evidence["importance"], taken, short)
        known = bank.any(-1)
        if not bool((known & (short > 0)).any()):
            return first & ~known[..., None]
        return torch.where(known[..., None], farthest_seeds(keys, taken, bank, short), first)

    def _worth(self, view: RowView, points: Clusters, bank: Tensor, tokens: Tensor) -> Tensor:
        """``[B, H_kv, E]`` fp64: weight of each point's value in the mean of its centroid, by importance.

        Tokens decide where no point of a centroid has any. Adds up what is folded in the column ``WORTH``.
        """
        column = worth_of(view)
        amount = torch.where(bank, column, view.evidence["importance"]).double().gather(2, points.index)
        total = points.spread(points.total(amount))
        if self._keeps_worth:
            view.statistics[WORTH] = points.put(column, total, points.slots())
        # A share of its centroid's, since attention itself may be too small for products in fp32.
        share = amount / torch.where(total > 0, total, 1)
        return self._weights(points, bank, torch.where(total > 0, share, tokens))

    def _weights(self, points: Clusters, bank: Tensor, amount: Tensor) -> Tensor:
        """``[B, H_kv, E]`` fp64: weight of each point in the mean of its centroid, from its ``amount [B, H_kv, E]``."""
        if self.kmeans_update == "mean":
            return amount
        old = bank.gather(2, points.index) & points.present
        new = (points.present & ~old).double()
        share = points.spread(1 - (1 - self.kmeans_learning_rate) ** points.total(new))
        fresh = points.spread(points.total(new * amount))
        led = points.spread(points.total(old.double())) > 0
        return torch.where(led, torch.where(old, 1 - share, share * amount / torch.where(fresh > 0, fresh, 1)), amount)
