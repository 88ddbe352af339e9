"""What a method is: parameters, and a decision about where rows go."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from asymkv.budgets.heads import HeadBudgets, Judged
from asymkv.observations import QUERY_WINDOW
from asymkv.plan import CompactionPlan, keep_rows
from asymkv.view import RowView

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from asymkv.config import CompressionConfig
    from asymkv.layer import CompressedLayer


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of all methods: a frozen dataclass of parameters.

    Class attributes:
        title: name and paper, for the table of methods.
        chunk_size: own tokens per prefill chunk; None = whole prompt.
        position_policy: the method's own policy.
        needs: "queries" (those of the chunk, or the last of decode), "attention" (mass of every query so far, column
            ``mass``), "loss" (squared gradient of the chunk's loss, column ``fisher``), "replay" (the past is judged
            by the chunk before the chunk is stored), "whole_prompt" (judges only once the prompt is in),
            "raw_queries" (before RoPE), "output_weight" (the layer's output projection), "reconstruction" (what a chunk
            of the prompt brought is replayed, and judged by the column ``score``: ``asymkv.reconstruction``),
            "replay_loss" (squared gradient of the replay's loss, column ``curvature``), "stages" (layers see no more of
            a prompt's tokens than :meth:`layer_tokens` says: ``asymkv.narrowing``).
        compresses: False for the full cache.
        splits_budget: whether budgets may differ between heads and layers: what to lose is chosen by :meth:`judge`.
        keeps_generated: whether generated rows are never judged and stay, on top of a ratio of the prompt.
        after_scoring: parameters that say what to do with stored scores, and nothing of how rows are scored.
    """

    title: ClassVar[str] = ""
    chunk_size: ClassVar[int | None] = 512
    position_policy: ClassVar[str] = "original"
    compresses: ClassVar[bool] = True
    splits_budget: ClassVar[bool] = True
    keeps_generated: ClassVar[bool] = False
    after_scoring: ClassVar[frozenset[str]] = frozenset()

    # Set from the configuration when it is validated: rows that are never touched.
    sink_size: int = dataclasses.field(default=0, init=False, repr=False)
    window_size: int = dataclasses.field(default=0, init=False, repr=False)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    @property
    def query_window(self) -> int:
        """Decode queries that are remembered for the next compaction."""
        return QUERY_WINDOW

    def defaults(self) -> dict[str, Any]:
        """Values of general settings that this method sets where the user gave none."""
        return {}

    def validate(self, config: CompressionConfig) -> None:
        """Takes the protected sizes, and raises ValueError for settings that do not go together."""
        object.__setattr__(self, "sink_size", config.sink_size)
        object.__setattr__(self, "window_size", config.window_size)
        if isinstance(config.chunk_size, int) and "whole_prompt" in self.needs:
            raise ValueError(f"method {config.method!r} judges the whole prompt at once; chunk_size must be None, "
                             f"found {config.chunk_size}")

    def check_dimensions(self, *, keys: bool, values: bool) -> None:
        """Raises ValueError if it cannot work on keys, or values, that each head stores in directions of its own."""

    def check_prompt(self, tokens: int, config: CompressionConfig) -> None:
        """Raises PromptRefusedError for a prompt of so many own tokens that the method cannot do what is asked."""

    def layer_tokens(self, model: PreTrainedModel) -> tuple[int, ...] | None:
        """Tokens of a prompt that reach each layer at most, never more than the layer before; None: all.

        Raises:
            ValueError: where what that follows from is missing or of another model.
        """
        return None

    def prepare_layers(self, model: PreTrainedModel, layers: Sequence[CompressedLayer]) -> None:
        """Gives the layers of a new cache what was learnt of the model beforehand, in ``learned``; by default nothing.

        Raises:
            ValueError: where that is missing or of another model.
        """

    def to_dict(self) -> dict[str, Any]:
        """The method's own parameters."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}

    def row_bytes(self, head_dim: int, dtype: torch.dtype, config: CompressionConfig) -> int:
        """Bytes of the statistics that stay with each row, beside key, value and metadata."""
        return 4 if "attention" in self.needs else 0

    def score(self, view: RowView) -> Tensor:
        """Worth of each row, ``[B, H_kv, T]``; the lowest go first."""
        raise TypeError(f"{type(self).__name__} decides in plan(), not by a score per row")

    def judge(self, view: RowView) -> tuple[Tensor, Tensor]:
        """What giving up each unit costs, and which units may be given up.

        A unit is what a head loses one row by: a row that goes (the default), or a pair that becomes one row. What
        :meth:`carry_out` needs beside the choice belongs into ``view.evidence``: queries may be gone by then.

        Returns:
            ``cost [B, H_kv, U]`` and ``free [B, H_kv, U]`` bool; by default the scores of the rows outside sinks and
            window.
        """
        return self.score(view), ~view.protected(self.sink_size, self.window_size)

    def carry_out(self, view: RowView, chosen: Tensor) -> CompactionPlan:
        """The plan that gives up the chosen units, ``[B, H_kv, U]`` bool; may edit rows of ``view`` that stay."""
        return keep_rows(~chosen & view.valid)

    def plan(self, view: RowView, heads: HeadBudgets | None = None) -> CompactionPlan:
        """Where each row goes: the cheapest units are given up, as the split over heads (None: evenly) has it."""
        cost, free = self.judge(view)
        judged = Judged(cost, free, view.lengths, view.budget, view.layer)
        return self.carry_out(view, (heads or HeadBudgets()).choose(judged))
