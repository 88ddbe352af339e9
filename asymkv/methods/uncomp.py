"""UNComp (arXiv 2410.03090): rows by the attention of the last queries, heads by the entropy of their queries."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from asymkv.checks import check_integer
from asymkv.head_scores import plain_source
from asymkv.layer_stages import check_stages, resolve, tokens_of
from asymkv.methods.scored import HeadScored
from asymkv.methods.snapkv import SnapKV
from asymkv.narrowing import JUDGES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from asymkv.config import CompressionConfig


@dataclasses.dataclass(frozen=True)
class UNComp(HeadScored, SnapKV):
    """SnapKV's scores; heads whose queries have a high matrix entropy keep more. Takes SnapKV's arguments.

    With ``stages``, later layers also see fewer tokens of a prompt: those that the last 8 queries of the layer before
    attend to, sinks and window always among them. Tokens that were dropped have no logits: they are NaN.

    Args:
        head_scores: matrix entropies of the heads: file, folder or table ``[L][H_kv]``; None = what
            ``scripts/find_retrieval_heads.py --kind entropy`` left for this model.
        groups: groups of heads of a layer; of two, the upper gets 4/3 of the mean and the lower 2/3.
        stages: None (every layer sees every token), one stage number per layer, a file of them, or "measured": what
            ``scripts/find_retrieval_heads.py --kind stages`` left for this model.
        max_tokens: tokens of a prompt that a layer of stage 0 sees at most; layer 0 sees all.
        min_tokens: those that a layer of the last stage sees; equal steps between, rounded down.
    """

    title: ClassVar[str] = "UNComp, arXiv 2410.03090"

    kernel_size: int = 7
    pooling: str = "max"
    group_first: bool = True
    groups: int = 2
    stages: Any = None
    max_tokens: int = 4096
    min_tokens: int = 1536

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "stages", plain_source(self.stages))

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({"stages"} if self.stages is not None else set())

    def defaults(self) -> dict[str, Any]:
        """A window of 8 queries; rows of the heads by the entropy of their queries."""
        return {"window_size": 8, "head_budgets": {"kind": "entropy", "file": self.head_scores, "groups": self.groups}}

    def validate(self, config: CompressionConfig) -> None:
        """Checks window, pooling and stages; the split over heads has checked its own."""
        super().validate(config)
        if self.stages is None:
            return
        check_integer("min_tokens", self.min_tokens, config.sink_size + max(config.window_size, JUDGES) + 1)
        check_integer("max_tokens, which must not be below min_tokens,", self.max_tokens, self.min_tokens)
        if not isinstance(self.stages, str):
            check_stages(self.stages, "stages")
        if config.positions != "original":
            raise ValueError(f"with stages, positions stay the tokens' own; position_policy must be 'original', found "
                             f"{config.positions!r}")

    def layer_tokens(self, model: PreTrainedModel) -> tuple[int, ...] | None:
        """Tokens that each layer sees at most, by its stage."""
        if self.stages is None:
            return None
        return tokens_of(resolve(self.stages, model, "stages"), self.max_tokens, self.min_tokens)
