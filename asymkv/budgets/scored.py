"""Splits of a budget over KV heads by scores that were measured beforehand."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from asymkv import head_scores
from asymkv.budgets.heads import HeadBudgets, Rows
from asymkv.budgets.split import apportion
from asymkv.checks import check_integer, check_number

if TYPE_CHECKING:
    from asymkv.budgets.layers import Request
    from asymkv.config import CompressionConfig

# RazorAttention's retrieval heads: the best 14 % by induction score and the best 1 % by echo score.
INDUCTION_SHARE, ECHO_SHARE = 0.14, 0.01

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ScoredHeads(HeadBudgets):
    """Base of splits that know every head's rows from a table of scores.

    Args:
        file: score file, folder, or table (``asymkv.head_scores.resolve``); None = what
            ``scripts/find_retrieval_heads.py`` left for this model.

    Class attributes:
        kinds: the scores that are asked for; the first must be there.
    """

    fixed: ClassVar[bool] = True
    spans_layers: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("induction",)

    file: Any = None
    table: Tensor | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def prepare(self, model: Any) -> ScoredHeads:
        """The split with the model's scores.

        Raises:
            ValueError: for scores that are missing, damaged or of another model.
        """
        found = head_scores.resolve(self.file, model, self.kinds, "file of head_budgets (head_scores of a method)")
        out = dataclasses.replace(self)
        object.__setattr__(out, "table", self.combine(found))
        return out

    def combine(self, found: dict[str, Tensor]) -> Tensor:
        """``[L, H_kv]``: what heads are compared by."""
        return found[self.kinds[0]]

    def rows(self, request: Request, layers: list[int], held: list[list[int]]) -> list[Rows]:
        """Rows of each head of each layer; no head is given more than it holds, others get them."""
        if self.table is None:
            raise ValueError("head scores belong to a model: make the cache with CompressedCache.for_model")
        kept = self.share_out(self.table, request, torch.tensor(layers), torch.tensor(held))
        return [tuple(row) for row in kept.tolist()]

    def share_out(self, table: Tensor, request: Request, layers: Tensor, held: Tensor) -> Tensor:
        """``[L, H_kv]`` int64 rows, from the scores, the rows per head of each layer ``[L]``, and those held."""
        raise TypeError(f"{type(self).__name__} does not say how heads share")


@dataclasses.dataclass(frozen=True)
class HeadKV(ScoredHeads):
    """HeadKV (arXiv 2410.19258): a part of every head's rows goes into a pool that heads of all layers share by score.

    Of ``b`` rows per head (sinks and window not counted, every head keeps those and one row more), each head gets
    ``b - b / beta`` and its share of ``b / beta * L * H_kv``. The rows of the whole cache sum to the budget exactly;
    what a head cannot fill with the tokens there are goes to the others.

    Args:
        beta: how small a part goes into the pool; 1 = everything is shared by score.
    """

    beta: float = 1.2

    def __post_init__(self) -> None:
        check_number("beta of head_budgets='headkv'", self.beta, 1)

    def combine(self, found: dict[str, Tensor]) -> Tensor:
        """The score, which must not be negative."""
        table = super().combine(found)
        if bool((table < 0).any()):
            raise ValueError(f"head scores that share a pool must be >= 0; found {table.min().item():.3g}")
        return table

    def share_out(self, table: Tensor, request: Request, layers: Tensor, held: Tensor) -> Tensor:
        mean = request.rows - request.protected
        share = table / table.sum() if bool(table.sum() > 0) else torch.full_like(table, 1 / table.numel())
        wanted = mean - mean / self.beta + mean / self.beta * table.numel() * share
        kept = _within(wanted.flatten(), mean * table.numel(), 1, held.flatten() - request.protected)
        return request.protected + kept.view(table.shape)


@dataclasses.dataclass(frozen=True)
class Entropy(ScoredHeads):
    """UNComp (arXiv 2410.03090): within a layer, heads whose queries have a high matrix entropy keep more.

    With two groups the upper half of a layer's heads gets 4/3 of the mean and the lower 2/3, sinks and window
    included; with more, the factors are evenly spaced between. A layer's rows sum to its budget exactly.

    Args:
        groups: groups of heads.
    """

    spans_layers: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = ("entropy",)

    groups: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.groups, int) or isinstance(self.groups, bool) or self.groups < 2:
            raise ValueError(f"groups of head_budgets='entropy' must be an integer >= 2; found {self.groups!r}")

    def check(self, config: CompressionConfig) -> None:
        """The lowest group must hold sinks, window and a row for the rest."""
        if isinstance(config.budget, int) and config.budget * 2 // 3 < config.minimum_rows:
            raise ValueError(f"budget={config.budget} gives the heads of lowest entropy {config.budget * 2 // 3} rows; "
                             f"needed: at least sink_size + window_size + 1 = {config.minimum_rows}")

    def share_out(self, table: Tensor, request: Request, layers: Tensor, held: Tensor) -> Tensor:
        heads = table.shape[1]
        rank = table.argsort(dim=1, stable=True).argsort(dim=1)
        group = rank * self.groups // heads
        wanted = (2 / 3 + 2 / 3 * group / (self.groups - 1)) * layers[:, None]
        least = request.protected + 1
        return torch.stack([_within(wanted[i], n * heads, least, held[i]) for i, n in enumerate(layers.tolist())])


@dataclasses.dataclass(frozen=True)
class Retrieval(ScoredHeads):
    """Retrieval heads keep every row; the others keep sinks and the newest (RazorAttention, DuoAttention).

    The rows of the whole cache obey the budget: as many of the best heads are full as fit while the others keep sinks,
    window and one row, or no more than ``share``; what is left is the others' recent window, evenly. As tokens come in,
    fewer heads fit; one that does not fit any more keeps what the others cannot fill. With ``recent`` the rows are
    those of a published rule instead, and the budget is not asked.

    Args:
        share: share of all heads of the model that are full; None = as many as fit. Without ``echo`` those at or above
            the scores' quantile of the others' share (linear, as DuoAttention's ``sparsity``).
        recent: rows of the other heads beside the sinks; needs ``share``.
        divisor: at least the tokens seen divided by this, if given; needs ``recent``.
        extra: rows of the other heads beside that (RazorAttention's compensation row).
        echo: order heads by RazorAttention's union of induction and echo scores, in its proportion of 14 to 1.
    """

    kinds: ClassVar[tuple[str, ...]] = ("induction", "echo")

    share: float | None = None
    recent: int | None = None
    divisor: float | None = None
    extra: int = 0
    echo: bool = False

    def __post_init__(self) -> None:
        if self.share is not None:
            check_number("share of head_budgets='retrieval'", self.share, 0, 1)
        if self.recent is not None:
            check_integer("recent of head_budgets='retrieval'", self.recent, 1)
            if self.share is None:
                raise ValueError("recent of head_budgets='retrieval' needs share: nothing else says which heads "
                                 "are full")
        if self.divisor is not None:
            check_number("divisor of head_budgets='retrieval'", self.divisor, 1)
            if self.recent is None:
                raise ValueError("divisor of head_budgets='retrieval' needs recent, the least number of rows")

    def check(self, config: CompressionConfig) -> None:
        """A published rule must hold the window, and cannot follow a ratio."""
        if self.recent is None:
            return
        if self.recent < config.window_size:
            raise ValueError(f"recent={self.recent} of head_budgets='retrieval' is smaller than "
                             f"window_size={config.window_size}")
        if config.ratio is not None:
            raise ValueError(f"recent={self.recent} of head_budgets='retrieval' says what is kept; ratio must be None, "
                             f"found {config.ratio}")
        if "budget" in config.given:
            logger.warning("budget=%r is not used: recent=%d of head_budgets='retrieval' says what is kept",
                           config.budget, self.recent)

    def combine(self, found: dict[str, Tensor]) -> Tensor:
        """The score; or, for a union of two lists, minus the number of best heads at which each head is among them."""
        induction = found["induction"]
        if not self.echo:
            return induction
        both = INDUCTION_SHARE + ECHO_SHARE
        lists = [_rank(induction).double() * both / INDUCTION_SHARE]
        if "echo" in found:
            lists.append(_rank(found["echo"]).double() * both / ECHO_SHARE)
        return -torch.stack(lists).amin(0)

    def full_heads(self, table: Tensor) -> int:
        """Heads that ``share`` admits. A union of lists holds fewer heads where they overlap."""
        heads = table.numel()
        if self.share is None:
            return heads
        if self.echo:
            return int((-table < heads * self.share - 1e-6).sum())
        streaming = math.ceil((1 - self.share) * (heads - 1) - 1e-9)
        return heads - streaming if self.share > 0 else 0

    def share_out(self, table: Tensor, request: Request, layers: Tensor, held: Tensor) -> Tensor:
        heads, longest, count = table.numel(), request.longest, self.full_heads(table)
        rank = _rank(table).flatten()
        if self.recent is not None:
            newest = max(self.recent, int(longest // self.divisor) if self.divisor else 0)
            other = torch.full((heads - count,), request.sink_size + newest + self.extra)
        else:
            least = request.protected + 1
            if longest > least:
                count = min(count, heads * (request.rows - least) // (longest - least))
            most = held.flatten()[rank >= count]
            other = _within(torch.ones(heads - count), heads * request.rows - count * longest, least, most)
        kept = torch.full((heads,), longest)
        kept[rank >= count] = other
        return kept.view(table.shape)


SCORED_HEADS: dict[str, type[HeadBudgets]] = {"headkv": HeadKV, "entropy": Entropy, "retrieval": Retrieval}


def _rank(table: Tensor) -> Tensor:
    """``[L, H_kv]``: how many heads score higher, ties to the lower layer and head."""
    order = table.flatten().argsort(descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).view(table.shape)


def _within(wanted: Tensor, total: int, least: int, most: Tensor) -> Tensor:
    """Whole numbers near ``wanted [N]`` that sum to ``total``; ``most [N]`` binds, and after it ``least``."""
    if not len(wanted):
        return wanted.long()
    top = most.clamp(min=0)[None]
    return apportion(wanted[None], torch.tensor([total]), top.clamp(max=least), top)[0]
