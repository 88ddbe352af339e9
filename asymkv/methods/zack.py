"""ZACK (arXiv 2408.04107): every row is kept, in fewer dimensions."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from asymkv.methods.full import Full


@dataclasses.dataclass(frozen=True)
class Zack(Full):
    """Keeps every row, in the leading dimensions of a basis per head (``dimensions="zack"``).

    ``ratio`` is then the share of dimensions kept, where ``dimensions`` names none (0.5 without either); a budget of
    rows is not asked. Any other method takes ``dimensions`` too, and keeps fewer rows of fewer dimensions.
    """

    title: ClassVar[str] = "ZACK, arXiv 2408.04107"

    def defaults(self) -> dict[str, Any]:
        return {"dimensions": "zack"}
