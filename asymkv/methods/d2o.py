"""D2O (arXiv 2406.13035): evicted rows join the most similar kept row, if similar enough."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from asymkv.checks import check_choice, check_flag, check_number
from asymkv.methods.base import Method
from asymkv.methods.merging import Fold, leaving_rows, nearest_row
from asymkv.plan import CompactionPlan, keep_rows
from asymkv.view import RowView

if TYPE_CHECKING:
    from asymkv.config import CompressionConfig

MODES = ("paper", "code")
# Similarities that differ by rounding pass the threshold alike, so that what passes never hangs on the batch.
ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class D2O(Method):
    """H2O's selection; a leaving row merges into the kept row of the most similar key, or is dropped below a threshold.

    The threshold is the mean similarity of the rows that left first, then follows later ones by an exponential moving
    average; a leaving row passes if its similarity, averaged over the KV heads (row by row in order of position),
    reaches it. Keys merge as they are stored (after RoPE), and sinks are never merged into. D2O's budgets per layer
    are not part of this method.

    Args:
        mode: "paper" (convex weights, e for the kept row and exp(similarity) for those that join it) or "code"
            (the released code's mean of the kept row and similarity times the others: shorter where they differ).
        alpha: weight of the old threshold in the average.
        beta: weight of the newly left rows' mean similarity.
        count_bias: the kept row stands for the tokens that joined it too (log n in attention), and rows weigh by
            their tokens; False is the published form.
    """

    title: ClassVar[str] = "D2O, arXiv 2406.13035"

    mode: str = "paper"
    alpha: float = 0.5
    beta: float = 0.5
    count_bias: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"attention"})

    def validate(self, config: CompressionConfig) -> None:
        """Checks the choices.

        Raises:
            ValueError: for an unknown mode, a weight outside 0 to 1, or a flag that is none.
        """
        super().validate(config)
        check_choice("mode", self.mode, MODES)
        check_number("alpha", self.alpha, 0, 1)
        check_number("beta", self.beta, 0, 1)
        check_flag("count_bias", self.count_bias)

    def score(self, view: RowView) -> Tensor:
        """Accumulated attention mass, summed over the query heads of a group."""
        return view.statistics["mass"]

    def carry_out(self, view: RowView, chosen: Tensor) -> CompactionPlan:
        """Merges the leaving rows that pass the threshold into the rows that stay, and drops the others."""
        keep = ~chosen & view.valid
        index, present = leaving_rows(chosen)
        similarity, target = nearest_row(view.keys, index, keep & (view.positions >= self.sink_size))
        present &= similarity > -torch.inf
        similarity = torch.where(present, similarity, 0)
        fold = self.fold(view, index, target, similarity, present & self._passes(view, similarity, present))
        view.keys, view.values = fold.apply(view.keys), fold.apply(view.values)
        if self.count_bias:
            view.cardinality = fold.cardinality(view.cardinality)
        return keep_rows(keep)

    def fold(self, view: RowView, index: Tensor, target: Tensor, similarity: Tensor, merged: Tensor) -> Fold:
        """Weights of the rows that merge.

        Args:
            view: the rows.
            index: ``[B, H_kv, E]`` leaving rows, as ``target``, ``similarity`` and ``merged`` (bool).
        """
        n = view.cardinality.to(similarity.dtype)
        own = n.gather(2, index)
        if self.mode == "paper":
            return Fold(index, target, merged, own * similarity.exp(), n * math.e)
        fold = Fold(index, target, merged, own * similarity, n)
        fold.total = n + fold.joined(own)
        return fold

    def _passes(self, view: RowView, similarity: Tensor, present: Tensor) -> Tensor:
        """``[B, 1, E]`` bool: the head-averaged similarity reaches the threshold, which is moved first."""
        count = present.sum(1)
        total = similarity.sum(1)
        left = count.sum(1)
        mean = total.sum(1) / left.clamp(min=1)
        old = view.memory.get("threshold", torch.full_like(mean, torch.nan))
        moved = torch.where(old.isnan(), mean, self.alpha * old + self.beta * mean)
        threshold = torch.where(left > 0, moved, old)
        view.memory["threshold"] = threshold
        return (total / count.clamp(min=1) >= threshold[:, None] - ROUNDING)[:, None]
