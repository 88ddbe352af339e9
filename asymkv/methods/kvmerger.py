"""KVMerger (arXiv 2407.08454): runs of similar neighbours merge by Gaussian weights around their most attended row."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from asymkv.budgets import PooledHeads, PooledLayers
from asymkv.checks import check_choice, check_flag, check_number
from asymkv.methods.base import Method
from asymkv.methods.merging import TINY, take, wide
from asymkv.plan import CompactionPlan, contract_pairs, keep_rows
from asymkv.view import RowView

if TYPE_CHECKING:
    from asymkv.config import CompressionConfig

ROPE_MODES = ("pre", "post")
VALUE_SCALES = ("mean", "sum")
# Keys are equal up to so many rounding errors of their length.
SAME = 4


@dataclasses.dataclass(frozen=True)
class KVMerger(Method):
    """Consecutive rows with similar keys become one row, weighed by a Gaussian around the most attended of them.

    A merge set is a run of neighbours whose cosine similarity reaches a threshold epsilon; every pair that reaches it
    costs one row. The threshold is the one that meets the budget exactly, per head; of equal pairs the older merge
    first. Sinks, the window and the rows with the most attention never merge.

    Args:
        protect_share: share of a head's budget that the most attended rows hold unmerged; fewer where the budget
            could not be met otherwise.
        rope_mode: "pre" compares and merges keys before RoPE, and the merged row stands at its last member; "post"
            (the paper) takes keys as they are stored, and the merged row stands at its most attended member.
        sigma: width of the Gaussian; None = root mean squared distance of the members from the most attended one.
        value_scale: "mean" (weights sum to 1) or "sum" (times the rows of the set, one reading of the paper's eq. 7).
        count_bias: the merged row stands for the tokens of all members (log n in attention), and rows weigh by their
            tokens; False is the published form.
    """

    title: ClassVar[str] = "KVMerger, arXiv 2407.08454"

    protect_share: float = 0.12
    rope_mode: str = "pre"
    sigma: float | None = None
    value_scale: str = "mean"
    count_bias: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"attention"})

    def validate(self, config: CompressionConfig) -> None:
        """Checks the choices.

        Raises:
            ValueError: for an unknown choice, a number out of range, or counts beside summed values.
        """
        super().validate(config)
        check_choice("rope_mode", self.rope_mode, ROPE_MODES)
        check_choice("value_scale", self.value_scale, VALUE_SCALES)
        check_number("protect_share", self.protect_share, 0, 1)
        check_flag("count_bias", self.count_bias)
        if self.sigma is not None:
            check_number("sigma", self.sigma, TINY)
        for name, split in (("head_budgets", config.head_split), ("layer_budgets", config.layer_split)):
            if isinstance(split, (PooledHeads, PooledLayers)):
                raise ValueError(f"{config.method}: heads protect rows of their own, so that no choice is common to "
                                 f"them; {name} must not be 'pooled'")
        if self.count_bias and self.value_scale == "sum":
            raise ValueError("count_bias=True counts the members already; value_scale must be 'mean', found 'sum'")

    def judge(self, view: RowView) -> tuple[Tensor, Tensor]:
        """Dissimilarity of neighbours ``[B, H_kv, T - 1]``, and the pairs whose rows may both merge."""
        keys = torch.nn.functional.normalize(self._keys(view), dim=-1, eps=TINY)
        protected = view.protected(self.sink_size, self.window_size)
        protected = protected | self.pivotal(view.statistics["mass"], protected, view.excess, view.budget)
        return -(keys[..., 1:, :] * keys[..., :-1, :]).sum(-1), free_pairs(protected)

    def pivotal(self, mass: Tensor, protected: Tensor, excess: Tensor, budget: Tensor) -> Tensor:
        """The most attended rows, as many as leave enough pairs to meet the budget.

        Args:
            mass: ``[B, H_kv, T]`` accumulated attention.
            protected: ``[B, H_kv, T]`` bool, rows that do not merge anyway.
            excess: ``[B, H_kv]`` rows that a head must lose.
            budget: ``[B, H_kv]`` rows to keep.

        Returns:
            ``[B, H_kv, T]`` bool.
        """
        worth = torch.where(protected, -torch.inf, mass.nan_to_num(nan=0.0))
        order = worth.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order)
        rank.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
        low, high = torch.zeros_like(budget), (budget.double() * self.protect_share).floor().long()
        # The more rows are protected, the fewer pairs are free: halving finds the most that still fits.
        for _ in range(order.shape[-1].bit_length() + 1):
            middle = (low + high + 1) // 2
            fits = free_pairs(protected | (rank < middle[..., None])).sum(-1) >= excess
            low, high = torch.where(fits, middle, low), torch.where(fits, high, (middle - 1).clamp(min=0))
        return rank < low[..., None]

    def carry_out(self, view: RowView, chosen: Tensor) -> CompactionPlan:
        """Merges every run of chosen pairs into one row.

        Rows are edited, not merged by the plan: the executor weighs values by cardinality, and always adds it up.
        """
        sets = Sets(contract_pairs(chosen), view.statistics["mass"])
        weight = self.weights(view, sets)
        grown = (sets.size > 1) & view.valid
        view.keys = torch.where(grown[..., None], self._merged_keys(view, sets, weight), view.keys)
        values = sets.sum(weight[..., None] * wide(view.values))
        if self.value_scale == "sum":
            values = values * sets.size[..., None]
        view.values = torch.where(grown[..., None], values.to(view.values.dtype), view.values)
        if self.count_bias:
            view.cardinality = torch.where(grown, sets.sum(view.cardinality), view.cardinality)
        mass = view.statistics["mass"]
        view.statistics = {**view.statistics, "mass": torch.where(grown, sets.sum(mass), mass)}
        slot = sets.last if self.rope_mode == "pre" else sets.pivot
        return keep_rows((slot == sets.index) & view.valid)

    def weights(self, view: RowView, sets: Sets) -> Tensor:
        """Normalised weight of each row in its set, ``[B, H_kv, T]``; 1 for a row by itself."""
        keys = self._keys(view)
        distance = (keys - take(keys, sets.pivot)).square().sum(-1)
        # The width follows the distances, so that rounding alone would make weights of equal keys unequal.
        rounding = SAME * torch.finfo(view.keys.dtype).eps
        distance = torch.where(distance > rounding**2 * keys.square().sum(-1), distance, 0)
        if self.sigma is None:
            width = sets.sum(distance) / (sets.size - 1).clamp(min=1)
        else:
            width = torch.full_like(distance, self.sigma**2)
        g = torch.exp(-distance / torch.where(width > 0, 2 * width, 1))
        if self.count_bias:
            g = g * view.cardinality
        return g / sets.sum(g)

    def _keys(self, view: RowView) -> Tensor:
        """Keys in the coordinates that they are compared and merged in."""
        return view.unrotate(view.keys) if self.rope_mode == "pre" else wide(view.keys)

    def _merged_keys(self, view: RowView, sets: Sets, weight: Tensor) -> Tensor:
        """The merged key of each row's set, turned to that row's own rotary position."""
        keys = sets.sum(weight[..., None] * self._keys(view))
        if self.rope_mode == "pre":
            keys = view.rope.rotate(keys, view.rotary_positions)
        return keys.to(view.keys.dtype)


class Sets:
    """Merge sets of rows, each row told about its own set.

    ``index``, ``last`` (its last row), ``pivot`` (its most attended row, the oldest of equals) and ``size``, all
    ``[B, H_kv, T]``.

    Args:
        last: ``[B, H_kv, T]`` int64, last row of each row's set.
        mass: ``[B, H_kv, T]`` accumulated attention.
    """

    def __init__(self, last: Tensor, mass: Tensor) -> None:
        self.last = last
        self.index = torch.arange(last.shape[-1], device=last.device).expand_as(last)
        self.size = self.sum(torch.ones_like(last))
        mass = mass.nan_to_num(nan=0.0)
        best = torch.zeros_like(mass).scatter_reduce_(2, last, mass, "amax", include_self=False).gather(2, last)
        leads = torch.where(mass == best, self.index, last.shape[-1])
        self.pivot = torch.zeros_like(last).scatter_reduce_(2, last, leads, "amin", include_self=False).gather(2, last)

    def sum(self, x: Tensor) -> Tensor:
        """Sum of ``x [B, H_kv, T]`` or ``[B, H_kv, T, D]`` over each row's set, the same shape."""
        index = self.last if x.ndim == 3 else self.last[..., None].expand_as(x)
        return torch.zeros_like(x).scatter_add_(2, index, x).gather(2, index)


def free_pairs(protected: Tensor) -> Tensor:
    """``[B, H_kv, T - 1]`` bool: neighbours of which neither is ``protected [B, H_kv, T]``."""
    return ~(protected[..., 1:] | protected[..., :-1])
