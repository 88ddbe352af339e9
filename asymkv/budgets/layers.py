"""Splits of the cache's budget over layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from asymkv.budgets.heads import HeadBudgets, Judged, cheapest
from asymkv.budgets.split import apportion
from asymkv.checks import check_choice, check_number

VARIANTS = ("paper", "kvpress")
ROUNDINGS = ("rows", "total")


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be kept of one sequence: rows per KV head on average over layers, and where that comes from.

    Args:
        rows: rows per KV head.
        tokens: own prompt tokens.
        ratio: share of them to keep, if that was asked for.
        sink_size: first rows that every head keeps.
        window_size: newest rows that every head keeps.
        seen: own tokens that are in by now, generated ones included.
        generated: how many of ``rows`` are there for generated tokens, on top of a share of the prompt.
    """

    rows: int
    tokens: int
    ratio: float | None
    sink_size: int
    window_size: int
    seen: int = 0
    generated: int = 0

    @property
    def protected(self) -> int:
        return self.sink_size + self.window_size

    @property
    def longest(self) -> int:
        """Rows of a head that loses none, once the prompt is in."""
        return max(self.tokens, self.seen)


@dataclasses.dataclass(frozen=True)
class LayerBudgets:
    """Every layer keeps the same number of rows per head.

    Class attributes:
        deferred: whether the split needs every layer's judgement, so that layers are compacted after the forward
            instead of one by one within it.
        joint: whether it chooses the units itself, heads included.
    """

    deferred: ClassVar[bool] = False
    joint: ClassVar[bool] = False

    @property
    def exact(self) -> bool:
        """Whether the rows kept never exceed the request; else by less than one per head."""
        return True

    def rows(self, request: Request, layers: int) -> list[int]:
        """Rows per head of each layer, known before the forward."""
        return [request.rows] * layers

    def split(self, judged: Sequence[Judged], requests: Sequence[Request | None], heads: HeadBudgets) -> list[Tensor]:
        """The units that each layer gives up, ``[B, H_kv, U]`` bool (deferred splits).

        Args:
            judged: every layer, on one device, ``budget`` being the even share (a row's own lengths where it has no
                request).
            requests: per row of the batch; None: it loses nothing.
            heads: the split over the heads of a layer.
        """
        rows = self.budgets(judged, requests)
        asked = torch.tensor([r is not None for r in requests], device=rows.device)[:, None]
        limits = [torch.where(asked, rows[:, i, None], each.lengths) for i, each in enumerate(judged)]
        return [heads.choose(dataclasses.replace(j, budget=n)) for j, n in zip(judged, limits, strict=True)]

    def budgets(self, judged: Sequence[Judged], requests: Sequence[Request | None]) -> Tensor:
        """``[B, L]`` int64 rows per head of each layer (deferred splits that are not joint)."""
        raise TypeError(f"{type(self).__name__} knows its rows before the forward")


