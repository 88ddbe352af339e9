"""TOVA (arXiv 2401.06104): the last query decides."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from asymkv.methods.base import Method
from asymkv.observations import attention_mass, newest
from asymkv.view import RowView


@dataclasses.dataclass(frozen=True)
class TOVA(Method):
    """Keeps the rows that the newest query attends to most, the mean over all query heads: one choice for a layer.

    The newest token is kept (``window_size=1``, as kvpress has it; the paper does not force it). The paper drops one
    row with every generated token: ``decode_interval=1``.
    """

    title: ClassVar[str] = "TOVA, arXiv 2401.06104"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"queries"})

    def defaults(self) -> dict[str, Any]:
        return {"sink_size": 0, "window_size": 1}

    def score(self, view: RowView) -> Tensor:
        """Attention of the newest query, ``[B, H_kv, T]``, for one position equal in every head."""
        return mean_over_heads(attention_mass(newest(view, 1)), view)


def mean_over_heads(mass: Tensor, view: RowView) -> Tensor:
    """``mass [B, H_kv, T]``, the mean over KV heads of what each position has; nothing where a head lacks it."""
    even = mass.mean(1, keepdim=True).expand_as(mass)
    unlike = (view.positions != view.positions[:, :1]) & view.valid
    same = (view.lengths == view.lengths[:, :1]).all(1) & ~unlike.any(2).any(1)
    if bool(same.all()):
        return even
    place = torch.where(view.valid, view.positions, 0).flatten(1).long()
    held = torch.where(view.valid, mass, 0).flatten(1)
    total = mass.new_zeros(mass.shape[0], int(view.tokens.max())).scatter_add_(1, place, held)
    by_position = total.gather(1, place).view_as(mass) / mass.shape[1]
    # Each row of the batch by itself decides, so that no sum's rounding hangs on the others.
    return torch.where(same[:, None, None], even, by_position)
