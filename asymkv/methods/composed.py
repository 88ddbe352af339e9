"""Methods that take another method's scores: ChunkKV (arXiv 2502.00299) and CriticalKV (arXiv 2502.03805)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from asymkv.budgets.heads import HeadBudgets, Judged
from asymkv.checks import check_flag, check_integer, check_number
from asymkv.methods.base import Method
from asymkv.methods.expected_attention import ExpectedAttention, require_original_positions
from asymkv.methods.h2o import H2O
from asymkv.methods.keys import KeyDiff, Knorm
from asymkv.methods.snapkv import SnapKV
from asymkv.methods.tova import TOVA
from asymkv.plan import CompactionPlan, keep_rows
from asymkv.view import RowView, lowest

if TYPE_CHECKING:
    from asymkv.config import CompressionConfig

SCORERS: dict[str, type[Method]] = {
    "expected_attention": ExpectedAttention, "h2o": H2O, "keydiff": KeyDiff, "knorm": Knorm, "snapkv": SnapKV,
    "tova": TOVA,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Composed(SnapKV):
    """Base of methods on top of a scorer.

    Args:
        scorer: whose scores are used: a name, or a mapping with ``kind`` and that method's own settings; "snapkv"
            takes this method's own.
    """

    scorer: str | Mapping[str, Any] = "snapkv"

    def _scorer(self) -> Method:
        settings = {"kind": self.scorer} if isinstance(self.scorer, str) else dict(self.scorer)
        kind = settings.pop("kind", None)
        if kind not in SCORERS:
            raise ValueError(f"unknown scorer {kind!r}; allowed: {sorted(SCORERS)}")
        if kind == "snapkv":
            settings = {**{f.name: getattr(self, f.name) for f in dataclasses.fields(SnapKV) if f.init}, **settings}
        known = {f.name for f in dataclasses.fields(SCORERS[kind]) if f.init}
        if set(settings) - known:
            raise ValueError(f"unknown settings {sorted(set(settings) - known)} of scorer {kind!r}; "
                             f"allowed: {sorted(known)}")
        inner = SCORERS[kind](**settings)
        for name in ("sink_size", "window_size"):
            object.__setattr__(inner, name, getattr(self, name))
        return inner

    def validate(self, config: CompressionConfig) -> None:
        """Checks the scorer.

        Raises:
            ValueError: for an unknown scorer, or settings that it does not have.
        """
        super().validate(config)
        if isinstance(self._scorer(), ExpectedAttention):
            require_original_positions(config)

    @property
    def needs(self) -> frozenset[str]:
        return self._scorer().needs | {"whole_prompt"}

    def row_bytes(self, head_dim: int, dtype: torch.dtype, config: CompressionConfig) -> int:
        return self._scorer().row_bytes(head_dim, dtype, config)

    def row_scores(self, view: RowView) -> Tensor:
        """The scorer's ``[B, H_kv, T]``."""
        return self._scorer().score(view)


