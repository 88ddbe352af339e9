"""CompactionPlan: where each row goes, and the one executor that carries it out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asymkv.budgets import capacity_for
from asymkv.storage import RaggedStorage
from asymkv.view import RowView

# How a statistic of a merged row follows from its members'.
STATISTIC_REDUCE = "sum"


@dataclass(frozen=True)
class CompactionPlan:
    """Destination of every row of one layer.

    Args:
        destination: ``[B, H_kv, T]`` int64: index (in the same head) of a row of the group that this row joins; its
            own index = it stays by itself; -1 = it is dropped, with its cardinality. Rows with one destination become
            one row, at the position of its last member.
        key_weight: weight of a row's key in its group, ``[B, H_kv, T]`` or, per pre-RoPE dimension,
            ``[B, H_kv, T, D]``, >= 0, normalised over the group here; None = cardinality. Where a group's weights
            sum to zero, cardinality decides.
    """

    destination: Tensor
    key_weight: Tensor | None = None

    def validate(self, view: RowView) -> None:
        """Raises ValueError for a plan that does not fit the rows."""
        if self.destination.shape != view.valid.shape:
            raise ValueError(f"destination must be {tuple(view.valid.shape)}; found {tuple(self.destination.shape)}")
        width = view.valid.shape[-1]
        kept = (self.destination >= 0) & view.valid
        if bool((self.destination[view.valid] >= width).any()) or bool((self.destination[view.valid] < -1).any()):
            raise ValueError(f"destination must lie in [-1, {width}); found up to {self.destination.max().item()}")
        target = self.destination.clamp(min=0)
        fixed = target.gather(-1, target) == target
        if not bool((fixed & kept.gather(-1, target))[kept].all()):
            raise ValueError("a row's destination must itself be kept and its own destination")
        if self.key_weight is not None and bool((self.key_weight[view.valid] < 0).any()):
            raise ValueError(f"key_weight must be >= 0; found {self.key_weight.min().item()}")


def keep_rows(keep: Tensor) -> CompactionPlan:
    """A plan that drops every row with ``keep [B, H_kv, T]`` False."""
    index = torch.arange(keep.shape[-1], device=keep.device).expand_as(keep)
    return CompactionPlan(torch.where(keep, index, -1))


def contract_pairs(pairs: Tensor) -> Tensor:
    """Destinations that contract adjacent pairs; a run of pairs becomes one row, so that no row is lost.

    Args:
        pairs: ``[B, H_kv, T - 1]`` bool: rows j and j + 1 belong together.

    Returns:
        ``[B, H_kv, T]`` int64: the last row of each run.
    """
    last = torch.nn.functional.pad(~pairs, (0, 1), value=True)
    index = torch.arange(last.shape[-1], device=pairs.device).expand_as(last)
    ends = torch.where(last, index, last.shape[-1])
    return ends.flip(-1).cummin(-1).values.flip(-1)


def rotary_positions(policy: str, positions: Tensor, cardinality: Tensor) -> Tensor:
    """Positions that keys are rotated to, ``[N, T]``, under a position policy.

    "original": the row's position; "compact": its rank in the head; "cardinality": running sum of n, minus one.
    """
    if policy == "original":
        return positions.long()
    if policy == "compact":
        return torch.arange(positions.shape[-1], device=positions.device).expand_as(positions)
    return cardinality.long().cumsum(-1) - 1


def execute(plan: CompactionPlan, view: RowView, storage: RaggedStorage, policy: str) -> RaggedStorage:
    """Carries a plan out: gather, drop, weighted merge, re-packing with fresh slack.

    Keys merge in pre-RoPE coordinates and are rotated to the merged row's position; values merge by cardinality;
    cardinalities add; statistics add. Rows that merge with nothing keep their bits (position policies may rotate
    their keys).

    Args:
        plan: the decision.
        view: the rows, dense.
        storage: where they are now; its columns are the schema of the result.
        policy: position policy.

    Returns:
        New storage; the old one is untouched.
    """
    plan.validate(view)
    heads, width = storage.heads, view.valid.shape[-1]
    destination, valid = plan.destination.reshape(heads, width), view.valid.reshape(heads, width)
    kept = valid & (destination >= 0)
    group, last = _groups(destination, kept)
    length = last.sum(-1).tolist()
    packed = storage.like([capacity_for(n) for n in length])
    target = packed.table("start")[:, None] + last.cumsum(-1) - 1  # flat row of each group's last member
    columns = _dense_columns(view, storage, heads, width)
    for name, rows in columns.items():
        packed.columns[name][target[last]] = rows[last].to(packed.columns[name].dtype)
    packed._set_length(length)
    size = torch.zeros_like(group).scatter_add_(1, group, kept.long()).gather(1, group)
    merging = kept & (size > 1)
    merged_keys = None
    if bool(merging.any()):
        merged_keys = _merge(plan, view, columns, merging, target.gather(1, group), packed)
    packed.merged = storage.merged or bool((packed.columns["cardinality"] > 1).any())
    _write_positions(view, policy, packed, target, last, merged_keys)
    return packed


def _groups(destination: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Per row the index of its group's last member ``[N, T]``, and whether the row is that member."""
    index = torch.arange(destination.shape[-1], device=destination.device).expand_as(destination)
    target = destination.clamp(min=0)
    newest = torch.full_like(index, -1).scatter_reduce_(1, target, torch.where(kept, index, -1), "amax")
    group = torch.where(kept, newest.gather(1, target), index)
    return group, kept & (group == index)


