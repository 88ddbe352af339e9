"""UNComp (arXiv 2410.03090): rows by the attention of the last queries, heads by the entropy of their queries."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from asymkv.methods.scored import HeadScored
from asymkv.methods.snapkv import SnapKV


@dataclasses.dataclass(frozen=True)
class UNComp(HeadScored, SnapKV):
    """SnapKV's scores; heads whose queries have a high matrix entropy keep more. Takes SnapKV's arguments.

    The paper's stages of hidden states are not part of it: layers see every token.

    Args:
        head_scores: matrix entropies of the heads: file, folder or table ``[L][H_kv]``; None = what
            ``scripts/find_retrieval_heads.py --kind entropy`` left for this model.
        groups: groups of heads of a layer; of two, the upper gets 4/3 of the mean and the lower 2/3.
    """

    title: ClassVar[str] = "UNComp, arXiv 2410.03090"

    kernel_size: int = 7
    pooling: str = "max"
    group_first: bool = True
    groups: int = 2

    def defaults(self) -> dict[str, Any]:
        """A window of 8 queries; rows of the heads by the entropy of their queries."""
        return {"window_size": 8, "head_budgets": {"kind": "entropy", "file": self.head_scores, "groups": self.groups}}
