"""Controls of the merging methods: a leaving row joins the kept row with the most similar key."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from asymkv.checks import check_choice, check_flag, check_number
from asymkv.methods.base import Method
from asymkv.methods.merging import (
    TINY,
    Fold,
    leaving_rows,
    nearest_row,
    wide,
)
from asymkv.plan import CompactionPlan, keep_rows
from asymkv.view import RowView, lowest

if TYPE_CHECKING:
    from asymkv.config import CompressionConfig

SELECTIONS = ("attention", "knorm")
MODES = ("value", "pivot", "weighted")


@dataclasses.dataclass(frozen=True)
class ValueMerge(Method):
    """A leaving row is folded into the kept row of the most similar key (cosine): its value alone, or the key too.

    With s the similarity, a kept row c and the rows e that join it become, by ``mode``:

    - "value": ``v_c = (v_c + sum w v_e) / (1 + sum w)``, ``w = max(s, 0) |v_e| / (|v_e| + |v_c|)``, keys unchanged
      (kvpress' MergingPress).
    - "pivot": the mean of ``x_c`` and all ``(x_e + x_c) / 2``, for keys and values (LOOK-M, arXiv 2406.18139).
    - "weighted": ``(x_c + sum w x_e) / (1 + sum w)``, ``w = (s + 1) / 2``, for keys and values (LOOK-M).

    Sinks are never merged into; keys merge as they are stored (after RoPE).

    Args:
        mode: see above.
        select: which rows leave: those of the lowest accumulated "attention", or of the longest keys ("knorm",
            arXiv 2406.11430).
        threshold: rows less similar than that are dropped; None = 0 for "value", and none is dropped for the others.
        merge_fraction: the share of a head's leaving rows, the most similar first, that merge; the rest is dropped.
        count_bias: the kept row stands for the tokens that joined it too (log n in attention), and rows weigh by
            their tokens; False is the published form.
    """

    title: ClassVar[str] = "MergingPress of kvpress, and LOOK-M's merges (arXiv 2406.18139), as controls"

    mode: str = "value"
    select: str = "attention"
    threshold: float | None = None
    merge_fraction: float = 1.0
    count_bias: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"attention"} if self.select == "attention" else ())

    def validate(self, config: CompressionConfig) -> None:
        """Checks the choices.

        Raises:
            ValueError: for an unknown choice or a number out of range.
        """
        super().validate(config)
        check_choice("mode", self.mode, MODES)
        check_choice("select", self.select, SELECTIONS)
        check_number("merge_fraction", self.merge_fraction, 0, 1)
        check_flag("count_bias", self.count_bias)
        if self.threshold is not None:
            check_number("threshold", self.threshold, -1, 1)

    def score(self, view: RowView) -> Tensor:
        """Accumulated attention mass of the group, or the negative length of the key."""
        return view.statistics["mass"] if self.select == "attention" else -wide(view.keys).norm(dim=-1)

    def carry_out(self, view: RowView, chosen: Tensor) -> CompactionPlan:
        """Merges the leaving rows that are similar enough, and drops the others."""
        keep = ~chosen & view.valid
        index, present = leaving_rows(chosen)
        similarity, target = nearest_row(view.keys, index, keep & (view.positions >= self.sink_size))
        merged = present & (similarity > -torch.inf) & self._most_similar(similarity, present)
        least = 0.0 if self.mode == "value" and self.threshold is None else self.threshold
        if least is not None:
            merged &= similarity >= least
        fold = self.fold(view, index, target, similarity.clamp(-1, 1), merged)
        if self.mode != "value":
            view.keys = fold.apply(view.keys)
        view.values = fold.apply(view.values)
        if self.count_bias:
            view.cardinality = fold.cardinality(view.cardinality)
        return keep_rows(keep)

    def _most_similar(self, similarity: Tensor, present: Tensor) -> Tensor:
        """``[B, H_kv, E]`` bool: the ``merge_fraction`` of each head's leaving rows with the highest similarity."""
        # The product's own rounding must not make one row more of a whole number.
        count = (present.sum(-1).double() * self.merge_fraction - 1e-9).ceil().long()
        return lowest(-similarity, count, present)

    def fold(self, view: RowView, index: Tensor, target: Tensor, similarity: Tensor, merged: Tensor) -> Fold:
        """Weights of the rows that merge.

        Args:
            view: the rows.
            index: ``[B, H_kv, E]`` leaving rows, as ``target``, ``similarity`` and ``merged`` (bool).
        """
        n = view.cardinality.to(similarity.dtype)
        own = n.gather(2, index)
        if self.mode == "pivot":
            half = Fold(index, target, merged, own / 2, n)
            half.base = n + half.joined(own / 2)
            return half
        if self.mode == "weighted":
            return Fold(index, target, merged, own * (similarity + 1) / 2, n)
        length = wide(view.values).norm(dim=-1)
        leaving, kept = length.gather(2, index), length.gather(2, target)
        return Fold(index, target, merged, own * similarity.clamp(min=0) * leaving / (leaving + kept + TINY), n)