@dataclasses.dataclass(frozen=True)
class Pyramid(LayerBudgets):
    """PyramidKV (arXiv 2406.02069): lower layers keep more, in equal steps.

    Args:
        beta: the last layer keeps ``1 / beta`` of the mean, the first about twice it.
        variant: "paper" (KVCache-Factory's formula, window and sinks on top in every layer, sums exact; an even split
            where the prompt is shorter than twice the mean) or "kvpress"
            (window and sinks inside, every layer rounded by itself, an even split where the last would fall below
            them).
    """

    beta: float = 20
    variant: str = "paper"

    def __post_init__(self) -> None:
        check_number("beta of layer_budgets='pyramid'", self.beta, 1)
        check_choice("variant of layer_budgets='pyramid'", self.variant, VARIANTS)

    @property
    def exact(self) -> bool:
        return self.variant == "paper"

    def rows(self, request: Request, layers: int) -> list[int]:
        """A straight line from the first layer to the last."""
        if self.variant == "kvpress":
            return self._rows_kvpress(request, layers)
        mean, most = request.rows - request.protected, request.tokens - request.protected
        if request.tokens < 2 * mean:
            return [request.rows] * layers
        low = mean // self.beta
        high = 2 * mean - low
        if high >= most:
            high, low = max(most, mean), 2 * mean - max(most, mean)
        line = [float(Fraction(high) - Fraction(high - low) * i / max(layers - 1, 1)) for i in range(layers)]
        total = torch.tensor([mean * layers])
        shares = torch.tensor([line], dtype=torch.double).clamp(min=0)
        floor = torch.ones(1, layers, dtype=torch.long).clamp(max=max(mean, 0))
        ceiling = torch.full((1, layers), max(most, mean))
        kept = apportion(shares, total, floor, ceiling)[0]
        return [request.protected + n for n in kept.tolist()]

    def _rows_kvpress(self, request: Request, layers: int) -> list[int]:
        mean = request.tokens * request.ratio if request.ratio is not None else float(request.rows)
        low = mean / self.beta
        high = 2 * mean - low
        # kvpress has no sinks and names the window alone; a layer below what every head keeps would be raised to it.
        if high >= request.tokens - request.protected:
            high = request.tokens - request.protected
            low = 2 * mean - high
        if not request.tokens >= high >= low >= request.protected:
            return [max(1, round(mean))] * layers
        step = (high - low) / max(layers - 1, 1)
        return [round(high - i * step) for i in range(layers)]


@dataclasses.dataclass(frozen=True)
class Shared(LayerBudgets):
    """Base of splits by a share of each layer.

    Args:
        r_max: a layer keeps at most this many times the mean.
        r_min: and at least this share of it.
    """

    deferred: ClassVar[bool] = True

    r_max: float = 10
    r_min: float = 0.1

    def __post_init__(self) -> None:
        check_number("r_max of layer_budgets", self.r_max, 1)
        check_number("r_min of layer_budgets", self.r_min, 0, 1)

    def shares(self, judged: Sequence[Judged]) -> Tensor:
        """``[B, L]`` >= 0, of any sum."""
        raise TypeError(f"{type(self).__name__} gives no shares")

    def budgets(self, judged: Sequence[Judged], requests: Sequence[Request | None]) -> Tensor:
        """Rows by the shares, within the bounds."""
        return _within(self.shares(judged).double(), judged, requests, self.r_min, self.r_max)


@dataclasses.dataclass(frozen=True)
class Dynamic(Shared):
    """DynamicKV (arXiv 2412.14838): layers share the budget by how many of the cache's costliest units they hold."""

    def shares(self, judged: Sequence[Judged]) -> Tensor:
        """Counts of the best units of all layers."""
        given = _surplus(judged).clamp(min=0)
        gone = _parted(cheapest(_joined(j.cost for j in judged), _joined(j.free for j in judged), given), judged)
        return torch.stack([(j.free & ~g).sum((1, 2)) for j, g in zip(judged, gone, strict=True)], 1)


@dataclasses.dataclass(frozen=True)
class Variance(Shared):
    """D2O's layer rule (arXiv 2406.13035): layers with dense, even attention keep more.

    The spread of the judged costs over a head's free units, min-max normalised over the heads of a layer and averaged,
    is ``f``; layers share by ``softmax(-f)``. The released code leaves the first two layers and the last whole on top
    of its budget, and bounds layers by 1 % and 100 % of their rows; here all layers share one budget (r_min, r_max).
    """

    def shares(self, judged: Sequence[Judged]) -> Tensor:
        """``softmax(-f)``."""
        return (-torch.stack([_normalised_variance(j.cost, j.free) for j in judged], 1)).softmax(1)


