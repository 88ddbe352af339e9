"""H2O (arXiv 2306.14048): heavy hitters by accumulated attention."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from asymkv.methods.base import Method
from asymkv.view import RowView


@dataclasses.dataclass(frozen=True)
class H2O(Method):
    """Keeps the rows with the most attention over all queries so far, per KV head, and the recent window.

    Args:
        normalize: divide a row's attention by the number of queries that could see it (all tokens since its own), so
            that early tokens are not preferred for having been seen more often.
    """

    title: ClassVar[str] = "H2O, arXiv 2306.14048"

    normalize: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"attention"})

    def score(self, view: RowView) -> Tensor:
        """Accumulated attention mass, summed over the query heads of a group."""
        mass = view.statistics["mass"]
        if not self.normalize:
            return mass
        seen_by = view.tokens[:, None, None] - view.positions
        return mass / seen_by.clamp(min=1)
