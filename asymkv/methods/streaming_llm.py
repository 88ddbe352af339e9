"""StreamingLLM (arXiv 2309.17453): attention sinks and the newest tokens."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from asymkv.methods.base import Method
from asymkv.view import RowView


@dataclasses.dataclass(frozen=True)
class StreamingLLM(Method):
    """Keeps ``sink_size`` first and the newest tokens; everything between is dropped.

    The budget is filled with the newest rows; ``window_size`` is only a lower bound. Position policy "compact" is the
    paper's (keys are rotated to their rank in the cache), "original" is sink + window eviction as kvpress has it.
    """

    title: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"
    position_policy: ClassVar[str] = "compact"

    def score(self, view: RowView) -> Tensor:
        """The position: oldest first."""
        return view.positions.float()
