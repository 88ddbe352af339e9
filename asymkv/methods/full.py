"""The full cache, on the same storage and attention."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from asymkv.methods.base import Method


@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Never compacts: the upper reference for quality and for bytes."""

    title: ClassVar[str] = "full cache (reference)"
    chunk_size: ClassVar[int | None] = None
    compresses: ClassVar[bool] = False
