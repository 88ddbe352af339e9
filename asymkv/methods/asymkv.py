"""AsymKV (arXiv 2506.05410): merge adjacent, homogeneous keys; keep heterogeneous values by cardinality."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from asymkv.budgets.heads import HeadBudgets
from asymkv.checks import check_choice, check_flag, check_integer
from asymkv.methods import upstream
from asymkv.methods.base import Method
from asymkv.methods.merging import MERGED_KEYS, MERGED_POSITIONS, group_sums, merge_in_place
from asymkv.methods.upstream import upstream_compact
from asymkv.observations import (
    WEIGHT_RANGE,
    PairCost,
    attention_mass,
    exposure,
    key_curvature,
    pair_cost,
    sampled,
    statistic_dtype,
)
from asymkv.plan import CompactionPlan, contract_pairs, keep_rows
from asymkv.view import RowView

if TYPE_CHECKING:
    from asymkv.config import CompressionConfig

__all__ = ["AsymKV", "convex_weights", "upstream_compact"]

CURVATURES = ("loss", "output", "cardinality")
KEY_WEIGHTS = ("curvature", "output_error", "attention", "mean")
PAIR_RULES = ("attention", "output_error")

# Share of the cardinality weight mixed into every curvature weight, and the curvature below which it takes over.
MIX, VANISHING = 1e-5, 1e-30


@dataclasses.dataclass(frozen=True)
class AsymKV(Method):
    """Merges the adjacent pairs that matter least, per KV head; runs of pairs become one row; nothing is dropped.

    Args:
        curvature: what weighs a key in a merge: "loss" (squared gradient of the chunk's LM loss, the paper's Fisher
            diagonal), "output" (Gauss-Newton of the attention output, forward only), "cardinality".
        key_weights: "curvature" (per dimension), "output_error" (the scalar weight that minimises the change of the
            attention output, per pair), "attention" (the attention that a row gets) or "mean" (rows count alike).
        pair_rule: "attention" (lowest sum of attention, the paper's) or "output_error" (smallest change of the
            attention output at the merge's own best weight).
        position_factor: multiply a pair's attention by ``exp(-(i + 1) / gamma)``, ``gamma = 4096 / ln 512``, as the
            released code does.
        cardinality_factor: multiply it by the tokens that the pair stands for, as the released code does.
        mean_attention: divide a row's attention by the number of queries that could see it.
        max_queries: queries of a chunk, evenly spaced over it, that attention, curvature and output error are
            measured with; None = all.
        merged_keys: average keys "pre_rope", turned to the merged row's position (the paper's), or as they are stored
            ("post_rope").
        merged_position: a merged row's position, of its "last" member or the "mean" by cardinality.
        upstream_compat: reproduce the released code: one pair set for all heads, overlapping pairs that drop rows,
            cardinality cap 5, chunk-local loss, two forwards per chunk, no compaction in decode, no window. Its sinks
            (32), budget (2080), and positions from cumulative cardinality become the defaults.
    """

    title: ClassVar[str] = "AsymKV, arXiv 2506.05410"

    curvature: str = "cardinality"
    key_weights: str = "curvature"
    pair_rule: str = "attention"
    position_factor: bool = False
    cardinality_factor: bool = False
    mean_attention: bool = True
    max_queries: int | None = 128
    merged_keys: str = "pre_rope"
    merged_position: str = "last"
    upstream_compat: bool = False

    @property
    def needs(self) -> frozenset[str]:
        if self.upstream_compat:
            return frozenset({"replay"})
        by_loss = self.curvature == "loss" and self.key_weights == "curvature"
        return frozenset({"queries", "loss"} if by_loss else {"queries"})

    def defaults(self) -> dict[str, Any]:
        return dict(upstream.DEFAULTS) if self.upstream_compat else {}

    def validate(self, config: CompressionConfig) -> None:
        """Checks the choices.

        Raises:
            ValueError: for an unknown choice, or settings that the released code cannot have.
        """
        super().validate(config)
        choices = {"curvature": CURVATURES, "key_weights": KEY_WEIGHTS, "pair_rule": PAIR_RULES,
                   "merged_keys": MERGED_KEYS, "merged_position": MERGED_POSITIONS}  # fmt: skip
        for name, allowed in choices.items():
            check_choice(name, getattr(self, name), allowed)
        for name in ("position_factor", "cardinality_factor", "mean_attention", "upstream_compat"):
            check_flag(name, getattr(self, name))
        if self.max_queries is not None:
            check_integer("max_queries", self.max_queries, 1)
        self._check_merges(config)
        if self.upstream_compat and config.decode_interval:
            raise ValueError("upstream_compat=True never compacts in decode; decode_interval must be 0, "
                             f"found {config.decode_interval}")
        if self.upstream_compat and config.window_size:
            raise ValueError("upstream_compat=True knows no window: the newest chunk is left whole; window_size must "
                             f"be 0, found {config.window_size}")

    def _check_merges(self, config: CompressionConfig) -> None:
        """Raises ValueError for ways to merge that do not go together."""
        merges = f"merged_keys={self.merged_keys!r}, merged_position={self.merged_position!r}"
        if self._edits and (self.upstream_compat or config.positions != "original"):
            raise ValueError("merged_keys='post_rope' and merged_position='mean' need upstream_compat=False and "
                             f"position_policy='original'; found {merges}, upstream_compat={self.upstream_compat}, "
                             f"position_policy={config.positions!r}")
        by_dimension = self.key_weights == "curvature" and self.curvature != "cardinality"
        if self.merged_keys == "post_rope" and by_dimension:
            raise ValueError(f"curvature={self.curvature!r} weighs dimensions as they are before RoPE; merged_keys "
                             "must be 'pre_rope', found 'post_rope'")

    @property
    def _edits(self) -> bool:
        return self.merged_keys == "post_rope" or self.merged_position == "mean"

    def row_bytes(self, head_dim: int, dtype: torch.dtype, config: CompressionConfig) -> int:
        """The Fisher diagonal rides along where decode may use it."""
        if "loss" not in self.needs or not config.decode_interval:
            return 0
        return head_dim * statistic_dtype(dtype).itemsize

    @property
    def splits_budget(self) -> bool:  # type: ignore[override]
        return not self.upstream_compat

    def plan(self, view: RowView, heads: HeadBudgets | None = None) -> CompactionPlan:
        """Contracts the cheapest adjacent pairs, or does what the released code does."""
        return upstream.plan(view, self.sink_size) if self.upstream_compat else super().plan(view, heads)

    def judge(self, view: RowView) -> tuple[Tensor, Tensor]:
        """Cost of contracting rows j and j + 1, and which pairs may be, ``[B, H_kv, T - 1]``.

        Leaves in ``view.evidence``: ``pair_weight`` or ``curvature``, where the merge's weights need them.
        """
        view = sampled(view, self.max_queries)
        cost = pair_cost(view) if "output_error" in (self.pair_rule, self.key_weights) else None
        self._note_weights(view, cost)
        free = ~view.protected(self.sink_size, self.window_size)
        return self.pair_score(view, cost), free[..., 1:] & free[..., :-1]

    def _note_weights(self, view: RowView, cost: PairCost | None) -> None:
        """Leaves in ``view.evidence`` what the keys' weights are made of."""
        if self.key_weights == "output_error":
            assert cost is not None
            view.evidence["pair_weight"] = cost.weight.clamp(*WEIGHT_RANGE)
        elif self.key_weights == "attention":
            view.evidence["mean_attention"] = attention_mass(view) / exposure(view)
        elif self.key_weights == "curvature" and self.curvature == "output":
            view.evidence["curvature"] = key_curvature(view)
        elif self.key_weights == "curvature" and self.curvature == "loss" and "fisher" in view.statistics:
            # Held here: the column may be gone by the time that layers which wait for each other are compacted.
            view.evidence["curvature"] = view.statistics["fisher"]

    def carry_out(self, view: RowView, chosen: Tensor) -> CompactionPlan:
        """Contracts the chosen pairs."""
        destination = contract_pairs(chosen)
        weight = self.key_weight(view, chosen, destination)
        if not self._edits:
            return CompactionPlan(destination, weight)
        merge_in_place(view, destination, weight, keys=self.merged_keys, position=self.merged_position)
        index = torch.arange(destination.shape[-1], device=destination.device)
        return keep_rows((destination == index) & view.valid)

    def tokens(self, view: RowView) -> Tensor:
        """Tokens that each row stands for, ``[B, H_kv, T]``."""
        return view.cardinality

    def pair_score(self, view: RowView, cost: PairCost | None) -> Tensor:
        """Cost of contracting rows j and j + 1, ``[B, H_kv, T - 1]``."""
        if self.pair_rule == "output_error":
            assert cost is not None
            score = cost.error(self._pair_weight(view, cost))
        else:
            mass = attention_mass(view)
            if self.mean_attention:
                mass = mass / exposure(view)
            score = mass[..., 1:] + mass[..., :-1]
        if self.position_factor:
            score = score * upstream.position_factor(score.shape[-1] + 1, self.sink_size, score)
        if self.cardinality_factor:
            n = self.tokens(view).to(score.dtype)
            score = score * (n[..., 1:] + n[..., :-1])
        return score

    def _pair_weight(self, view: RowView, cost: PairCost) -> Tensor:
        """Weight on row j that the merge of j and j + 1 will use, as far as it is a scalar."""
        if self.key_weights == "output_error":
            return view.evidence["pair_weight"]
        if self.key_weights == "mean":
            return torch.full_like(cost.a, 0.5)
        n = self.tokens(view).to(cost.a.dtype)
        return n[..., :-1] / (n[..., 1:] + n[..., :-1])

    def key_weight(self, view: RowView, pairs: Tensor, destination: Tensor) -> Tensor | None:
        """Convex weights of keys, ``[B, H_kv, T]`` or ``[B, H_kv, T, D]``; None = cardinality."""
        if self.key_weights == "output_error":
            return chain_weights(view.evidence["pair_weight"], pairs, destination)
        if self.key_weights == "attention":
            return view.evidence["mean_attention"]
        if self.key_weights == "mean":
            return torch.ones_like(destination, dtype=torch.float32)
        if self.curvature == "cardinality":
            return None
        curvature = view.evidence.get("curvature")
        if curvature is None:
            return None
        return convex_weights(curvature, self.tokens(view), destination)


