"""HeadKV (arXiv 2410.19258): rows by the attention of the last queries, heads by their retrieval scores."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from asymkv.methods.scored import HeadScored
from asymkv.methods.snapkv import SnapKV


@dataclasses.dataclass(frozen=True)
class HeadKV(HeadScored, SnapKV):
    """SnapKV's scores; retrieval heads keep more rows (``head_budgets="headkv"``). Takes SnapKV's arguments.

    Args:
        head_scores: scores of retrieval heads: file, folder or table ``[L][H_kv]``, all >= 0; None = the induction
            scores that ``scripts/find_retrieval_heads.py`` left for this model.
        beta: one beta-th of the rows beside sinks and window is shared over all layers' heads by score.
    """

    title: ClassVar[str] = "HeadKV, arXiv 2410.19258"

    kernel_size: int = 7
    pooling: str = "max"
    group_first: bool = True
    beta: float = 1.2

    def defaults(self) -> dict[str, Any]:
        """A window of 8 queries; rows of the heads by their retrieval scores."""
        return {"window_size": 8, "head_budgets": {"kind": "headkv", "file": self.head_scores, "beta": self.beta}}
