"""What methods share that merge rows: each leaving row into one that stays, or runs of neighbours into their last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asymkv.observations import block_elements
from asymkv.view import RowView

MERGED_KEYS = ("pre_rope", "post_rope")
MERGED_POSITIONS = ("last", "mean")
TINY = 1e-6  # norms below it count as it, so that a zero row has similarity 0


def wide(rows: Tensor) -> Tensor:
    """Rows in the dtype that merges are computed in: fp32, or fp64 for fp64 rows."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def leaving_rows(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The marked rows of each head, by ascending position, as a narrow table.

    Args:
        chosen: ``[B, H_kv, T]`` bool.

    Returns:
        ``index [B, H_kv, E]`` into T, E the most that a head loses (at least 1), and ``present [B, H_kv, E]`` bool.
    """
    count = chosen.sum(-1, keepdim=True)
    most = max(int(count.max()), 1)
    order = (~chosen).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
    return order, torch.arange(most, device=chosen.device) < count


def take(rows: Tensor, index: Tensor) -> Tensor:
    """``rows [B, H_kv, T, D]`` at ``index [B, H_kv, E]``: ``[B, H_kv, E, D]``."""
    return rows.gather(2, index[..., None].expand(*index.shape, rows.shape[-1]))


def nearest_row(keys: Tensor, index: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The allowed row whose key is most similar to each leaving row's, in blocks of leaving rows.

    Args:
        keys: ``[B, H_kv, T, D]``.
        index: ``[B, H_kv, E]`` leaving rows.
        allowed: ``[B, H_kv, T]`` bool, rows that may be merged into.

    Returns:
        ``similarity [B, H_kv, E]`` (cosine; -inf where a head has no allowed row) and ``target [B, H_kv, E]``, ties
        to the lower position.
    """
    unit = torch.nn.functional.normalize(wide(keys), dim=-1, eps=TINY)
    size = max(1, block_elements(keys.device) // allowed.numel())
    best = []
    for block in index.split(size, dim=-1):
        cosine = take(unit, block) @ unit.transpose(-1, -2)
        best.append(cosine.masked_fill_(~allowed[:, :, None], -torch.inf).max(dim=-1))
    return torch.cat([b.values for b in best], dim=-1), torch.cat([b.indices for b in best], dim=-1)


@dataclass
class Fold:
    """Kept rows become ``(base x_c + sum of weight x_e) / total`` over the rows e that join them.

    Args:
        index: ``[B, H_kv, E]`` leaving rows.
        target: ``[B, H_kv, E]`` the row that each joins.
        merged: ``[B, H_kv, E]`` bool: False = dropped, whatever its weight.
        weight: ``[B, H_kv, E]``.
        base: ``[B, H_kv, T]``.
        total: ``[B, H_kv, T]``; None = ``base`` and the weights that joined, so that the result is convex.
    """

    index: Tensor
    target: Tensor
    merged: Tensor
    weight: Tensor
    base: Tensor
    total: Tensor | None = None

    def __post_init__(self) -> None:
        self.weight = torch.where(self.merged, self.weight, 0)

    def joined(self, amount: Tensor) -> Tensor:
        """Sum of ``amount [B, H_kv, E]`` over the rows that join each row, ``[B, H_kv, T]``."""
        counted = torch.where(self.merged, amount, 0)
        return counted.new_zeros(self.base.shape).scatter_add_(2, self.target, counted)

    def apply(self, rows: Tensor) -> Tensor:
        """New ``rows [B, H_kv, T, D]``; those that nothing joins keep their bits."""
        old = wide(rows)
        leaving = take(old, self.index) * self.weight[..., None]
        added = (self.base[..., None] * old).scatter_add_(2, self.target[..., None].expand_as(leaving), leaving)
        total = self.base + self.joined(self.weight) if self.total is None else self.total
        touched = self.joined(self.merged.to(self.base.dtype)) > 0
        return torch.where(touched[..., None], (added / total[..., None]).to(rows.dtype), rows)

    def cardinality(self, n: Tensor) -> Tensor:
        """``n [B, H_kv, T]`` int32 with what joins each row added to it."""
        return n + self.joined(n.gather(2, self.index)).to(n.dtype)


def group_sums(rows: Tensor, destination: Tensor) -> Tensor:
    """``rows [B, H_kv, T, D]``, each replaced by the sum of its group, ``destination [B, H_kv, T]``."""
    index = destination.clamp(min=0)[..., None].expand_as(rows)
    return torch.zeros_like(rows).scatter_add_(2, index, rows).gather(2, index)


def group_shares(weight: Tensor, destination: Tensor) -> Tensor:
    """Weights ``[B, H_kv, T]`` or ``[B, H_kv, T, D]`` over their groups' sums, ``[B, H_kv, T, 1 or D]``.

    The members of a group without weight have equal shares.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    weight = weight if weight.dim() > destination.dim() else weight[..., None]
    total = group_sums(weight, destination)
    return torch.where(total > 0, weight / total, 1 / group_sums(torch.ones_like(weight), destination))


def shared(destination: Tensor) -> Tensor:
    """``[B, H_kv, T]`` bool: rows whose destination is that of another row too."""
    members = torch.zeros_like(destination).scatter_add_(-1, destination, torch.ones_like(destination))
    return members.gather(-1, destination) > 1


def merge_in_place(
    view: RowView, destination: Tensor, weight: Tensor | None, *, keys: str = "pre_rope", position: str = "last"
) -> None:
    """Puts each run's means into its last row of a view, for merges that :func:`asymkv.plan.execute` does not know.

    Values merge by cardinality; cardinalities and statistics add, as there.

    Args:
        view: the rows; changed.
        destination: ``[B, H_kv, T]``, of :func:`asymkv.plan.contract_pairs`.
        weight: of the keys, ``[B, H_kv, T]`` or, per dimension before RoPE, ``[B, H_kv, T, D]``; None = cardinality.
        keys: one of ``MERGED_KEYS``: average them before RoPE, turned to the merged row's position, or as they are.
        position: one of ``MERGED_POSITIONS``: of the last member, or the mean by cardinality.
    """
    n = view.cardinality.double()
    total, share = group_sums(n[..., None], destination), group_shares(n, destination)
    of_keys = share if weight is None else group_shares(weight.double(), destination)
    touched = shared(destination)[..., None]
    if position == "mean":
        at = group_sums(share * view.positions[..., None], destination)[..., 0].round().int()
        view.positions = torch.where(touched[..., 0], at, view.positions)
    if keys == "post_rope":
        merged = group_sums(of_keys * view.keys, destination)
    else:
        means = group_sums(of_keys * view.unrotate(view.keys), destination)
        merged = view.rope.rotate(means.to(view.keys.dtype), view.positions.long())
    values = group_sums(share * view.values, destination)
    view.keys = torch.where(touched, merged.to(view.keys.dtype), view.keys)
    view.values = torch.where(touched, values.to(view.values.dtype), view.values)
    view.cardinality = torch.where(touched[..., 0], total[..., 0].int(), view.cardinality)
    for name, column in view.statistics.items():
        rows = column.reshape(*destination.shape, -1)
        sums = group_sums(wide(rows), destination)
        view.statistics[name] = torch.where(touched, sums.to(rows.dtype), rows).view_as(column)
