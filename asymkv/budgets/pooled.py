"""Splits under which heads, or all heads of all layers, give up the same rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from asymkv.budgets.heads import HeadBudgets, Judged
from asymkv.budgets.layers import LayerBudgets
from asymkv.view import lowest

if TYPE_CHECKING:
    from asymkv.budgets.layers import Request


@dataclasses.dataclass(frozen=True)
class PooledHeads(HeadBudgets):
    """The heads of a layer give up the same units: costs are summed over them."""

    def choose(self, judged: Judged) -> Tensor:
        """The units whose costs are lowest in sum."""
        return choose_together([judged])[0]


@dataclasses.dataclass(frozen=True)
class PooledLayers(LayerBudgets):
    """All heads of all layers give up the same units: costs are summed over the whole model."""

    deferred: ClassVar[bool] = True
    joint: ClassVar[bool] = True

    def split(self, judged: Sequence[Judged], requests: Sequence[Request | None], heads: HeadBudgets) -> list[Tensor]:
        """The units whose costs are lowest in sum."""
        return choose_together(judged)


def choose_together(judged: Sequence[Judged]) -> list[Tensor]:
    """The same free units for every head, counted from the oldest; as many as the fullest head must lose.

    Args:
        judged: layers, on one device.

    Returns:
        Per layer, ``[B, H_kv, U]`` bool.

    Raises:
        ValueError: where heads that must lose units do not have equally many free ones, so that no choice can be
            common to them.
    """
    number = torch.stack([j.excess.amax(-1) for j in judged]).amax(0)  # [B]
    acting = (number > 0)[:, None, None]
    free = [j.free & acting for j in judged]
    count = torch.cat([f.sum(-1) for f in free], dim=1)  # [B, L * H_kv]
    unlike = (count != count[:, :1]).any(1)
    if bool(unlike.any()):
        raise ValueError(f"'pooled' needs heads that hold the same rows; free units of the heads found: "
                         f"{count[unlike][0].tolist()}")
    most = int(count.max())
    total: Tensor | float = 0.0
    places = []
    for j, f in zip(judged, free, strict=True):
        place = (~f).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]  # of the k-th free unit
        total = total + j.cost.gather(-1, place).double().sum(1, keepdim=True)
        places.append(place)
    assert isinstance(total, Tensor)
    gone = lowest(total, number[:, None], torch.arange(most, device=total.device) < count[:, :1, None])
    return [torch.zeros_like(f).scatter_(-1, p, gone.expand_as(p)) & f for f, p in zip(free, places, strict=True)]
