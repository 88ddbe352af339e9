"""k-means over a head's rows: seeds, assignments, weighted means. Legend: E points, J centroids of a head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asymkv.methods.merging import leaving_rows, take, wide
from asymkv.observations import block_elements
from asymkv.view import RowView, lowest

# Column of every row: tokens folded into it (0 = an exact token), and their mean position.
FOLDED = "folded"
# Roundings that two distances may differ by and be one.
ROUNDING = 32
# Column of every row: importance folded into it.
WORTH = "worth"


def spread_seeds(importance: Tensor, rows: Tensor, count: Tensor) -> Tensor:
    """Marks ``count [B, H_kv]`` of the marked ``rows [B, H_kv, T]``, evenly spaced in their order of importance."""
    worth = torch.where(rows, importance.nan_to_num(nan=0.0), -torch.inf)
    order = worth.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    total, count = rows.sum(-1, keepdim=True).clamp(min=1), count[..., None]
    return ((rank + 1) * count // total > rank * count // total) & rows


def farthest_seeds(keys: Tensor, rows: Tensor, bank: Tensor, count: Tensor) -> Tensor:
    """Marks the ``count [B, H_kv]`` of the marked rows whose keys are farthest from any row of the ``bank``."""
    centers, present = leaving_rows(bank)
    distance, _ = nearest(keys, take(keys, centers), present)
    return lowest(-distance, count, rows)


def nearest(points: Tensor, centers: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance to, and index of, the nearest present centroid, in blocks of points.

    Of centroids that are equally near but for rounding the first: repeated tokens have equal keys before RoPE in the
    first layer, and what a row is batched with must not choose between them.

    Args:
        points: ``[B, H_kv, E, D]``.
        centers: ``[B, H_kv, J, D]``, ``present [B, H_kv, J]`` bool.

    Returns:
        ``[B, H_kv, E]`` each; inf and 0 where no centroid is present.
    """
    points, centers = wide(points), wide(centers)
    size = max(1, block_elements(points.device) // max(present.numel(), 1))
    norm, own = centers.square().sum(-1), points.square().sum(-1)
    length = norm.masked_fill(~present, torch.inf)[:, :, None]
    largest = torch.where(present, norm, 0).amax(-1, keepdim=True)
    near = ROUNDING * torch.finfo(own.dtype).eps * (own + largest)
    number, found = torch.arange(centers.shape[2], device=centers.device), []
    for block, slack in zip(points.split(size, dim=2), near.split(size, dim=2), strict=True):
        far = torch.baddbmm(length.flatten(0, 1), block.flatten(0, 1), centers.flatten(0, 1).mT, alpha=-2)
        least = far.amin(-1)
        among = far <= (least + slack.flatten(0, 1))[..., None]
        found.append((least, torch.where(among, number, centers.shape[2] - 1).amin(-1)))
    least, index = (torch.cat(x, dim=-1).view(points.shape[:3]) for x in zip(*found, strict=True))
    return (least + own).clamp(min=0), index


@dataclass
class Clusters:
    """Points and the centroid that each belongs to.

    Args:
        index: ``[B, H_kv, E]`` rows of the points, ascending where present.
        present: ``[B, H_kv, E]`` bool.
        assign: ``[B, H_kv, E]``, the centroid 0 .. J - 1 of each point.
        number: J.
    """

    index: Tensor
    present: Tensor
    assign: Tensor
    number: int

    @classmethod
    @torch.no_grad()
    def of(cls, keys: Tensor, points: Tensor, centers: Tensor, tokens: Tensor, iterations: int) -> Clusters:
        """Assigns points to the nearest centroid by their keys; a centroid is a point too, and at first its own.

        Args:
            keys: ``[B, H_kv, T, D]`` in the coordinates of the distance.
            points: ``[B, H_kv, T]`` bool.
            centers: ``[B, H_kv, T]`` bool, those of the points that centroids start from.
            tokens: ``[B, H_kv, T]``, weight of a point in a mean.
            iterations: assignments; centroids move to the mean of their points in between.
        """
        index, present = leaving_rows(points)
        leads = centers.gather(2, index) & present
        lead, known = leaving_rows(leads)
        x = wide(take(keys, index))
        at = take(x, lead)
        assign = torch.where(leads, leads.cumsum(-1) - 1, nearest(x, at, known)[1])
        found = cls(index, present, assign, lead.shape[-1])
        weight = tokens.gather(2, index).to(x.dtype)
        for _ in range(iterations - 1):
            held = found.total(weight) > 0
            at = torch.where(held[..., None], found.means(x, weight), at)
            found.assign = nearest(x, at, known)[1]
        return found

    def total(self, amount: Tensor) -> Tensor:
        """Sum of ``amount [B, H_kv, E]`` over the points of each centroid, ``[B, H_kv, J]``."""
        counted = torch.where(self.present, amount, 0)
        out = counted.new_zeros(*counted.shape[:2], self.number)
        return out.scatter_add(2, self.assign, counted)

    def means(self, x: Tensor, weight: Tensor) -> Tensor:
        """Weighted means of ``x [B, H_kv, E, D]`` over the points of each centroid, ``[B, H_kv, J, D]``."""
        weighted = torch.where(self.present, weight, 0)[..., None] * x
        out = x.new_zeros(*x.shape[:2], self.number, x.shape[-1])
        summed = out.scatter_add(2, self.assign[..., None].expand_as(weighted), weighted)
        total = self.total(weight)
        return summed / torch.where(total > 0, total, 1)[..., None]

    def spread(self, x: Tensor) -> Tensor:
        """What each point's centroid has: ``[B, H_kv, J]`` or ``[B, H_kv, J, D]`` to ``[B, H_kv, E, ...]``."""
        return x.gather(2, self.assign) if x.ndim == 3 else take(x, self.assign)

    def slots(self) -> Tensor:
        """``[B, H_kv, E]`` bool: the newest point of each centroid, where its row will stand."""
        out = torch.full((*self.index.shape[:2], self.number), -1, dtype=torch.long, device=self.index.device)
        last = out.scatter_reduce(2, self.assign, torch.where(self.present, self.index, -1), "amax")
        return (self.spread(last) == self.index) & self.present

    def put(self, rows: Tensor, new: Tensor, where: Tensor) -> Tensor:
        """``rows [B, H_kv, T, ...]`` with ``new [B, H_kv, E, ...]`` at those points that are marked."""
        return put(rows, self.index, new, where)


def put(rows: Tensor, index: Tensor, new: Tensor, where: Tensor) -> Tensor:
    """``rows [B, H_kv, T, ...]`` with ``new [B, H_kv, E, ...]`` at the marked ones of ``index [B, H_kv or 1, E]``."""
    index = index.expand(rows.shape[0], rows.shape[1], -1)
    if rows.ndim == 4:
        index, where = (a[..., None].expand(*a.shape, rows.shape[-1]) for a in (index, where))
    return rows.scatter(2, index, torch.where(where, new.to(rows.dtype), rows.gather(2, index)))


def folded_of(view: RowView) -> Tensor:
    """``[B, H_kv, T, 2]`` fp32: the column of folded tokens and their mean position; zeros before there is one."""
    found = view.statistics.get(FOLDED)
    return found if found is not None else torch.zeros(*view.valid.shape, 2, device=view.valid.device)


def worth_of(view: RowView) -> Tensor:
    """``[B, H_kv, T]`` fp32: the column of folded importance; zeros before there is one."""
    found = view.statistics.get(WORTH)
    return found if found is not None else torch.zeros(view.valid.shape, device=view.valid.device)
