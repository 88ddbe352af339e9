"""CaM (ICML 2024, openreview LCTmppB165): values of evicted rows are spread over the rows that follow them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from asymkv.checks import check_choice, check_flag
from asymkv.methods.base import Method
from asymkv.methods.merging import leaving_rows, take, wide
from asymkv.plan import CompactionPlan, keep_rows
from asymkv.view import RowView

if TYPE_CHECKING:
    from asymkv.config import CompressionConfig

SELECTIONS = ("attention", "streaming")
WORD = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class CaM(Method):
    """The value of each leaving row is spread over the next kept rows, with a probability by its attention.

    ``v_j += b v_i / m`` for the m kept rows j that follow row i (fewer at the end), ``b ~ Bernoulli(p)`` per KV head,
    ``p = clip(a_i / mean of a_j, 0, 1)`` of accumulated attention. Keys are untouched.

    Args:
        merge_budget: m; the released code has 32, and 16 on its streaming path.
        select: which rows leave: those of the lowest accumulated "attention", all at once; or the oldest ("streaming"),
            one behind the other as the released code has them leave: a row is spread over the next m rows whether they
            will leave too or not, and takes along what it was given when it leaves itself.
        deterministic: use p in the place of b, which is equal in expectation.
        seed: of the draws. A draw hangs on seed, layer, head and own position alone, never on the batch.
        count_bias: the rows' tokens go with them (log n in attention): each token of a leaving row joins one of the
            next m rows, in turn, and values are means by tokens (weighed by p where deterministic). False is the
            published form, which adds to values and leaves counts.
    """

    title: ClassVar[str] = "CaM, ICML 2024"

    merge_budget: int = 32
    select: str = "attention"
    deterministic: bool = False
    seed: int = 0
    count_bias: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"attention"})

    def validate(self, config: CompressionConfig) -> None:
        """Checks the choices.

        Raises:
            ValueError: for an unknown selection, a merge budget below 1, a seed that is no integer >= 0 or a flag
                that is none.
        """
        super().validate(config)
        check_choice("select", self.select, SELECTIONS)
        check_flag("deterministic", self.deterministic)
        check_flag("count_bias", self.count_bias)
        for name, least in (("merge_budget", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}; found {value!r}")

    def score(self, view: RowView) -> Tensor:
        """Accumulated attention mass of the group, or the position."""
        return view.statistics["mass"] if self.select == "attention" else view.positions.float()

    def carry_out(self, view: RowView, chosen: Tensor) -> CompactionPlan:
        """Spreads the values of the leaving rows, then drops them."""
        keep = ~chosen & view.valid
        index, present = leaving_rows(chosen)
        targets = Targets(view.valid if self.select == "streaming" else keep, index, present, self.merge_budget)
        share = self.draw(view, index, self.probability(wide(view.statistics["mass"]), index, targets))
        share = share.to(torch.promote_types(view.values.dtype, torch.float32))
        if self.count_bias:
            self._join(view, index, targets, share)
        else:
            self._spread(view, index, targets, share)
        return keep_rows(keep)

    def probability(self, mass: Tensor, index: Tensor, targets: Targets) -> Tensor:
        """p of each leaving row, ``[B, H_kv, E]``; 0 where a row has no target, or neither has attention.

        Args:
            mass: ``[B, H_kv, T]`` accumulated attention.
            index: ``[B, H_kv, E]`` leaving rows.
            targets: the rows that each is spread over.
        """
        total = torch.zeros_like(index, dtype=mass.dtype)
        for step in range(targets.most):
            row, real = targets.at(step)
            total += torch.where(real, mass.gather(2, row), 0)
        p = mass.gather(2, index) / (total / targets.count.clamp(min=1))
        return torch.where(targets.count > 0, p.nan_to_num(nan=0.0, posinf=1.0).clamp(0, 1), 0)

    def draw(self, view: RowView, index: Tensor, p: Tensor) -> Tensor:
        """b of each leaving row, ``[B, H_kv, E]``: 0 or 1, or p itself where deterministic."""
        if self.deterministic:
            return p
        head = torch.arange(index.shape[1], device=index.device)[None, :, None]
        position = view.positions.long().gather(2, index)
        return (uniform(self.seed, view.layer, head, position) < p).to(p.dtype)

    def _spread(self, view: RowView, index: Tensor, targets: Targets, share: Tensor) -> None:
        """``v_j += share v_i / count``."""
        values = wide(view.values).clone()
        weight = share / targets.count.clamp(min=1)
        for who, _, row, real in targets.turns(one_by_one=self.select == "streaming"):
            part = take(values, index[..., who]) * weight[..., who, None]
            at = row[..., None].expand(*row.shape, part.shape[-1])
            values.scatter_add_(2, at, torch.where(real[..., None], part, 0))
        view.values = values.to(view.values.dtype)

    def _join(self, view: RowView, index: Tensor, targets: Targets, share: Tensor) -> None:
        """Whole tokens go to the targets in turn, from one that the row's position picks; values become means."""
        n, weight = view.cardinality.long(), view.cardinality.to(share.dtype)
        sums, position = n[..., None] * wide(view.values), view.positions.long().gather(2, index)
        for who, step, row, real in targets.turns(one_by_one=self.select == "streaming"):
            leaving, most = index[..., who], targets.count[..., who].clamp(min=1)
            tokens = torch.where(share[..., who] > 0, n.gather(2, leaving), 0)
            extra = (step - position[..., who]) % most < tokens % most
            goes = torch.where(real, tokens // most + extra, 0)
            part = goes * share[..., who]
            mean = take(sums, leaving) / weight.gather(2, leaving).clamp(min=1)[..., None]
            sums.scatter_add_(2, row[..., None].expand(*row.shape, mean.shape[-1]), mean * part[..., None])
            weight.scatter_add_(2, row, part)
            n.scatter_add_(2, row, goes)
        joined = (n > view.cardinality)[..., None]
        view.values = torch.where(joined, (sums / weight.clamp(min=1)[..., None]).to(view.values.dtype), view.values)
        view.cardinality = n.to(view.cardinality.dtype)


class Targets:
    """The rows that follow each leaving row, and that it is spread over.

    Args:
        keep: ``[B, H_kv, T]`` bool, those that it can be.
        index: ``[B, H_kv, E]`` leaving rows.
        present: ``[B, H_kv, E]`` bool.
        budget: most targets of a row.
    """

    def __init__(self, keep: Tensor, index: Tensor, present: Tensor, budget: int) -> None:
        self.order = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)
        kept = keep.cumsum(-1)
        self.first = kept.gather(2, index)  # of those in order, the one behind the row
        self.count = torch.where(present, kept[..., -1:] - self.first, 0).clamp(max=budget)
        self.most = int(self.count.max())

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """``row [B, H_kv, E]`` into T, the target number ``step`` of each, and whether there is one."""
        real = step < self.count
        return self.order.gather(2, torch.where(real, self.first + step, 0)), real

    def turns(self, *, one_by_one: bool) -> Iterator[tuple[slice, int | Tensor, Tensor, Tensor]]:
        """Who is spread (of the leaving rows), numbers of the targets, their rows and whether they are there.

        Args:
            one_by_one: each row to all its targets before the next; otherwise all rows to one target each at a time.
        """
        if not one_by_one:
            for step in range(self.most):
                yield slice(None), step, *self.at(step)
            return
        steps = torch.arange(self.most, device=self.order.device)
        for who in range(self.count.shape[-1]):
            real = steps < self.count[..., who, None]
            place = torch.where(real, self.first[..., who, None] + steps, 0)
            yield slice(who, who + 1), steps, self.order.gather(2, place), real


def uniform(seed: int, layer: int, head: Tensor, position: Tensor) -> Tensor:
    """Draws from [0, 1), fp64, one for each (seed, layer, head, position): a hash, so that no order matters.

    Args:
        seed: integer >= 0.
        layer: layer index.
        head: KV heads, integers that broadcast against ``position``.
        position: own positions.
    """
    state = _mix(torch.full_like(position, seed & WORD))
    for part in (seed >> 32 & WORD, layer, head, position):
        state = _mix(state ^ _mix(torch.as_tensor(part, device=position.device) + 1))
    return state.double() / (WORD + 1)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words that scatters neighbours (shifts and odd factors of the lowbias32 hash)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = x ^ (x >> shift)
        # By halves, so that no product leaves int64.
        x = (x * (factor & 0xFFFF) + ((x * (factor >> 16) & 0xFFFF) << 16)) & WORD
    return x ^ (x >> 16)