def convex_weights(curvature: Tensor, cardinality: Tensor, destination: Tensor) -> Tensor:
    """Newton weights of keys that fall back smoothly to cardinality where the curvature vanishes.

    A row without curvature (all dimensions zero) counts like its group's average token.

    Args:
        curvature: ``[B, H_kv, T, D]`` >= 0.
        cardinality: ``[B, H_kv, T]``.
        destination: ``[B, H_kv, T]``, the group of each row.

    Returns:
        ``[B, H_kv, T, D]`` > 0, not normalised.
    """
    h = curvature.to(torch.promote_types(curvature.dtype, torch.float32))
    n = cardinality.to(h.dtype)[..., None]
    known = (h.amax(-1, keepdim=True) > 0).to(h.dtype)
    density = group_sums(h * known, destination) / group_sums(n * known, destination).clamp(min=VANISHING)
    return torch.where(known > 0, h, n * density) + n * (MIX * density + VANISHING)


def chain_weights(weight: Tensor, pairs: Tensor, destination: Tensor) -> Tensor:
    """Weights of the members of runs whose neighbours stand to each other as their pair weights say.

    Args:
        weight: ``[B, H_kv, T - 1]``, of row j in the pair of j and j + 1, between 0 and 1.
        pairs: ``[B, H_kv, T - 1]`` bool, those that merge.
        destination: ``[B, H_kv, T]`` of :func:`asymkv.plan.contract_pairs`.

    Returns:
        ``[B, H_kv, T]``, at most 1, not normalised.
    """
    step = torch.where(pairs, torch.log1p(-weight) - torch.log(weight), 0)
    height = torch.nn.functional.pad(step.cumsum(-1), (1, 0))
    top = torch.full_like(height, -math.inf).scatter_reduce_(-1, destination, height, "amax")
    return torch.exp(height - top.gather(-1, destination))
