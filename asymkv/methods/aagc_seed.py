"""The public code's rule of AAGC, to be reported beside the method.

One score for the whole model keeps the same rows in every head; all kept rows of a layer's heads, centroids included,
then move K centroids by eta, and these replace the cache of every head alike. Where that code shares one set of
centroids between layers and sequences, fed one after the other, a layer of a sequence has its own here: what a
sequence holds must not depend on its batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from asymkv.methods.clustering import FOLDED, Clusters, folded_of, nearest, put
from asymkv.methods.merging import leaving_rows, take, wide
from asymkv.plan import CompactionPlan, keep_rows
from asymkv.view import RowView, lowest

if TYPE_CHECKING:
    from asymkv.config import CompressionConfig
    from asymkv.methods.aagc import AAGC


def check(method: AAGC, config: CompressionConfig) -> None:
    """Raises ValueError for settings that the public code does not have."""
    wanted = {"sink_size": 0, "window_size": 0, "position_policy": "original"}
    found = {"sink_size": config.sink_size, "window_size": config.window_size, "position_policy": config.positions}
    wanted |= {"rope_mode": "post", "kmeans_iters": 1}
    found |= {"rope_mode": method.rope_mode, "kmeans_iters": method.kmeans_iters}
    for name in ("evict_centroids", "exposure_fix", "importance"):
        wanted[name], found[name] = False, getattr(method, name)
    other = {name: value for name, value in found.items() if value != wanted[name]}
    if method.recent_size:
        other["recent_size"], wanted["recent_size"] = method.recent_size, None
    if other:
        raise ValueError(f"seed_compat=True is the public code's rule: it needs {({n: wanted[n] for n in other})}, "
                         f"found {other}")


def carry_out(method: AAGC, view: RowView, chosen: Tensor, acting: Tensor, clusters: Tensor) -> CompactionPlan:
    """Replaces the kept rows of the ``acting [B, H_kv, 1]`` heads by the layer's centroids; others lose ``chosen``.

    Args:
        chosen: ``[B, H_kv, T]`` bool, rows that are dropped, the same in every head.
        clusters: ``[B, H_kv]`` K.
    """
    taken = view.valid & ~chosen
    slots, owner = draw(method.seed, view, folded_of(view)[..., 0] > 0, taken & acting, clusters)
    if not bool(slots.any()):
        return keep_rows(taken)
    index, present = leaving_rows(slots[:, :1])  # heads agree
    everywhere = (present & acting[:, :1]).expand(-1, slots.shape[1], -1)
    led = {name: take(getattr(view, name).gather(1, owner.expand_as(view.keys)), index) for name in ("keys", "values")}
    for name, moved in move(view, led, taken, present, method.kmeans_learning_rate).items():
        rows = getattr(view, name)
        setattr(view, name, put(rows, index, moved.expand(-1, rows.shape[1], -1, -1), everywhere))
    mark = torch.stack([view.cardinality, view.positions], dim=-1).float()
    view.statistics[FOLDED] = torch.where(slots[..., None] & acting[..., None], mark, folded_of(view))
    return keep_rows(torch.where(acting, slots, taken))


def draw(seed: int, view: RowView, bank: Tensor, taken: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor]:
    """The rows where centroids stand, and whose head's row each starts from.

    Args:
        bank: ``[B, H_kv, T]`` bool, centroids that there are; where there are none, they are drawn from ``taken``.

    Returns:
        ``[B, H_kv, T]`` bool, and ``[B, 1, T, 1]``.
    """
    # By position, so that it does not depend on the batch, and is the same in every layer.
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(int(view.tokens.max()), 1 + bank.shape[1], generator=generator).to(bank.device)
    noise = noise[view.positions.long().clamp(0, noise.shape[0] - 1)]  # [B, H_kv, T, 1 + H_kv]
    bank = bank & view.valid
    first = ~bank.any(-1, keepdim=True)
    slots = torch.where(first, lowest(noise[..., 0], clusters, taken), bank)
    owner = noise[:, 0, :, 1:].argmax(-1)
    return slots, torch.where(first[:, 0], owner, 0)[:, None, :, None]


def move(view: RowView, led: dict[str, Tensor], taken: Tensor, present: Tensor, rate: float) -> dict[str, Tensor]:
    """Centroids ``[B, 1, K, D]`` after one step: ``(1 - eta) c + eta mean`` of the taken rows of all heads.

    Args:
        led: centroids before it, by column.
        taken: ``[B, H_kv, T]`` bool.
        present: ``[B, 1, K]`` bool.
    """
    batch = taken.shape[0]
    index, known = leaving_rows(taken.view(batch, 1, -1))
    points = {name: wide(take(getattr(view, name).reshape(batch, 1, taken[0].numel(), -1), index)) for name in led}
    _, assign = nearest(points["keys"].detach(), led["keys"].detach(), present)
    clusters = Clusters(index, known, assign, present.shape[-1])
    alone = torch.ones_like(points["keys"][..., 0])
    held = (clusters.total(alone) > 0)[..., None]
    out = {}
    for name, start in led.items():
        old = wide(start)
        out[name] = torch.where(held, (1 - rate) * old + rate * clusters.means(points[name], alone), old)
    return out
