"""KVzip (arXiv 2505.23416): what the model does not need to repeat its context goes, whatever will be asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asymkv.chat import chat_text, encode, load_tokenizer
from asymkv.checks import PromptRefusedError, check_number
from asymkv.methods.base import Method
from asymkv.methods.gate import gate_path, gate_scores, give_gate
from asymkv.plan import CompactionPlan
from asymkv.reconstruction import Wording
from asymkv.replay_scores import FAINTEST, SCORE, RangeMaximum, Scorer
from asymkv.view import RowView

if TYPE_CHECKING:
    from asymkv.cache import CompressedCache
    from asymkv.config import CompressionConfig
    from asymkv.layer import CompressedLayer

LEVELS = ("pair", "pair_uniform", "layer", "head")
TEMPLATE = "template"
# What asks for the whole context, and for a part of it: the paper's code and kvpress differ by a space.
WORDINGS = {
    name: ("\n\nRepeat the previous context exactly.",
           f"\n\nRepeat the part of the previous context exactly, starting with{end}")
    for name, end in (("paper", " "), ("kvpress", ""))
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class KVzip(Method):
    """Keeps the rows that the model needs most to repeat its context, whatever will be asked.

    Once the prompt is in, it is replayed in ranges (``asymkv.reconstruction``), which costs as much as reading it or
    more (``docs/results.md`` has times). A later turn is replayed by itself and compacted with the stored scores of
    older rows. Generated tokens are never judged: a ratio is of prompt tokens, and they come on top of it. A budget in
    rows or bytes holds them at the context's cost, up to half of it; then the oldest of them go (``level="head"``: they
    stay).

    Args:
        level: "pair" (one threshold over all layers and heads), "pair_uniform" (every head keeps equally many),
            "layer" (one threshold over the heads of each layer) or "head" (a head is worth its best row; whole heads
            lose their judged rows outside sinks and window until the budget holds).
        replay_chunk: own tokens that one replay rebuilds.
        plus: KVzip+: a probability counts times the norm of the value through the output projection, over the norm of
            the query's hidden state.
        prefix: own tokens at the start that are not rebuilt (system prompt): a number, "template" (what the
            tokenizer's chat template puts before the first user's words) or None (none).
        keep_prefix: keep them all; False: beyond the sinks they go first, as in kvpress.
        retain: store the scores and evict nothing (``cache.prune(ratio=...)`` does).
        tokenizer: name or folder of the tokenizer that the request to repeat is encoded with; None = the model's.
        wording: the request, "paper" or "kvpress".
        repeat_ids: the request as token ids, instead of words; no tokenizer is needed then.
        continue_ids: the request to go on from the tokens that follow; None = ``repeat_ids``.
        suffix_ids: what ends the request and opens the answer.
        gate_share: how much a trained gate (``gate``) says in a row's score, from 0 (nothing) to 1 (all): the weight of
            its logarithm in a mean with the replay's. What a replay finds is the highest of many probabilities, a
            noisy number, and the gate knows its expectation. Give every head a floor beside it: without one SmolLM2
            loses by it, with one it gains a little at 10 % of the rows and below (docs/quality.md).
        gate_file: the gate, as ``file`` of method ``gate``.
    """

    title: ClassVar[str] = "KVzip, arXiv 2505.23416"
    chunk_size: ClassVar[int | None] = None
    keeps_generated: ClassVar[bool] = True
    after_scoring: ClassVar[frozenset[str]] = frozenset({"level", "gate_share", "gate_file"})

    level: str = "pair"
    replay_chunk: int = 2000
    plus: bool = False
    prefix: int | str | None = None
    keep_prefix: bool = True
    retain: bool = False
    tokenizer: str | None = None
    wording: str = "paper"
    repeat_ids: Sequence[int] | None = None
    continue_ids: Sequence[int] | None = None
    suffix_ids: Sequence[int] | None = None
    gate_share: float = 0.0
    gate_file: str | None = None

    def __post_init__(self) -> None:
        check_number("gate_share", self.gate_share, 0, 1)
        object.__setattr__(self, "gate_file", gate_path("gate_file", self.gate_file))
        for name in ("repeat_ids", "continue_ids", "suffix_ids"):
            ids = getattr(self, name)
            if ids is not None:
                object.__setattr__(self, name, tuple(int(i) for i in ids))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"whole_prompt", "reconstruction", *(["output_weight"] if self.plus else [])})

    @property
    def compresses(self) -> bool:  # type: ignore[override]
        return not self.retain

    def defaults(self) -> dict[str, Any]:
        splits: dict[str, dict[str, Any]] = {
            "pair": {"layer_budgets": "global"},
            "head": {"layer_budgets": "global"},
            "layer": {"head_budgets": {"kind": "adaptive", "mode": "hard", "floor": 0}},
        }
        return {"window_size": 0, "decode_interval": 0, **splits.get(self.level, {})}

    def validate(self, config: CompressionConfig) -> None:
        """Checks the choices.

        Raises:
            ValueError: for an unknown choice, or a level that the splits of the budget contradict.
        """
        super().validate(config)
        for name, allowed in (("level", LEVELS), ("wording", tuple(WORDINGS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed: {list(allowed)}")
        for name in ("plus", "keep_prefix", "retain"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False; found {getattr(self, name)!r}")
        if not _is_count(self.replay_chunk, 1):
            raise ValueError(f"replay_chunk must be an integer >= 1; found {self.replay_chunk!r}")
        if self.prefix not in (None, TEMPLATE) and not _is_count(self.prefix, 0):
            raise ValueError(f"prefix must be a number of tokens, 'template' or None; found {self.prefix!r}")
        if self.gate_share and config.dimensions is not None:
            raise ValueError("gate_share: a gate reads keys and values as the model makes them; dimensions must be "
                             f"None, found {config.dimensions!r}")
        if self.gate_file is not None and not self.gate_share:
            raise ValueError(f"gate_file={self.gate_file!r} says nothing with gate_share=0")
        if self.repeat_ids is None and (self.continue_ids is not None or self.suffix_ids is not None):
            raise ValueError("continue_ids and suffix_ids go with repeat_ids, which is None")
        self._check_level(config)

    def check_prompt(self, tokens: int, config: CompressionConfig) -> None:
        """A prefix that is always kept must leave room for the context.

        Raises:
            PromptRefusedError: for a budget that the prefix fills.
        """
        rows = config.budget if config.ratio is None else max(int(config.ratio * tokens), config.minimum_rows)
        if isinstance(rows, int) and isinstance(self.prefix, int):
            self.check_prefix(self.prefix, rows, tokens)

    def check_prefix(self, prefix: int, rows: int, tokens: int) -> None:
        """Raises an error where ``prefix`` rows and a window that always stay leave none of ``rows`` to the others."""
        if self.keep_prefix and prefix and prefix + self.window_size >= rows < tokens and self.compresses:
            window = f" and window_size={self.window_size}" if self.window_size else ""
            raise PromptRefusedError(f"prefix={prefix}{window} rows are always kept, and {rows} rows per KV head hold "
                                     "nothing else; give a larger budget or ratio, or keep_prefix=False")

    def _check_level(self, config: CompressionConfig) -> None:
        """A level is a split of the budget; "head" and "pair_uniform" mean exactly one."""
        joint, ragged = config.layer_split.joint, config.head_split.ragged
        if self.level == "head" and not joint:
            raise ValueError(f"level='head' needs layer_budgets='global'; found {config.layer_budgets!r}")
        if self.level == "pair_uniform" and (joint or ragged):
            raise ValueError("level='pair_uniform' keeps equally many rows in every head; layer_budgets='global' and "
                             f"head_budgets='adaptive' contradict it; found {config.layer_budgets!r}, "
                             f"{config.head_budgets!r}")
        if self.level == "layer" and joint:
            raise ValueError(f"level='layer' splits within layers; layer_budgets must not be {config.layer_budgets!r}")

    def prepare_layers(self, model: PreTrainedModel, layers: Sequence[CompressedLayer]) -> None:
        """Finds the model's gate, if it has a say.

        Raises:
            ValueError: for a gate that is missing, damaged or of another model.
        """
        if self.gate_share:
            give_gate(self.gate_file, model, layers)

    def row_bytes(self, head_dim: int, dtype: torch.dtype, config: CompressionConfig) -> int:
        """The score."""
        return 4

    def wording_for(self, lm: PreTrainedModel) -> Wording:
        """The request to repeat, as token ids of the model.

        Raises:
            ValueError: if it takes a tokenizer and none can be loaded.
        """
        if self.repeat_ids is not None and self.prefix != TEMPLATE:
            again = self.repeat_ids if self.continue_ids is None else self.continue_ids
            return Wording(tuple(self.repeat_ids), tuple(again), tuple(self.suffix_ids or ()), int(self.prefix or 0))
        spelled = dataclasses.replace(self, **self.spelled(load_tokenizer(self.tokenizer, lm)))
        return spelled.wording_for(lm)

    def spelled(self, tokenizer: Any) -> dict[str, Any]:
        """The options that hold token ids and sizes instead of words, by a live tokenizer."""
        text = chat_text(tokenizer)
        prefix = len(encode(tokenizer, text.prefix)) if self.prefix == TEMPLATE else self.prefix
        if self.repeat_ids is not None:
            return {"prefix": prefix}
        repeat, again = (encode(tokenizer, words) for words in WORDINGS[self.wording])
        return {"prefix": prefix, "repeat_ids": repeat, "continue_ids": again,
                "suffix_ids": encode(tokenizer, text.suffix)}  # fmt: skip

    def scorer(self, wording: Wording) -> Scorer:
        """What judges rows in a replay; rows of a kept prefix are in every softmax."""
        anchor = max(self.sink_size, wording.prefix) if self.keep_prefix else self.sink_size
        return RangeMaximum(anchor, self.plus)

    def judge(self, view: RowView) -> tuple[Tensor, Tensor]:
        """The stored scores; rows that were never judged (generated tokens) stay, but for :meth:`_too_old`."""
        score, open_rows = view.statistics[SCORE], ~view.protected(self.sink_size, self.window_size)
        free = open_rows & (score > 0)
        if self.gate_share:
            both = score.clamp(min=FAINTEST).log().lerp(gate_scores(view).to(score), self.gate_share)
            # What goes first whatever it is worth (a prefix that is not kept) still does.
            score = torch.where(score > FAINTEST, both.exp().clamp(min=FAINTEST), score)
        if self.level == "head":
            view.evidence["judged"] = free
            return torch.where(free, score, 0).amax(-1, keepdim=True).expand_as(score), free
        old = self._too_old(view, open_rows)
        return torch.where(old, FAINTEST, score), free | old

    def _too_old(self, view: RowView, open_rows: Tensor) -> Tensor:
        """``[B, H_kv, T]`` bool: generated rows beyond half of a budget in rows or bytes, the oldest ones.

        A share of the prompt has room for all of them on top.
        """
        generated = open_rows & (view.statistics[SCORE] == 0)
        on_top = torch.tensor([r.generated if r else 0 for r in view.requests], device=view.budget.device)[:, None]
        kept = view.valid.sum(-1) - (open_rows & (view.statistics[SCORE] >= 0)).sum(-1)
        room = on_top + (view.budget - on_top - kept).clamp(min=0) // 2
        return generated & (generated.cumsum(-1) <= (generated.sum(-1) - room)[..., None])

    def carry_out(self, view: RowView, chosen: Tensor) -> CompactionPlan:
        """Drops the chosen rows; level "head": all judged rows of a head that would lose one."""
        if self.level == "head":
            chosen = view.evidence["judged"] & chosen.any(-1, keepdim=True)
        return super().carry_out(view, chosen)


def head_scores(cache: CompressedCache) -> Tensor:
    """What each KV head is worth: its best stored score, over positions and over the rows of the batch.

    Heads that were emptied are worth nothing any more: fill the cache with ``retain=True``.

    Returns:
        ``[L, H_kv]`` fp32 on the CPU.

    Raises:
        ValueError: for a cache without stored scores.
    """
    if not all(layer.is_initialized and SCORE in layer.storage.columns for layer in cache.layers):
        raise ValueError(f"this cache (method={cache.config.method!r}) stores no scores; fill it with method='kvzip'")
    best = []
    for layer in cache.layers:
        view = layer.view(cache.rope, 1.0)
        best.append(torch.where(view.valid, view.statistics[SCORE], 0).clamp(min=0).amax((0, 2)).cpu())
    return torch.stack(best)


def _is_count(value: Any, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum
