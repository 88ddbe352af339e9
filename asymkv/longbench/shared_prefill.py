"""Arms of one row that share a prefill, where their settings allow it (``asymkv.branches``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from asymkv.branches import prefill_key, prefill_many
from asymkv.longbench.arms import Arm, BaseArm
from asymkv.longbench.measure import Subject
from asymkv.longbench.models import input_device
from asymkv.longbench.retention import Prefix


def share_groups(cells: Sequence[BaseArm]) -> Iterator[list[BaseArm]]:
    """Cells that one prefill serves, in the order of their first ones; all others, and the full cache, alone."""
    groups: dict[object, list[BaseArm]] = {}
    for cell in cells:
        key = prefill_key(cell.config) if isinstance(cell, Arm) and cell.compresses else None
        groups.setdefault(id(cell) if key is None else key, []).append(cell)
    yield from groups.values()


def prefill_together(subject: Subject, cells: Sequence[BaseArm], ids: Sequence[int]) -> list[Prefix]:
    """The compressed prefix of each cell of a group, from one prefill of ``ids``; the model is not patched."""
    arms = [cell for cell in cells if isinstance(cell, Arm)]
    batch = torch.tensor([list(ids)], device=input_device(subject.model))
    with arms[0].applied(subject.model):
        caches, logits = prefill_many(subject.model, [arm.config for arm in arms], batch)
    return [Prefix(cache, logits[0]) for cache in caches]
