"""Rotary position embedding: tables for new tokens, and moving stored rows from one position to another.

Rotation convention of Llama, Mistral and Qwen2 (RoFormer, arXiv 2104.09864, "half" layout): dimension ``d`` turns
together with ``d + D/2`` by the angle ``position * inv_freq[d]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Types whose inverse frequencies follow the longest sequence seen: HF computes them for a whole batch at once.
LENGTH_DEPENDENT_TYPES = frozenset({"dynamic", "longrope"})


def rotate_half(x: Tensor) -> Tensor:
    """Maps ``(a, b)``, the two halves of the last dimension, to ``(-b, a)``."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates ``x [..., D]`` by tables that broadcast against it."""
    return x * cos + rotate_half(x) * sin


class Rope:
    """The rotary embedding of one model.

    Args:
        rotary: the model's own rotary module (``inv_freq``, ``forward(x, position_ids) -> cos, sin``), so that every
            scaling type of transformers (default, linear, dynamic, yarn, llama3) gives the model's own numbers.
    """

    def __init__(self, rotary: nn.Module) -> None:
        self.rotary: Any = rotary
        self.rope_type: str = getattr(rotary, "rope_type", "default")

    @property
    def device(self) -> torch.device:
        """Where the model's rotary embedding lies."""
        return self.rotary.inv_freq.device

    def tables(self, positions: Tensor, dtype: torch.dtype, *, per_row: bool = True) -> tuple[Tensor, Tensor]:
        """Cosines and sines, attention scaling included.

        Args:
            positions: ``[M, t]`` integer positions.
            dtype: dtype of the tables.
            per_row: frequencies that depend on the length follow each row's own length, not the batch's longest, so
                that a row's result does not depend on what it is batched with.

        Returns:
            ``cos, sin``, each ``[M, t, D]`` on the device of ``positions``.
        """
        like = torch.empty(0, dtype=dtype, device=self.device)
        ids = positions.to(self.device)
        if per_row and self.rope_type in LENGTH_DEPENDENT_TYPES:
            parts = [self._fresh(like, row[None]) for row in ids]
            cos, sin = (torch.cat(tables) for tables in zip(*parts, strict=True))
        else:
            cos, sin = self.rotary(like, ids)
        return cos.to(positions.device), sin.to(positions.device)

    def _fresh(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tables of a module that has seen nothing longer: transformers keeps the longest length of all calls."""
        if hasattr(self.rotary, "original_inv_freq"):
            self.rotary.register_buffer("inv_freq", self.rotary.original_inv_freq, persistent=False)
            self.rotary.max_seq_len_cached = self.rotary.original_max_seq_len
        return self.rotary(like, positions)

    def frequencies(self, device: torch.device, size: int) -> Tensor:
        """``[size / 2]`` fp32 on ``device``: angle per position of each pair of dimensions of rows of that size."""
        return self.rotary.inv_freq.to(device, torch.float32).contiguous()

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotates rows forward by ``positions`` (negative: back), without attention scaling.

        Args:
            x: ``[..., D]`` rows; computed in fp32, or fp64 for fp64 rows.
            positions: ``[...]`` integer distances.

        Returns:
            The rotated rows in the dtype of the computation.
        """
        compute = torch.promote_types(x.dtype, torch.float32)
        # The angle is formed in fp32, as transformers does, so that turning back undoes exactly what the model did.
        angle = positions[..., None].float() * self.frequencies(x.device, x.shape[-1])
        angle = torch.cat((angle, angle), dim=-1).to(compute)
        return apply_rope(x.to(compute), angle.cos(), angle.sin())


class ProjectedRope(Rope):
    """The rotary embedding of a cache that stores keys in other coordinates: new tokens turn before they are projected,
    stored rows cannot turn any more, so that rows merge as they are stored.

    Position policies that move rows are refused with such a cache.
    """

    def frequencies(self, device: torch.device, size: int) -> Tensor:
        """Zeros."""
        return torch.zeros(size // 2, device=device)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """The rows as they are, in the dtype of the computation."""
        return x.to(torch.promote_types(x.dtype, torch.float32))
