"""One chunk of new tokens on its way through the layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from asymkv.budgets.heads import Rows
from asymkv.budgets.layers import Request

if TYPE_CHECKING:
    from asymkv.narrowing import Narrowing
    from asymkv.reconstruction import Replay


@dataclass
class Step:
    """One chunk of new tokens on its way through the layers; the first ``counts[b]`` columns of row b are tokens.

    Args:
        counts: tokens per row of the batch.
        positions: ``[B, t]`` own-token positions (past the end: of no token).
        tables: ``cos, sin``, ``[B, t, D]``.
        limits: rows per head, or of each head, to compact each layer to, per row of the batch; None = no compaction.
        requests: what the limits come from.
        due: per row of the batch, whether layers must judge their rows for a compaction after the forward.
        prompt: whether this is a prefill chunk (else one decode token per row).
        tape: collects what a backward pass needs; None = none will come.
        store: whether the chunk's rows are appended (False: they are only looked at).
        compacted: set when some layer was compacted.
        hold: no layer is compacted yet: what judges its rows comes after the forward.
        replay: the tokens rebuild stored ones (``asymkv.reconstruction``): nothing is appended.
        arrived: tokens per row with those whose hidden states were dropped before this layer; None = none was.
        narrowing: drops hidden states between layers (``asymkv.narrowing``).
    """

    counts: list[int]
    positions: Tensor
    tables: tuple[Tensor, Tensor]
    limits: list[list[Rows | None]]
    requests: list[Request | None]
    due: list[bool]
    prompt: bool
    tape: dict[int, Any] | None = None
    store: bool = True
    compacted: bool = False
    hold: bool = False
    replay: Replay | None = None
    arrived: list[int] | None = None
    narrowing: Narrowing | None = None
    _copies: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    _queries: dict[torch.device, Tensor] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """``positions, cos, sin`` on a layer's device."""
        if device not in self._copies:
            cos, sin = self.tables
            self._copies[device] = self.positions.to(device), cos.to(device), sin.to(device)
        return self._copies[device]

    def query_positions(self, device: torch.device) -> Tensor:
        """``[B, t]``: positions of the chunk's queries, -1 where a column is no token."""
        if device not in self._queries:
            positions = self.positions.to(device)
            column = torch.arange(positions.shape[1], device=device)
            present = column < torch.tensor(self.counts, device=device)[:, None]
            self._queries[device] = torch.where(present, positions, -1)
        return self._queries[device]
