"""HeadKV (arXiv 2410.19258): rows by the attention of the last queries, heads by their retrieval scores."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from asymkv.methods.scored import HeadScored
from asymkv.methods.snapkv import require_longer_prompt
from asymkv.observations import attention_mass
from asymkv.view import RowView

if TYPE_CHECKING:
    from asymkv.config import CompressionConfig

POOLINGS = ("max", "avg")


@dataclasses.dataclass(frozen=True)
class HeadKV(HeadScored):
    """Keeps what the last queries of the prompt attend to, pooled over neighbours; retrieval heads keep more rows.

    Args:
        head_scores: scores of retrieval heads: file, folder or table ``[L][H_kv]``, all >= 0; None = the induction
            scores that ``scripts/find_retrieval_heads.py`` left for this model.
        beta: one beta-th of the rows beside sinks and window is shared over all layers' heads by score.
        kernel_size: rows that a score is pooled over, odd.
        pooling: "max" or "avg".
    """

    title: ClassVar[str] = "HeadKV, arXiv 2410.19258"
    chunk_size: ClassVar[int | None] = None

    beta: float = 1.2
    kernel_size: int = 7
    pooling: str = "max"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"queries", "whole_prompt"})

    def defaults(self) -> dict[str, Any]:
        """A window of 8 queries; rows of the heads by their retrieval scores."""
        return {"window_size": 8, "head_budgets": {"kind": "headkv", "file": self.head_scores, "beta": self.beta}}

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


def check_window(config: CompressionConfig, kernel_size: int, pooling: str) -> None:
    """Raises ValueError for a window without a query, an even kernel or an unknown pooling."""
    if config.window_size < 1:
        raise ValueError(f"method {config.method!r} judges by the window's queries; window_size must be >= 1, found "
                         f"{config.window_size}")
    if not isinstance(kernel_size, int) or isinstance(kernel_size, bool) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be an odd integer >= 1; found {kernel_size!r}")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r}; allowed: {list(POOLINGS)}")


def window_scores(view: RowView, window_size: int, kernel_size: int, pooling: str) -> Tensor:
    """SnapKV's scores (arXiv 2404.14469): attention of the last queries on earlier rows, pooled over neighbours.

    The heads of a group are averaged before the pooling. Rows of the window count as nothing.

    Args:
        view: rows with queries; the last ``window_size`` of each row of the batch are used.

    Returns:
        ``[B, H_kv, T]``.
    """
    mass = attention_mass(_last_queries(view, window_size))
    earlier = view.valid & (view.positions < (view.tokens - window_size)[:, None, None])
    mass = torch.where(earlier, mass, 0)
    pool = F.max_pool1d if pooling == "max" else F.avg_pool1d
    return pool(mass, kernel_size, stride=1, padding=kernel_size // 2)


def _last_queries(view: RowView, count: int) -> RowView:
    """The view with each row's own last ``count`` queries by position, absent ones where there are fewer."""
    queries, positions = view.queries, view.query_positions
    if queries is None or positions is None or queries.shape[2] <= count:
        return view
    at, index = positions.topk(count, dim=1)
    wide = index[:, None].expand(-1, queries.shape[1], -1)
    return dataclasses.replace(
        view,
        queries=queries.take_along_dim(wide[..., None], 2),
        query_positions=at,
        query_lse=None if view.query_lse is None else view.query_lse.gather(2, wide),
        query_out=None,
    )
