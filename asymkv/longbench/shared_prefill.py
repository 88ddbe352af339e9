"""Arms of one row that share a prefill, where their settings allow it (``asymkv.branches``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from asymkv.branches import prefill_key, prefill_many
from asymkv.checks import PromptRefusedError
from asymkv.longbench.arms import Arm, BaseArm, full_cache_bytes
from asymkv.longbench.measure import Subject
from asymkv.longbench.models import input_device
from asymkv.longbench.press_arms import PressArm
from asymkv.longbench.retention import Prefix


def share_groups(cells: Sequence[BaseArm], tokens: int) -> Iterator[list[BaseArm]]:
    """Cells that one prefill of so many tokens serves, in the order of their first ones.

    All others, and the full cache, are alone. So are those that refuse such a prompt: they are refused in their turn,
    and a group loses nobody else.
    """
    groups: dict[object, list[BaseArm]] = {}
    for cell in cells:
        key = _key(cell, tokens)
        groups.setdefault(id(cell) if key is None else key, []).append(cell)
    yield from groups.values()


def _key(cell: BaseArm, tokens: int) -> str | None:
    if isinstance(cell, PressArm):
        return cell.prefill_key()
    return prefill_key(cell.config) if isinstance(cell, Arm) and _shares(cell, tokens) else None


def _shares(cell: Arm, tokens: int) -> bool:
    """Whether an arm compresses a prompt of so many tokens, and does not refuse it."""
    try:
        cell.config.options.check_prompt(tokens, cell.config)
    except PromptRefusedError:
        return False
    return cell.compresses


def prefill_together(subject: Subject, cells: Sequence[BaseArm], ids: Sequence[int]) -> list[Prefix | None]:
    """The compressed prefix of each cell of a group, from one prefill of ``ids``; the model is not patched.

    None: that cell has to be run alone.
    """
    batch = torch.tensor([list(ids)], device=input_device(subject.model))
    presses = [cell for cell in cells if isinstance(cell, PressArm)]
    if presses:
        return _press_together(subject, presses, batch)
    arms = [cell for cell in cells if isinstance(cell, Arm)]
    with arms[0].applied(subject.model):
        caches, logits = prefill_many(subject.model, [arm.config for arm in arms], batch)
    return [Prefix(cache, logits[0]) for cache in caches]


def _press_together(subject: Subject, cells: Sequence[PressArm], batch: Tensor) -> list[Prefix | None]:
    from asymkv.longbench.presses import press_together

    token_bytes = full_cache_bytes(subject.model, 1)
    shares = [cell.share(batch.shape[1], token_bytes) for cell in cells]
    specs = [cell.press for cell in cells if cell.press is not None]
    caches, logits = press_together(subject.model, specs, shares, batch)
    return [None if cache is None else Prefix(cache, logits) for cache in caches]
