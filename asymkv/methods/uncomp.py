"""UNComp (arXiv 2410.03090): rows by the attention of the last queries, heads by the entropy of their queries."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from asymkv.methods.headkv import check_window, window_scores
from asymkv.methods.scored import HeadScored
from asymkv.methods.snapkv import require_longer_prompt
from asymkv.view import RowView

if TYPE_CHECKING:
    from asymkv.config import CompressionConfig


@dataclasses.dataclass(frozen=True)
class UNComp(HeadScored):
    """Keeps what the last queries of the prompt attend to; heads whose queries have a high matrix entropy keep more.

    The paper's stages of hidden states are not part of it: layers see every token.

    Args:
        head_scores: matrix entropies of the heads: file, folder or table ``[L][H_kv]``; None = what
            ``scripts/find_retrieval_heads.py --kind entropy`` left for this model.
        groups: groups of heads of a layer; of two, the upper gets 4/3 of the mean and the lower 2/3.
        kernel_size: rows that a score is pooled over, odd.
        pooling: "max" or "avg".
    """

    title: ClassVar[str] = "UNComp, arXiv 2410.03090"
    chunk_size: ClassVar[int | None] = None

    groups: int = 2
    kernel_size: int = 7
    pooling: str = "max"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"queries", "whole_prompt"})

    def defaults(self) -> dict[str, Any]:
        """A window of 8 queries; rows of the heads by the entropy of their queries."""
        return {"window_size": 8, "head_budgets": {"kind": "entropy", "file": self.head_scores, "groups": self.groups}}

    def validate(self, config: CompressionConfig) -> None:
        """Checks window and pooling; the split over heads has checked its own."""
        super().validate(config)
        check_window(config, self.kernel_size, self.pooling)

    def check_prompt(self, tokens: int, config: CompressionConfig) -> None:
        """A share of a prompt that is all window cannot be kept."""
        require_longer_prompt(tokens, config)

    def score(self, view: RowView) -> Tensor:
        """Attention of the window's queries, ``[B, H_kv, T]``."""
        return window_scores(view, self.window_size, self.kernel_size, self.pooling)
