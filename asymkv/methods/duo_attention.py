"""DuoAttention (arXiv 2410.10819): retrieval heads whole, streaming heads with sinks and the newest rows."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor

from asymkv.checks import check_number
from asymkv.methods.scored import HeadScored
from asymkv.view import RowView


@dataclasses.dataclass(frozen=True)
class DuoAttention(HeadScored):
    """Retrieval heads keep everything, streaming heads sinks and the newest rows; positions stay.

    By default the rows obey the budget: as many heads as fit are kept whole, the rest is the others' recent window.

    Args:
        head_scores: DuoAttention's pattern folder (``full_attention_heads.tsv`` and ``config.json``), or any scores of
            retrieval heads: file, folder or table ``[L][H_kv]``; None = the induction scores that
            ``scripts/find_retrieval_heads.py`` left for this model.
        sparsity: share of heads that stream, those below this quantile of the scores (the paper's: 0.5); None = as few
            as the budget allows.
        recent_size: rows that a streaming head keeps beside the sinks (the paper's: 256, with 64 sinks); the budget
            is then not asked. Needs ``sparsity``. None = what the budget leaves.
    """

    title: ClassVar[str] = "DuoAttention, arXiv 2410.10819"

    sparsity: float | None = None
    recent_size: int | None = None

    def defaults(self) -> dict[str, Any]:
        """Rows of the heads by their retrieval scores."""
        if self.sparsity is not None:
            check_number("sparsity", self.sparsity, 0, 1)
        share = None if self.sparsity is None else 1 - self.sparsity
        split = {"kind": "retrieval", "file": self.head_scores, "share": share, "recent": self.recent_size}
        return {"head_budgets": split}

    def score(self, view: RowView) -> Tensor:
        """The position: oldest first."""
        return view.positions.float()
