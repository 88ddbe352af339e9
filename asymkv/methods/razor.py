"""RazorAttention (arXiv 2407.15891): retrieval heads whole, one compensation row for what the other heads drop."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from asymkv.methods.scored import HeadScored
from asymkv.plan import CompactionPlan, keep_rows
from asymkv.view import RowView

if TYPE_CHECKING:
    from asymkv.config import CompressionConfig


@dataclasses.dataclass(frozen=True)
class Razor(HeadScored):
    """Retrieval heads keep everything; other heads sinks, the newest rows, and the mean of all they dropped as one row.

    The compensation row is the mean key and value of the dropped tokens and counts as that many in attention; later
    drops go into it as a running mean. By default the rows obey the budget: as many heads as fit are kept whole.

    Args:
        head_scores: induction and echo scores: file, folder, table ``[L][H_kv]`` or mapping of those; None = what
            ``scripts/find_retrieval_heads.py`` left for this model.
        retrieval_share: share of the heads that are kept whole at most (the paper's: 0.15, the best 14 % by induction
            and the best 1 % by echo score); None = as many as fit into the budget.
        least_recent: the paper's S0; the other heads then keep sinks and ``max(S0, N / C)`` of N tokens and the
            budget is not asked. Needs ``retrieval_share``.
        recent_divisor: the paper's C.
        count_bias: the compensation row counts as the tokens it stands for (the paper's log N_d); False: as one.
        mean_after_rope: average keys as they are stored (the paper's); False: in pre-RoPE coordinates, turned to the
            position of the newest dropped token.
    """

    title: ClassVar[str] = "RazorAttention, arXiv 2407.15891"

    retrieval_share: float | None = None
    least_recent: int | None = None
    recent_divisor: float | None = None
    count_bias: bool = True
    mean_after_rope: bool = True

    def defaults(self) -> dict[str, Any]:
        """Rows of the heads by their retrieval scores."""
        split = {"kind": "retrieval", "file": self.head_scores, "share": self.retrieval_share, "extra": 1, "echo": True}
        return {"head_budgets": {**split, "recent": self.least_recent, "divisor": self.recent_divisor}}

    def validate(self, config: CompressionConfig) -> None:
        """Checks the choices; the split over heads has checked its own."""
        super().validate(config)
        for name in ("count_bias", "mean_after_rope"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False; found {getattr(self, name)!r}")

    def judge(self, view: RowView) -> tuple[Tensor, Tensor]:
        """The oldest rows go first; the newest row outside the window stays, so that the others may join it."""
        free = ~view.protected(self.sink_size, self.window_size)
        return view.positions.float(), free & (free.flip(-1).cumsum(-1).flip(-1) > 1)

    def carry_out(self, view: RowView, chosen: Tensor) -> CompactionPlan:
        """The chosen rows and the row behind them become one, at the position of that last row."""
        last = torch.nn.functional.pad(chosen[..., :-1], (1, 0)) & ~chosen
        members = chosen | last
        tokens = torch.where(members, tokens_of_rows(view), 0)
        keys = view.keys if self.mean_after_rope else view.unrotate(view.keys)
        key, value = _mean(keys, tokens), _mean(view.values, tokens)
        if not self.mean_after_rope:
            key = view.rope.rotate(key.expand(keys.shape), view.rotary_positions)
        # The view's tensors may be the storage itself: torch.where makes new ones.
        view.keys = torch.where(last[..., None], key.to(view.keys.dtype), view.keys)
        view.values = torch.where(last[..., None], value.to(view.values.dtype), view.values)
        total = tokens.sum(-1, keepdim=True).to(view.cardinality.dtype)
        if self.count_bias:
            view.cardinality = torch.where(last, total, view.cardinality)
        return keep_rows(view.valid & ~chosen)


def tokens_of_rows(view: RowView) -> Tensor:
    """``[B, H_kv, T]`` int64: tokens that each row stands for, whatever it counts as.

    Nothing is dropped but into the row behind it, so a row stands for all tokens since its predecessor.
    """
    positions = view.positions.long()
    return positions - torch.nn.functional.pad(positions[..., :-1], (1, 0), value=-1)


def _mean(rows: Tensor, tokens: Tensor) -> Tensor:
    """``[B, H_kv, 1, D]``: mean of ``rows [B, H_kv, T, D]`` weighted by ``tokens [B, H_kv, T]``, at least in fp32."""
    weight = tokens.to(torch.promote_types(rows.dtype, torch.float32))[..., None, :]
    return weight @ rows.to(weight.dtype) / weight.sum(-1, keepdim=True).clamp(min=1)
