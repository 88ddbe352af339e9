"""What all splits of a budget share: construction from settings, and exact whole-number shares."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

Split = TypeVar("Split")


def make_split(name: str, setting: str | Mapping[str, Any], kinds: Mapping[str, type[Split]]) -> Split:
    """The split that a setting names: ``"adaptive"`` or ``{"kind": "adaptive", "floor": 0.2}``.

    Raises:
        ValueError: for an unknown kind, an unknown key of a known kind, or a bad value; lists what is allowed.
    """
    if not isinstance(setting, (str, Mapping)):
        raise ValueError(f"{name} must be a kind or a mapping with one; found {setting!r}; allowed: {sorted(kinds)}")
    mapping: dict[str, Any] = {"kind": setting} if isinstance(setting, str) else dict(setting)
    kind = str(mapping.pop("kind", None))
    if kind not in kinds:
        raise ValueError(f"unknown {name} {kind!r}; allowed: {sorted(kinds)}")
    known = set(inspect.signature(kinds[kind]).parameters)
    unknown = sorted(set(mapping) - known)
    if unknown:
        raise ValueError(f"unknown keys {unknown} of {name}={kind!r}; allowed: {sorted(known)}")
    return kinds[kind](**mapping)


def apportion(shares: Tensor, total: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """Whole numbers near ``shares`` that sum to ``total`` exactly (largest remainder), within bounds.

    Args:
        shares: ``[B, N]`` floating point >= 0; scaled here to sum to ``total``.
        total: ``[B]`` int64.
        least: ``[B, N]`` int64 and ``most [B, N]``: bounds of each; a total outside their sums is brought to the
            nearest sum.

    Returns:
        ``[B, N]`` int64. Ties go to the lower index.
    """
    shares = shares.double()
    total = total.clamp(min=least.sum(-1)).minimum(most.sum(-1))[:, None]
    scale = _scale_within(shares, total, least, most)
    wanted = (shares * scale).clamp(min=least.double()).minimum(most.double())
    # The tolerance keeps 3.9999999 from losing a row to 3.
    out = (wanted + 1e-9).floor().long().clamp(min=least).minimum(most)
    rest = wanted - out
    while True:
        missing = total[:, 0] - out.sum(-1)
        if not bool(missing.any()):
            return out
        sign = missing.sign()[:, None]
        room = torch.where(sign > 0, most - out, out - least)
        order = torch.where(room > 0, -rest * sign, torch.inf).argsort(dim=-1, stable=True)
        index = torch.arange(order.shape[1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(-1, order, index)
        out = out + torch.where((rank < missing.abs()[:, None]) & (room > 0), sign, 0)


def _scale_within(shares: Tensor, total: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """``[B, 1]``: the factor at which shares, clamped to their bounds, sum to the total (bisection)."""
    low = torch.zeros_like(total, dtype=torch.double)
    positive = shares.masked_fill(shares <= 0, torch.inf).amin(-1, keepdim=True)
    high = torch.where(positive.isinf(), 1.0, most.amax(-1, keepdim=True) / positive.clamp(min=1e-300)).clamp(max=1e300)
    exact = total / shares.sum(-1, keepdim=True).clamp(min=1e-300)
    scaled = shares * exact
    free = (scaled >= least).all(-1, keepdim=True) & (scaled <= most).all(-1, keepdim=True)
    for _ in range(100):
        middle = (low + high) / 2
        held = (shares * middle).clamp(min=least.double()).minimum(most.double()).sum(-1, keepdim=True)
        low, high = torch.where(held < total, middle, low), torch.where(held < total, high, middle)
    return torch.where(free, exact, high)
