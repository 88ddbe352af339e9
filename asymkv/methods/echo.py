"""Echo: reconstruction chunk by chunk, so that what KVzip does to a whole prompt is done in bounded memory."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from asymkv.checks import check_choice
from asymkv.methods.asymkv import chain_weights, convex_weights
from asymkv.methods.kvzip import KVzip
from asymkv.methods.merging import MERGED_KEYS, MERGED_POSITIONS, merge_in_place, shared
from asymkv.observations import statistic_dtype
from asymkv.plan import CompactionPlan, contract_pairs, keep_rows
from asymkv.reconstruction import Wording
from asymkv.replay_scores import (
    CURRENCIES,
    CURVATURE,
    MERGED_WEIGHTS,
    PAIR,
    SCORE,
    SHARE,
    Displacement,
    Scorer,
)
from asymkv.view import RowView

if TYPE_CHECKING:
    from asymkv.config import CompressionConfig

ACTIONS = ("drop", "merge", "both")
OVER = ("stored", "range")


@dataclasses.dataclass(frozen=True)
class Echo(KVzip):
    """Repeats every prefill chunk once, against what is left of the past and the chunk, and judges its rows by that.

    Rows that are stored never exceed budget and chunk on the average of the heads, and reading costs one more forward
    per chunk. A row is judged once, by the replay of its own chunk; its score stays with it. Generated tokens are never
    judged: they stay, on top of a ratio of the prompt, or in up to half of a budget in rows or bytes (then the oldest
    of them go). What to do with the cheapest rows is decided in one currency
    (:class:`asymkv.replay_scores.Displacement`). Takes KVzip's arguments, and:

    Args:
        over: what a probability is a share of: "stored" (everything that is stored and the replay) or "range" (KVzip's:
            first rows, chunk and replay).
        currency: "attention" or "output_error", what dropping or merging displaces for the query it displaces most for.
        action: "drop" rows, "merge" each into the next row of its head, or "both", whichever costs less.
        merged_keys: where rows merge, average keys "pre_rope", turned to the merged row's position, or as they are
            stored ("post_rope").
        merged_position: a merged row's position, of its "last" member or the "mean" by cardinality.
        merged_weights: what a merge weighs keys by: "cardinality"; "output_error", per pair the share that displaces
            least of the attention's output; per dimension before RoPE, "output" (the Gauss-Newton diagonal of that
            output) or "loss" (the squared gradient of the replay's LM loss: AsymKV's Fisher diagonal, one backward per
            replay). Values always merge by cardinality.
    """

    title: ClassVar[str] = "Echo: chunk by chunk reconstruction, ours"
    chunk_size: ClassVar[int | None] = 1024

    over: str = "stored"
    currency: str = "attention"
    action: str = "drop"
    merged_keys: str = "pre_rope"
    merged_position: str = "last"
    merged_weights: str = "cardinality"

    @property
    def needs(self) -> frozenset[str]:
        needs = super().needs - {"whole_prompt"}
        if self.merged_weights == "loss":
            needs |= {"replay_loss"}
        by_output = self.currency == "output_error" or self.merged_weights in ("output_error", "output")
        return needs | {"output_weight"} if by_output else needs

    def defaults(self) -> dict[str, Any]:
        """KVzip's, but a window stays and no head is emptied: what is left of a chunk is what reads the next."""
        own = {name: value for name, value in super().defaults().items() if name != "window_size"}
        return {**own, "layer_budgets": {"kind": "global", "floor": 0.1}} if self.level == "pair" else own

    def validate(self, config: CompressionConfig) -> None:
        """Checks the choices.

        Raises:
            ValueError: for an unknown choice, or choices that do not go together.
        """
        super().validate(config)
        choices = {"over": OVER, "currency": CURRENCIES, "action": ACTIONS, "merged_keys": MERGED_KEYS,
                   "merged_position": MERGED_POSITIONS, "merged_weights": MERGED_WEIGHTS}  # fmt: skip
        for name, allowed in choices.items():
            check_choice(name, getattr(self, name), allowed)
        if self.over == "range" and (self.currency, self.action) != ("attention", "drop"):
            raise ValueError("over='range' is KVzip's score, which only drops rows by attention; found "
                             f"currency={self.currency!r}, action={self.action!r}")
        if self.over == "stored" and self.plus:
            raise ValueError("plus=True is a form of KVzip's score; it needs over='range', found over='stored'")
        if self.level == "head" and self.action != "drop":
            raise ValueError(f"level='head' drops rows; action must be 'drop', found {self.action!r}")
        if self.gate_share and (self.currency, self.action) != ("attention", "drop"):
            raise ValueError("gate_share: a gate knows KVzip's score, by which rows are dropped by attention; found "
                             f"currency={self.currency!r}, action={self.action!r}")
        self._check_merges(config)

    def _check_merges(self, config: CompressionConfig) -> None:
        """Raises ValueError for ways to merge that go with nothing, or not together."""
        merges = f"merged_keys={self.merged_keys!r}, merged_position={self.merged_position!r}, " \
                 f"merged_weights={self.merged_weights!r}"  # fmt: skip
        if self.action == "drop" and (self._edits or self.merged_weights != "cardinality"):
            raise ValueError("merged_keys, merged_position and merged_weights say how rows merge, and action='drop' "
                             f"merges none; found {merges}")
        if (self._edits or self._by_dimension) and config.positions != "original":
            raise ValueError("merged_keys='post_rope', merged_position='mean' and merged_weights of dimensions need "
                             f"position_policy='original'; found {config.positions!r}")
        if self._by_dimension and self.merged_keys == "post_rope":
            raise ValueError("merged_weights='output' and 'loss' weigh dimensions as they are before RoPE; merged_keys "
                             f"must be 'pre_rope'; found {merges}")
        if self._by_dimension and config.dimensions is not None:
            raise ValueError("merged_weights='output' and 'loss' weigh the model's own dimensions of a key; dimensions "
                             f"must be None, found {config.dimensions!r}")

    @property
    def _edits(self) -> bool:
        return self.merged_keys == "post_rope" or self.merged_position == "mean"

    @property
    def _by_dimension(self) -> bool:
        return self.merged_weights in ("output", "loss")

    def row_bytes(self, head_dim: int, dtype: torch.dtype, config: CompressionConfig) -> int:
        """The score, that of the pair, and what a merge weighs the key by."""
        weight = head_dim * statistic_dtype(dtype).itemsize if self._by_dimension else 4
        return 4 if self.action == "drop" else 8 + weight * (self.merged_weights != "cardinality")

    def scorer(self, wording: Wording) -> Scorer:
        """What judges rows in a replay."""
        if self.over == "range":
            return super().scorer(wording)
        return Displacement(self.currency, self.action != "drop", self.merged_weights)

    def judge(self, view: RowView) -> tuple[Tensor, Tensor]:
        """Cost of the cheaper action on each row; a merge needs a next row that may be touched."""
        drop, free = super().judge(view)
        if self.action == "drop":
            return drop, free
        follows = free & torch.nn.functional.pad(free[..., 1:], (0, 1))
        # A pair that was never judged, or whose neighbours changed, costs no more than to lose both.
        merge = _pairs(view).minimum(drop + torch.nn.functional.pad(drop[..., 1:], (0, 1)))
        if self.action == "merge":
            view.evidence["joins"] = follows
            return merge, follows
        merge = torch.where(follows, merge, torch.inf)
        view.evidence["joins"] = merge < drop
        return merge.minimum(drop), free

    def carry_out(self, view: RowView, chosen: Tensor) -> CompactionPlan:
        """Merges runs of chosen pairs and drops the other chosen rows; a run whose last row is dropped goes with it."""
        if self.action == "drop":
            return super().carry_out(view, chosen)
        joins = chosen & view.evidence["joins"]
        target = contract_pairs(joins[..., :-1])
        gone = (chosen & ~joins).gather(-1, target) | ~view.valid
        alone = ~gone & ~shared(target)
        intact = alone & torch.nn.functional.pad(alone[..., 1:], (0, 1))
        view.statistics[PAIR] = torch.where(intact, _pairs(view), torch.inf)
        weight = self._weights(view, joins[..., :-1], target)
        if SHARE in view.statistics:
            view.statistics[SHARE] = torch.where(intact, view.statistics[SHARE], 0)
        if not self._edits:
            return CompactionPlan(torch.where(gone, -1, target), weight)
        merge_in_place(view, target, weight, keys=self.merged_keys, position=self.merged_position)
        index = torch.arange(target.shape[-1], device=target.device)
        return keep_rows((target == index) & ~gone)

    def _weights(self, view: RowView, joins: Tensor, target: Tensor) -> Tensor | None:
        """What keys are weighed by in their runs, ``[B, H_kv, T]`` or ``[B, H_kv, T, D]``; None = cardinality."""
        if self._by_dimension and CURVATURE in view.statistics:
            return convex_weights(view.statistics[CURVATURE], view.cardinality, target)
        if self.merged_weights == "output_error" and SHARE in view.statistics:
            n, share = view.cardinality.double(), view.statistics[SHARE][..., :-1].double()
            even = n[..., :-1] / (n[..., :-1] + n[..., 1:]).clamp(min=1)
            return chain_weights(torch.where(share > 0, share, even), joins, target)
        return None


def _pairs(view: RowView) -> Tensor:
    """Costs of merging rows with their next ones; infinite where nothing was repeated yet (a prompt, all prefix)."""
    if PAIR not in view.statistics:
        return torch.full(view.valid.shape, torch.inf, device=view.valid.device)
    return torch.where(view.statistics[SCORE] > 0, view.statistics[PAIR], torch.inf)