@dataclasses.dataclass(frozen=True)
class Global(LayerBudgets):
    """One threshold over all layers and heads (KVzip, arXiv 2505.23416): the cache's cheapest units go.

    Args:
        floor: share of the even budget that is safe in every head.
        rounding: "rows" (layers x heads x rows per head are kept) or "total" (the ratio is taken of all rows at once,
            as kvpress does; up to one row per head more).
    """

    deferred: ClassVar[bool] = True
    joint: ClassVar[bool] = True

    floor: float = 0.0
    rounding: str = "rows"

    def __post_init__(self) -> None:
        check_number("floor of layer_budgets='global'", self.floor, 0, 1)
        check_choice("rounding of layer_budgets='global'", self.rounding, ROUNDINGS)

    @property
    def exact(self) -> bool:
        return self.rounding == "rows"

    def split(self, judged: Sequence[Judged], requests: Sequence[Request | None], heads: HeadBudgets) -> list[Tensor]:
        """The cheapest units of the whole cache."""
        given = _surplus(judged)
        if self.rounding == "total":
            given = _surplus_of_total(judged, requests, given)
        free = _joined(j.free & ~j.safe(self.floor) for j in judged)
        return _parted(cheapest(_joined(j.cost for j in judged), free, given.clamp(min=0)), judged)


LAYER_BUDGETS: Mapping[str, type[LayerBudgets]] = {
    "uniform": LayerBudgets, "pyramid": Pyramid, "dynamic": Dynamic, "variance": Variance, "global": Global,
}  # fmt: skip


def _surplus(judged: Sequence[Judged]) -> Tensor:
    """``[B]``: rows of the whole cache above its budget."""
    return torch.stack([j.surplus for j in judged]).sum(0)


def _surplus_of_total(judged: Sequence[Judged], requests: Sequence[Request | None], even: Tensor) -> Tensor:
    """The same where a ratio is asked for, the share being taken of all rows of the cache at once."""
    held = torch.stack([j.lengths.sum(1) for j in judged]).sum(0).tolist()
    heads = len(judged) * judged[0].lengths.shape[1]
    out = even.tolist()
    for row, request in enumerate(requests):
        if request is not None and request.ratio is not None:
            total = heads * request.tokens
            out[row] = held[row] - total + int(total * (1 - request.ratio))
    return torch.tensor(out, device=even.device)


def _joined(parts: Iterable[Tensor]) -> Tensor:
    """Units of all layers side by side, ``[B, H_kv, sum U]``."""
    return torch.cat(list(parts), -1)


def _parted(joined: Tensor, judged: Sequence[Judged]) -> list[Tensor]:
    """The other way round."""
    return list(joined.split([j.free.shape[-1] for j in judged], -1))


def _within(
    share: Tensor, judged: Sequence[Judged], requests: Sequence[Request | None], r_min: float, r_max: float
) -> Tensor:
    """``[B, L]`` rows per head that sum to L times the request, each layer between ``r_min`` and ``r_max`` times the
    mean of what is not protected, and no more than it holds."""
    held = torch.stack([j.free.sum(-1).amax(-1) for j in judged], 1)
    fixed = torch.stack([j.bound.amax(-1) for j in judged], 1)
    rows = torch.tensor([0 if r is None else r.rows for r in requests], device=share.device)[:, None]
    mean = (rows - fixed).clamp(min=0)
    most = (mean.double() * r_max).floor().long().minimum(held)
    least = (mean.double() * r_min).floor().long().minimum(most)
    return fixed + apportion(share, mean.sum(1), least, most)


def _normalised_variance(cost: Tensor, free: Tensor) -> Tensor:
    """``[B]``: variance of the free units of each head, min-max normalised over the heads, averaged over them."""
    count = free.sum(-1).clamp(min=1)
    known = torch.where(free, cost.double(), 0)
    mean = known.sum(-1) / count
    variance = torch.where(free, (known - mean[..., None]).square(), 0).sum(-1) / count
    low, high = variance.amin(-1, keepdim=True), variance.amax(-1, keepdim=True)
    return torch.where(high > low, (variance - low) / (high - low).clamp(min=1e-300), 0).mean(-1)
