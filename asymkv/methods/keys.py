"""Methods that look at keys alone: Knorm (arXiv 2406.11430) and KeyDiff (arXiv 2504.15364)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from asymkv.methods.base import Method
from asymkv.view import RowView


@dataclasses.dataclass(frozen=True)
class Knorm(Method):
    """Keeps the rows with the smallest key norm."""

    title: ClassVar[str] = "Knorm, arXiv 2406.11430"

    def score(self, view: RowView) -> Tensor:
        """Minus the norm of the key, ``[B, H_kv, T]``."""
        return -torch.linalg.vector_norm(view.keys, dim=-1, dtype=torch.promote_types(view.keys.dtype, torch.float32))


@dataclasses.dataclass(frozen=True)
class KeyDiff(Method):
    """Keeps the rows whose keys point away from the mean direction of the head's keys."""

    title: ClassVar[str] = "KeyDiff, arXiv 2504.15364"

    def score(self, view: RowView) -> Tensor:
        """Minus the cosine to the mean of the normalised keys (after RoPE), ``[B, H_kv, T]``."""
        keys = view.keys.to(torch.promote_types(view.keys.dtype, torch.float32))
        valid = view.valid[..., None]
        anchor = (F.normalize(keys, dim=-1) * valid).sum(-2, keepdim=True) / valid.sum(-2, keepdim=True).clamp(min=1)
        return -F.cosine_similarity(keys, anchor, dim=-1)