def _dense_columns(view: RowView, storage: RaggedStorage, heads: int, width: int) -> dict[str, Tensor]:
    """Columns as ``[N, T, ...]``, those a method may have edited from the view."""
    edited = {"keys": view.keys, "values": view.values, "cardinality": view.cardinality, "position": view.positions}
    named = {**{n: storage.dense(n) for n in storage.columns if n not in edited}, **edited, **view.statistics}
    flat = {n: rows.reshape(heads, width, *storage.spec[n][0]) for n, rows in named.items()}
    flat["log_n"] = flat["cardinality"].float().log()
    return flat


def _merge(
    plan: CompactionPlan, view: RowView, columns: dict[str, Tensor], merging: Tensor, row: Tensor, packed: RaggedStorage
) -> tuple[Tensor, Tensor]:
    """Writes values, cardinalities and statistics of merged rows.

    Returns:
        Their flat rows ``[G]`` and their keys in pre-RoPE coordinates ``[G, D]``.
    """
    rows, member = row[merging].unique(return_inverse=True)
    count = len(rows)

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(count, *x.shape[1:]).index_add_(0, member, x)

    compute = torch.promote_types(view.keys.dtype, torch.float32)
    n = columns["cardinality"][merging].to(compute)
    sum_n = total(n)
    packed.columns["values"][rows] = (
        total(n[:, None] * columns["values"][merging].to(compute)) / sum_n[:, None]
    ).to(view.values.dtype)
    packed.columns["cardinality"][rows] = total(columns["cardinality"][merging].long()).int()
    packed.columns["log_n"][rows] = sum_n.log().float()
    for name in view.statistics:
        packed.columns[name][rows] = total(columns[name][merging].to(compute)).to(packed.columns[name].dtype)
    keys = view.unrotate(view.keys).reshape(*merging.shape, -1)[merging]
    by_count = total(n[:, None] * keys) / sum_n[:, None]
    if plan.key_weight is None:
        return rows, by_count
    weight = plan.key_weight.reshape(*merging.shape, -1)[merging].to(compute)
    # Normalised before summing: squared gradients may be as small as 1e-30.
    top = torch.zeros(count, weight.shape[1], dtype=compute, device=weight.device)
    top.scatter_reduce_(0, member[:, None].expand_as(weight), weight, "amax")
    weight = weight / torch.where(top > 0, top, 1)[member]
    weighted = total(weight * keys) / total(weight).clamp(min=torch.finfo(compute).tiny)
    return rows, torch.where(top > 0, weighted, by_count)


def _write_positions(
    view: RowView, policy: str, packed: RaggedStorage, target: Tensor, last: Tensor, merged: tuple | None
) -> None:
    """Rotates keys to where the policy puts their rows now."""
    if policy == "original" and merged is None:
        return
    now = rotary_positions(policy, packed.dense("position"), packed.dense("cardinality"))
    valid = packed.valid()
    inside = torch.ones_like(now, dtype=torch.bool) if valid is None else valid
    index = packed.index()[inside]
    keys = packed.columns["keys"]
    flat = torch.zeros(keys.shape[0], dtype=torch.int64, device=keys.device)
    flat[index] = now[inside]
    if policy != "original":
        before = torch.zeros_like(flat)
        before[target[last]] = view.rotary_positions.reshape(last.shape)[last]
        moved = (flat != before).nonzero().squeeze(-1)
        keys[moved] = _rotate(view, keys[moved], flat[moved] - before[moved])
    if merged is not None:
        rows, pre_rope = merged
        keys[rows] = _rotate(view, pre_rope, flat[rows]).to(keys.dtype)


def _rotate(view: RowView, rows: Tensor, shift: Tensor) -> Tensor:
    """Rotates keys ``[M, D]`` forward by ``shift [M]``, in their own dtype."""
    return view.rope.rotate(rows, shift).to(rows.dtype)