@dataclasses.dataclass(frozen=True)
class ChunkKV(Composed):
    """Keeps whole chunks of neighbouring rows, the same for all heads of a layer, by their mean score.

    The chunk that does not fit the budget is kept in part, its newest rows.

    Args:
        chunk_length: rows of a chunk.
        whole_chunks: keep ``max(1, floor(ratio * chunks))`` whole chunks instead, so that the budget is met only
            nearly (as kvpress does); a prompt shorter than a chunk keeps the best rows of each head.
    """

    title: ClassVar[str] = "ChunkKV, arXiv 2502.00299"

    chunk_length: int = 20
    whole_chunks: bool = False

    def validate(self, config: CompressionConfig) -> None:
        """Checks the chunk.

        Raises:
            ValueError: for a chunk without rows, or heads that would hold different rows.
        """
        super().validate(config)
        if config.layer_split.joint or type(config.head_split) is not HeadBudgets:
            raise ValueError("method 'chunkkv' keeps the same chunks in all heads of a layer; head_budgets must be "
                             "'uniform' and layer_budgets not 'global'")
        check_integer("chunk_length", self.chunk_length, 1)
        check_flag("whole_chunks", self.whole_chunks)

    @property
    def splits_budget(self) -> bool:  # type: ignore[override]
        return not self.whole_chunks

    def score(self, view: RowView) -> Tensor:
        """Mean over its chunk of a row's scores, summed over heads, ``[B, H_kv, T]``."""
        scores = self._with_window(view).sum(1)
        chunk = torch.arange(scores.shape[1], device=scores.device) // self.chunk_length
        chunk = chunk.expand_as(scores)
        size = torch.zeros_like(scores).scatter_add_(1, chunk, view.valid[:, 0].to(scores.dtype))
        total = torch.zeros_like(scores).scatter_add_(1, chunk, scores)
        return (total / size.clamp(min=1)).gather(1, chunk)[:, None].expand_as(view.valid)

    def _with_window(self, view: RowView) -> Tensor:
        """The rows' own scores ``[B, H_kv, T]``, the window's above all others; 0 where there is no row."""
        scores = self.row_scores(view).masked_fill(~view.valid, 0)
        # Absent rows are 0, which is more than any score may be: they must not lift the window's.
        top = scores.masked_fill(~view.valid, -torch.inf).amax((1, 2), keepdim=True) + 1
        recent = view.positions >= (view.tokens - self.window_size)[:, None, None]
        return torch.where(recent & view.valid, top, scores)

    def plan(self, view: RowView, heads: HeadBudgets | None = None) -> CompactionPlan:
        """The best chunks; of fewer rows than a chunk has, each head's best, as kvpress does."""
        if not self.whole_chunks:
            return super().plan(view, heads)
        length = view.lengths.amax(1)
        chunks = -(-length // self.chunk_length)
        share = [_kept_share(r, int(b), int(n)) for r, b, n in zip(
            view.requests or [None] * len(length), view.budget.amax(1), length, strict=True)]  # fmt: skip
        kept = torch.tensor([max(1, int(int(n) * s)) for n, s in zip(chunks, share, strict=True)], device=length.device)
        leader = torch.arange(view.valid.shape[-1], device=length.device) % self.chunk_length == 0
        leaders = leader & view.valid
        gone = lowest(self.score(view), (chunks - kept)[:, None].expand_as(view.lengths), leaders)
        first = torch.arange(leader.shape[0], device=length.device) // self.chunk_length * self.chunk_length
        short = length < self.chunk_length
        rows = torch.tensor([max(1, int(int(n) * s)) for n, s in zip(length, share, strict=True)], device=length.device)
        alone = lowest(self._with_window(view), (length - rows)[:, None].expand_as(view.lengths), view.valid)
        return keep_rows(~torch.where(short[:, None, None], alone, gone[..., first]) & view.valid)


def _kept_share(request: Any, budget: int, length: int) -> float:
    """The share of a row's chunks to keep.

    The ratio where one was asked for, in the floating point of kvpress, as long as the rows are the prompt: what an
    earlier compaction left has been through it, and is brought to the budget.
    """
    if budget >= length:
        return 1.0
    if request is not None and request.ratio is not None and request.tokens == length:
        return 1 - (1 - request.ratio)
    return min(budget / max(length, 1), 1.0)


@dataclasses.dataclass(frozen=True)
class CriticalKV(Composed):
    """Two stages: the best rows by score are safe, the others are weighed by what their value writes.

    Args:
        epsilon: added to a score before it is multiplied by the L1 norm of the value through the output projection.
        first_stage: share of the budget that the score alone decides.
    """

    title: ClassVar[str] = "CriticalKV, arXiv 2502.03805"

    epsilon: float = 1e-4
    first_stage: float = 0.5

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"output_weight"}

    def validate(self, config: CompressionConfig) -> None:
        """Checks the numbers.

        Raises:
            ValueError: for values out of range.
        """
        super().validate(config)
        check_number("epsilon", self.epsilon, 0)
        check_number("first_stage", self.first_stage, 0, 1)

    def judge(self, view: RowView) -> tuple[Tensor, Tensor]:
        """Scores times output norms; rows of the first stage are not free."""
        scores, free = self.row_scores(view), ~view.protected(self.sink_size, self.window_size)
        safe = Judged(scores, free, view.lengths, view.budget, view.layer).safe(self.first_stage)
        return (scores + self.epsilon) * output_norm(view, 1), free & ~safe


def output_norm(view: RowView, order: int) -> Tensor:
    """Norm of what each value writes into the residual stream, the mean over the query heads of its group.

    Args:
        view: with ``output_weight [hidden, H * D]``.
        order: 1 or 2, the norm.

    Returns:
        ``[B, H_kv, T]``.

    Raises:
        ValueError: if the output projection has no floating-point weight (quantised).
    """
    weight = view.output_weight
    if weight is None or not weight.is_floating_point():
        raise ValueError("value norms need the output projection's weight in floating point; found "
                         f"{None if weight is None else weight.dtype}")
    batch, kv_heads, rows, dim = view.values.shape
    dtype = torch.promote_types(view.values.dtype, torch.float32)
    weight = weight.detach().to(view.values.device, dtype)
    group = weight.shape[1] // (dim * kv_heads)
    per_head = weight.view(weight.shape[0], kv_heads, group, dim)
    values = view.values.to(dtype)
    total = values.new_zeros(batch, kv_heads, rows)
    # One query head at a time: [B, T, hidden] is all that exists of the projected values.
    for head in range(kv_heads):
        for member in range(group):
            written = values[:, head] @ per_head[:, head, member].T
            total[:, head] += torch.linalg.vector_norm(written, ord=order, dim=-1)
    return total / group
