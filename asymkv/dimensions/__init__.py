"""Fewer dimensions per row: what the setting ``dimensions`` names.

A row of the cache is then the key and the value in the leading directions of a basis of its head. Methods that keep,
drop or merge rows see these shorter rows, and need to know nothing of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from asymkv.budgets.split import make_split
from asymkv.dimensions.projection import Projection
from asymkv.dimensions.zack import Zack

DIMENSIONS: Mapping[str, type[Zack]] = {"zack": Zack}

__all__ = ["DIMENSIONS", "Projection", "Zack", "make_dimensions", "setting_of"]


def make_dimensions(setting: str | Mapping[str, Any] | None) -> Zack | None:
    """What a setting names: ``"zack"`` or ``{"kind": "zack", "ratio": 0.5}``; None = every dimension, as it is.

    Raises:
        ValueError: for an unknown kind, an unknown key, or a bad value; lists what is allowed.
    """
    return None if setting is None else make_split("dimensions", setting, DIMENSIONS)


def setting_of(dimensions: Zack | None) -> dict[str, Any] | None:
    """The setting that :func:`make_dimensions` turns into ``dimensions``."""
    if dimensions is None:
        return None
    kind = next(name for name, cls in DIMENSIONS.items() if type(dimensions) is cls)
    return {"kind": kind, **dataclasses.asdict(dimensions)}
