"""Controls of AsymKV: the same pairs, but dropped, or with values merged like keys."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from asymkv.methods.asymkv import AsymKV
from asymkv.methods.merging import group_shares, group_sums
from asymkv.observations import attention_mass, exposure, sampled
from asymkv.plan import CompactionPlan, contract_pairs, keep_rows
from asymkv.view import RowView

if TYPE_CHECKING:
    from asymkv.config import CompressionConfig


@dataclasses.dataclass(frozen=True)
class _Control(AsymKV):
    """What the controls share: the released code has none of them."""

    def validate(self, config: CompressionConfig) -> None:
        super().validate(config)
        if self.upstream_compat:
            raise ValueError(f"{config.method} has no upstream_compat=True; allowed: False")
        if self._edits:
            raise ValueError(f"{config.method} keeps positions and turned keys; merged_keys must be 'pre_rope' and "
                             f"merged_position 'last', found {self.merged_keys!r} and {self.merged_position!r}")


@dataclasses.dataclass(frozen=True)
class AsymKVEvict(_Control):
    """The control of AsymKV: the same scores, protected rows and row count, but a run keeps one row and drops the rest.

    Of each run of pairs the row with the most attention stays, with cardinality 1. Takes AsymKV's arguments.
    """

    title: ClassVar[str] = "AsymKV's selection without merging (control)"

    def judge(self, view: RowView) -> tuple[Tensor, Tensor]:
        """As AsymKV; leaves the mean attention of each row in ``view.evidence``."""
        seen = sampled(view, self.max_queries)
        view.evidence["mean_attention"] = attention_mass(seen) / exposure(seen)
        return super().judge(view)

    def carry_out(self, view: RowView, chosen: Tensor) -> CompactionPlan:
        """Keeps the most attended row of each run."""
        group, mass = contract_pairs(chosen), view.evidence["mean_attention"]
        best = torch.zeros_like(mass).scatter_reduce_(-1, group, mass, "amax", include_self=False)
        index = torch.arange(group.shape[-1], device=group.device).expand_as(group)
        leads = torch.where(mass == best.gather(-1, group), index, group.shape[-1])
        first = torch.full_like(index, group.shape[-1]).scatter_reduce_(-1, group, leads, "amin")
        return keep_rows((first.gather(-1, group) == index) & view.valid)


@dataclasses.dataclass(frozen=True)
class AsymKVSymmetric(_Control):
    """The paper's symmetric control: values merge with the keys' weights, and a merged row counts as one token.

    Pairs, protected rows, row count and keys are AsymKV's (keys by cardinality remember their tokens). Weights per
    dimension of the key count for values by their mean. Takes AsymKV's arguments.
    """

    title: ClassVar[str] = "AsymKV with values merged like keys (control)"

    def tokens(self, view: RowView) -> Tensor:
        """Tokens since the row before: nothing is dropped, only neighbours merge, and cardinality stays 1."""
        before = torch.nn.functional.pad(view.positions[..., :-1], (1, 0), value=-1)
        return torch.where(view.valid, view.positions - before, 1)

    def carry_out(self, view: RowView, chosen: Tensor) -> CompactionPlan:
        """Puts each run's weighted means into its last row and drops the others."""
        destination = contract_pairs(chosen)
        weight = self.key_weight(view, chosen, destination)
        share = group_shares(self.tokens(view) if weight is None else weight, destination)
        keys = view.rope.rotate(group_sums(share * view.unrotate(view.keys), destination), view.rotary_positions)
        values = group_sums(share.mean(-1, keepdim=True) * view.values, destination)
        touched = group_sums(torch.ones_like(share[..., :1]), destination) > 1
        view.keys = torch.where(touched, keys.to(view.keys.dtype), view.keys)
        view.values = torch.where(touched, values.to(view.values.dtype), view.values)
        index = torch.arange(destination.shape[-1], device=destination.device)
        return keep_rows((destination == index) & view.valid)
