"""Checks of settings: each raises ValueError that names the setting, what was found, and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


class PromptRefusedError(ValueError):
    """A prompt that a method cannot do with what its settings ask, such as one no longer than the window."""


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """``value`` must be one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}; allowed: {list(allowed)}")


def check_integer(name: str, value: Any, minimum: int) -> None:
    """``value`` must be an integer >= ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}; found {value!r}")


def check_number(name: str, value: Any, minimum: float, maximum: float = float("inf")) -> None:
    """``value`` must be a finite number from ``minimum`` to ``maximum``."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not known or not minimum <= value <= maximum:
        limit = f">= {minimum:g}" if maximum == float("inf") else f"from {minimum:g} to {maximum:g}"
        limit += " and finite" * (value == float("inf"))
        raise ValueError(f"{name} must be a number {limit}; found {value!r}")


def check_flag(name: str, value: Any) -> None:
    """``value`` must be True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False; found {value!r}")
