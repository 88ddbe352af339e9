"""SnapKV (arXiv 2404.14469) and the methods that are SnapKV with another split of the budget."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from asymkv.checks import PromptRefusedError, check_choice, check_flag, check_integer
from asymkv.methods.base import Method
from asymkv.observations import attention_mass, newest
from asymkv.view import RowView

if TYPE_CHECKING:
    from asymkv.config import CompressionConfig

POOLINGS = ("avg", "max", "none")
REDUCTIONS = ("mean", "max")


@dataclasses.dataclass(frozen=True)
class SnapKV(Method):
    """Keeps the rows that the last ``window_size`` queries of the prompt attend to, and the window itself.

    The window's attention over earlier rows is averaged over its queries, pooled over neighbouring rows, then reduced
    over the query heads of a group. In decode the last queries judge (at most 32 are remembered).

    Args:
        kernel_size: rows that are pooled, odd.
        pooling: "avg", "max" (zeros beyond the ends) or "none".
        group_reduce: "mean" or "max" over the query heads of a KV head.
        group_first: reduce over the group before pooling, as AdaKV's code and KVCache-Factory do (with average pooling
            and the mean it is the same).
    """

    title: ClassVar[str] = "SnapKV, arXiv 2404.14469"
    chunk_size: ClassVar[int | None] = None

    kernel_size: int = 5
    pooling: str = "avg"
    group_reduce: str = "mean"
    group_first: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"queries", "whole_prompt"})

    def defaults(self) -> dict[str, Any]:
        return {"sink_size": 0, "window_size": 64}

    def validate(self, config: CompressionConfig) -> None:
        """Checks the choices.

        Raises:
            ValueError: for an unknown choice, an even kernel, or no window.
        """
        super().validate(config)
        check_integer("kernel_size", self.kernel_size, 1)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be an odd integer >= 1; found {self.kernel_size}")
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("group_reduce", self.group_reduce, REDUCTIONS)
        check_flag("group_first", self.group_first)
        if config.window_size < 1:
            raise ValueError(f"method {config.method!r} judges by the window's queries; window_size must be >= 1, "
                             f"found {config.window_size}")

    def check_prompt(self, tokens: int, config: CompressionConfig) -> None:
        """A share of a prompt that is all window cannot be kept."""
        require_longer_prompt(tokens, config)

    def score(self, view: RowView) -> Tensor:
        """Pooled attention of the window, ``[B, H_kv, T]``."""
        window = newest(view, self.window_size)
        assert window.query_positions is not None
        count = (window.query_positions >= 0).sum(1).clamp(min=1)
        mass = attention_mass(window, per_query_head=True) / count[:, None, None, None]
        recent = view.positions >= (view.tokens - self.window_size)[:, None, None]
        mass = mass.masked_fill((recent | ~view.valid)[:, :, None], 0)
        if self.group_first:
            return pool(reduce_group(mass, self.group_reduce), self.kernel_size, self.pooling)
        return reduce_group(pool(mass, self.kernel_size, self.pooling), self.group_reduce)


@dataclasses.dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV's scores; lower layers keep more (``layer_budgets="pyramid"``). Takes SnapKV's arguments."""

    title: ClassVar[str] = "PyramidKV, arXiv 2406.02069"

    def defaults(self) -> dict[str, Any]:
        return {**super().defaults(), "layer_budgets": "pyramid"}


@dataclasses.dataclass(frozen=True)
class AdaKV(SnapKV):
    """SnapKV's scores; a layer's heads share its budget (``head_budgets="adaptive"``). Takes SnapKV's arguments."""

    title: ClassVar[str] = "AdaKV (Ada-SnapKV), arXiv 2407.11550"

    kernel_size: int = 7
    pooling: str = "max"
    group_first: bool = True

    def defaults(self) -> dict[str, Any]:
        return {"sink_size": 0, "window_size": 32, "head_budgets": "adaptive"}


@dataclasses.dataclass(frozen=True)
class DynamicKV(SnapKV):
    """SnapKV's scores; layers share the budget by where the best rows are (``layer_budgets="dynamic"``).

    Takes SnapKV's arguments.
    """

    title: ClassVar[str] = "DynamicKV, arXiv 2412.14838"

    kernel_size: int = 7

    def defaults(self) -> dict[str, Any]:
        return {"sink_size": 0, "window_size": 8, "layer_budgets": "dynamic"}


def require_longer_prompt(tokens: int, config: CompressionConfig) -> None:
    """Raises PromptRefusedError for a ratio below 1 of a prompt no longer than the window."""
    if config.ratio is not None and config.ratio < 1 and tokens <= config.window_size:
        raise PromptRefusedError(
            f"window_size={config.window_size} is not shorter than the prompt of {tokens} tokens, so that nothing "
            f"could be dropped for ratio={config.ratio}; use a smaller window_size, or method='full'"
        )


def pool(rows: Tensor, kernel: int, pooling: str) -> Tensor:
    """Pools the last dimension of ``rows [..., T]`` over neighbours, zeros beyond the ends."""
    if pooling == "none" or kernel == 1:
        return rows
    flat = rows.flatten(0, -2)[:, None]
    half = kernel // 2
    # max_pool1d pads with -inf: attention is never negative, so that zeros change nothing.
    out = F.avg_pool1d(flat, kernel, 1, half) if pooling == "avg" else F.max_pool1d(flat, kernel, 1, half)
    return out[:, 0].view_as(rows)


def reduce_group(scores: Tensor, how: str) -> Tensor:
    """``[B, H_kv, G, T]`` to ``[B, H_kv, T]``."""
    return scores.mean(2) if how == "mean" else torch.amax(scores, 2)
