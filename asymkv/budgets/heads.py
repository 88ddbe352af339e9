"""Splits of a layer's budget over its KV heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from asymkv.budgets.split import apportion
from asymkv.checks import check_choice, check_number
from asymkv.view import lowest

if TYPE_CHECKING:
    from asymkv.budgets.layers import Request
    from asymkv.config import CompressionConfig

MODES = ("interpolated", "hard")
# Rows of every head of a layer, or of each of its heads.
Rows: TypeAlias = "int | tuple[int, ...]"


@dataclasses.dataclass(frozen=True)
class Judged:
    """A layer's units as a method judged them; legend U units of a head (rows, or pairs of rows).

    Args:
        cost: ``[B, H_kv, U]``, what giving a unit up costs.
        free: ``[B, H_kv, U]`` bool, units that may be given up; each one frees one row.
        lengths: ``[B, H_kv]`` rows now.
        budget: ``[B, H_kv]`` rows to keep.
        layer: index of the layer.
    """

    cost: Tensor
    free: Tensor
    lengths: Tensor
    budget: Tensor
    layer: int = 0

    @property
    def excess(self) -> Tensor:
        """``[B, H_kv]``: rows that a head must lose if heads share nothing."""
        return (self.lengths - self.budget).clamp(min=0)

    @property
    def surplus(self) -> Tensor:
        """``[B]``: rows of all heads above their budgets; negative where they hold fewer."""
        return (self.lengths - self.budget).sum(-1)

    @property
    def bound(self) -> Tensor:
        """``[B, H_kv]``: rows that must stay."""
        return self.lengths - self.free.sum(-1)

    def safe(self, share: float) -> Tensor:
        """Units among the best ``share * budget`` rows of a head (at least one), rows that must stay counted first."""
        if not share:
            return torch.zeros_like(self.free)
        count = (self.budget.double() * share + 1e-9).floor().long().clamp(min=1) - self.bound
        return lowest(-self.cost, count.clamp(min=0), self.free)


@dataclasses.dataclass(frozen=True)
class HeadBudgets:
    """Every head of a layer keeps the same number of rows.

    Class attributes:
        ragged: whether heads of a layer may hold different numbers of rows; the layer's budget is then their mean.
        fixed: whether each head's rows are known before anything is judged (:meth:`rows` then gives them).
        spans_layers: whether heads of different layers share, so that layers cannot be given budgets beside that.
    """

    ragged: ClassVar[bool] = False
    fixed: ClassVar[bool] = False
    spans_layers: ClassVar[bool] = False

    def check(self, config: CompressionConfig) -> None:
        """Raises ValueError for settings that this split cannot serve."""

    def prepare(self, model: Any) -> HeadBudgets:
        """This split with what it must know of a causal LM; called once per cache.

        Raises:
            ValueError: where that is missing or of another model.
        """
        return self

    def rows(self, request: Request, layers: list[int], held: list[list[int]]) -> list[Rows]:
        """Rows of the heads of every layer.

        Args:
            request: what is asked for.
            layers: rows per head that each layer is given.
            held: rows of each head of each layer by now, ``[L][H_kv]``.
        """
        return list(layers)

    def choose(self, judged: Judged) -> Tensor:
        """The units that each head gives up, ``[B, H_kv, U]`` bool."""
        return lowest(judged.cost, judged.excess, judged.free)


@dataclasses.dataclass(frozen=True)
class Adaptive(HeadBudgets):
    """AdaKV (arXiv 2407.11550): heads share a layer's budget by where the costliest units are.

    Args:
        floor: share of the even split that every head is given.
        mode: "interpolated" (the paper's code: a head gets ``floor`` times the even share and ``1 - floor`` times what
            it wins in the layer-wide ranking) or "hard" (as kvpress has it: the best ``floor`` times the budget of
            each head are safe, the layer's cheapest go).
    """

    ragged: ClassVar[bool] = True

    floor: float = 0.2
    mode: str = "interpolated"

    def __post_init__(self) -> None:
        check_number("floor of head_budgets='adaptive'", self.floor, 0, 1)
        check_choice("mode of head_budgets='adaptive'", self.mode, MODES)

    def choose(self, judged: Judged) -> Tensor:
        """The layer's cheapest units, such that the heads' rows sum to the budget of all."""
        total, free = judged.surplus.clamp(min=0), judged.free
        if self.mode == "hard":
            return cheapest(judged.cost, free & ~judged.safe(self.floor), total)
        held = free.sum(-1)
        won = held - cheapest(judged.cost, free, total).sum(-1)
        even = (judged.budget - judged.bound).clamp(min=0).minimum(held)
        share = won.double() * (1 - self.floor) + even.double() * self.floor
        kept = apportion(share, (held.sum(-1) - total).clamp(min=0), torch.zeros_like(held), held)
        return lowest(judged.cost, held - kept, free)


HEAD_BUDGETS: Mapping[str, type[HeadBudgets]] = {"uniform": HeadBudgets, "adaptive": Adaptive}


def cheapest(cost: Tensor, free: Tensor, total: Tensor) -> Tensor:
    """The ``total [B]`` cheapest free units of all heads, ``[B, H_kv, U]`` bool; of ties the last go."""
    flat = lowest(cost.flatten(1)[:, None], total[:, None], free.flatten(1)[:, None])
    return flat.view_as(free)
