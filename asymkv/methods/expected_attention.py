"""ExpectedAttention (arXiv 2510.00636): attention that queries still to come are expected to pay."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from asymkv.checks import check_flag, check_integer, check_number
from asymkv.methods.base import Method
from asymkv.view import RowView

if TYPE_CHECKING:
    from asymkv.config import CompressionConfig


@dataclasses.dataclass(frozen=True)
class ExpectedAttention(Method):
    """Keeps the rows with the largest expected attention times value norm, outside the sinks.

    Queries before RoPE are taken as Gaussian; their mean and covariance are turned by the average rotation of the next
    ``n_future_positions``, so that ``E[exp(s q.k)] = exp(s mu.k + s^2 k'Ck / 2)`` in closed form.

    Args:
        n_future_positions: positions, from the next token on, that the rotation is averaged over.
        use_covariance: whether the second term counts.
        use_vnorm: whether a row's score is multiplied by the norm of its value.
        epsilon: added to the expected attention before that.
    """

    title: ClassVar[str] = "ExpectedAttention, arXiv 2510.00636"
    chunk_size: ClassVar[int | None] = None

    n_future_positions: int = 512
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: float = 0.0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"queries", "raw_queries", "whole_prompt"})

    def defaults(self) -> dict[str, Any]:
        return {"window_size": 0}

    def validate(self, config: CompressionConfig) -> None:
        """Checks the choices.

        Raises:
            ValueError: for values out of range, or positions that move.
        """
        super().validate(config)
        require_original_positions(config)
        check_integer("n_future_positions", self.n_future_positions, 1)
        check_number("epsilon", self.epsilon, 0)
        check_flag("use_covariance", self.use_covariance)
        check_flag("use_vnorm", self.use_vnorm)

    def score(self, view: RowView) -> Tensor:
        """``(expected attention + epsilon) |v|``, ``[B, H_kv, T]``."""
        mean, covariance = self._query_statistics(view)
        keys = view.keys.to(mean.dtype)
        logits = torch.einsum("bhgd,bhtd->bhgt", mean, keys) * view.scale
        if self.use_covariance:
            turned = torch.einsum("bhtd,bhgde->bhgte", keys, covariance)
            logits += torch.einsum("bhgtd,bhtd->bhgt", turned, keys) * (view.scale**2 / 2)
        # Cardinalities count as in any attention; rows that are never dropped do not take part.
        bias = view.bias().to(logits.dtype).masked_fill(view.positions < self.sink_size, -torch.inf)
        expected = (logits + bias[:, :, None]).softmax(-1).nan_to_num(0).mean(2)  # NaN: a head that is all sinks
        if not self.use_vnorm:
            return expected
        return (expected + self.epsilon) * view.values.to(expected.dtype).norm(dim=-1)

    def _query_statistics(self, view: RowView) -> tuple[Tensor, Tensor]:
        """Mean ``[B, H_kv, G, D]`` and covariance ``[B, H_kv, G, D, D]`` of future queries."""
        queries, positions = view.queries_before_rope(), view.query_positions
        assert positions is not None
        dtype = torch.promote_types(queries.dtype, torch.float32)
        batch, heads, _, dim = queries.shape
        use = positions >= self.sink_size
        # A prompt that is all sinks has nothing to drop, yet must not divide by zero.
        use = torch.where(use.any(1, keepdim=True), use, positions >= 0)
        weight = use.to(dtype)[:, None, :, None]
        count = weight.sum(2, keepdim=True).clamp(min=1)
        queries = queries.to(dtype)
        mean = (queries * weight).sum(2, keepdim=True) / count
        centred = (queries - mean) * weight
        covariance = centred.transpose(2, 3) @ centred / count
        rotation = self._average_rotation(view, dtype)
        mean = (mean @ rotation.transpose(-1, -2)).view(batch, view.keys.shape[1], -1, dim)
        covariance = rotation @ covariance @ rotation.transpose(-1, -2)
        return mean, covariance.view(*mean.shape, dim)

    def _average_rotation(self, view: RowView, dtype: torch.dtype) -> Tensor:
        """``[B, 1, D, D]``: mean rotation matrix of the next positions of each row of the batch."""
        ahead = torch.arange(self.n_future_positions, device=view.tokens.device)
        cos, sin = view.rope.tables(view.tokens[:, None] + ahead, dtype, per_row=False)
        cos, sin = cos.mean(1), sin.mean(1)
        half = cos.shape[-1] // 2
        rotation = torch.diag_embed(cos)
        index = torch.arange(half, device=cos.device)
        rotation[:, index, index + half] = -sin[:, :half]
        rotation[:, index + half, index] = sin[:, half:]
        return rotation[:, None]


def require_original_positions(config: CompressionConfig) -> None:
    """Raises ValueError where a compaction moves rows: how far future queries are from them is then not known."""
    if config.positions != "original":
        raise ValueError("expected attention looks ahead from the tokens' own positions; position_policy must be "
                         f"'original', found {config.positions!r}")
