"""TOVA (arXiv 2401.06104): the last query decides."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

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
        """Attention of the newest query, ``[B, H_kv, T]``, equal in every head."""
        mass = attention_mass(newest(view, 1))
        return mass.mean(1, keepdim=True).expand_as(mass)
