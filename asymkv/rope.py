"""Rotary position embedding: tables for new tokens, and moving stored rows from one position to another.

Rotation convention of Llama, Mistral and Qwen2 (RoFormer, arXiv 2104.09864, "half" layout): dimension ``d`` turns
together with ``d + D/2`` by the angle ``position * inv_freq[d]``.
"""

from __future__ import annotations

import copy
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
        self.rope_type: str = getattr(rotary, "rope_type", "default")
        # Of a type that remembers lengths, a copy: rows of a batch are asked for one by one, and the model's own module
        # must not remember the last one's.
        self.rotary: Any = _detached(rotary) if self.rope_type in LENGTH_DEPENDENT_TYPES else rotary
        self.of_rows: Tensor | None = None  # of such a type: frequencies [B, D / 2] that each row's keys are turned by

    @property
    def device(self) -> torch.device:
        """Where the model's rotary embedding lies."""
        return self.rotary.inv_freq.device

    def tables(self, positions: Tensor, dtype: torch.dtype, *, per_row: bool = True) -> tuple[Tensor, Tensor]:
        """Cosines and sines, attention scaling included.

        Args:
            positions: ``[M, t]`` integer positions.
            dtype: dtype of the tables.
            per_row: the positions are those of new tokens, and frequencies that depend on the length follow each
                row's own, not the batch's longest, so that a row's result does not depend on what it is batched with;
                False: those frequencies serve once more (``M``: rows of that batch times heads).

        Returns:
            ``cos, sin``, each ``[M, t, D]`` on the device of ``positions``.
        """
        like = torch.empty(0, dtype=dtype, device=self.device)
        ids = positions.to(self.device)
        if self.rope_type not in LENGTH_DEPENDENT_TYPES:
            cos, sin = self.rotary(like, ids)
        elif per_row:
            parts = [self._fresh(like, row[None]) for row in ids]
            cos, sin, self.of_rows = (torch.cat(each) for each in zip(*parts, strict=True))
        else:
            angle = self._angle(ids)
            cos, sin = ((x * self.rotary.attention_scaling).to(dtype) for x in (angle.cos(), angle.sin()))
        return cos.to(positions.device), sin.to(positions.device)

    def follow(self, lengths: list[int]) -> None:
        """Takes the frequencies of rows that have seen so many tokens, as after the tables of those tokens."""
        if self.rope_type in LENGTH_DEPENDENT_TYPES and lengths:
            last = torch.tensor(lengths, device=self.device)[:, None] - 1
            self.tables(last.clamp(min=0), torch.float32)

    def _fresh(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tables and frequencies ``[1, D / 2]`` of a module that has seen nothing longer than ``positions [1, t]``:
        transformers keeps the longest length of all calls.
        """
        if hasattr(self.rotary, "original_inv_freq"):
            first = self.rotary.original_inv_freq.to(self.device, copy=True)  # longrope overwrites the buffer in place
            self.rotary.register_buffer("inv_freq", first, persistent=False)
            self.rotary.max_seq_len_cached = self.rotary.original_max_seq_len
        cos, sin = self.rotary(like, positions)
        return cos, sin, self.rotary.inv_freq.clone()[None]

    def frequencies(self, device: torch.device, size: int) -> Tensor:
        """fp32 on ``device``: angle per position of each pair of dimensions of rows of that size.

        ``[size / 2]``; ``[B, size / 2]``, one for each row of the batch, where they depend on the length.
        """
        found = self.rotary.inv_freq if self.of_rows is None else self.of_rows
        return found.to(device, torch.float32).contiguous()

    def _angle(self, positions: Tensor) -> Tensor:
        """``[..., D]`` fp32 angles of ``positions [B or B * heads, ...]``, both halves.

        The angle is formed in fp32, as transformers does, so that turning back undoes exactly what the model did.
        """
        frequencies = self.frequencies(positions.device, 2 * self.rotary.inv_freq.shape[0])
        if frequencies.ndim == 2:
            frequencies = frequencies.repeat_interleave(positions.shape[0] // frequencies.shape[0], dim=0)
            frequencies = frequencies.view(-1, *(1,) * (positions.ndim - 1), frequencies.shape[-1])
        angle = positions[..., None].float() * frequencies
        return torch.cat((angle, angle), dim=-1)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotates rows forward by ``positions`` (negative: back), without attention scaling.

        Args:
            x: ``[B or B * heads, ..., D]`` rows; computed in fp32, or fp64 for fp64 rows.
            positions: ``[B or B * heads, ...]`` integer distances.

        Returns:
            The rotated rows in the dtype of the computation.
        """
        compute = torch.promote_types(x.dtype, torch.float32)
        angle = self._angle(positions).to(compute)
        return apply_rope(x.to(compute), angle.cos(), angle.sin())


def _detached(rotary: nn.Module) -> nn.Module:
    """A copy of a rotary module without accelerate's hooks, which call the original."""
    out = copy.deepcopy(rotary)
    for name in ("forward", "_old_forward", "_hf_hook"):
        vars(out).pop(name, None)
    return out


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
