"""Base of the methods that treat heads by scores measured beforehand."""

from __future__ import annotations

import dataclasses
from typing import Any

from asymkv.head_scores import plain_source
from asymkv.methods.base import Method


@dataclasses.dataclass(frozen=True)
class HeadScored(Method):
    """A method whose head budgets come from ``head_scores``.

    Args:
        head_scores: a source that ``asymkv.head_scores.resolve`` takes; paths and tensors are kept as plain text and
            lists, so that settings can be written to json and yaml.
    """

    head_scores: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "head_scores", plain_source(self.head_scores))
