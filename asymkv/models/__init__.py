"""One adapter per model family, found by file name = ``config.model_type``."""

from __future__ import annotations

import importlib
import pkgutil

from asymkv.models.adapter import FamilyAdapter


def families() -> list[str]:
    """Model types that have an adapter, sorted."""
    names = (m.name for m in pkgutil.iter_modules(__path__))
    return sorted(n for n in names if not n.startswith("_") and n != "adapter")


def get_adapter(model_type: str) -> FamilyAdapter:
    """The adapter of a family.

    Raises:
        ValueError: for an unknown family; lists the known ones.
    """
    if model_type not in families():
        raise ValueError(f"unknown model family {model_type!r}; supported: {families()}")
    return importlib.import_module(f"asymkv.models.{model_type}").ADAPTER
