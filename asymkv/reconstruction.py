"""Context reconstruction (KVzip, arXiv 2505.23416): stored rows are judged by how much the model needs them to repeat
the text that they come from.

The model is asked to repeat a range of its own tokens and the range is fed as the answer, against everything stored.
A scorer (``asymkv.replay_scores``) judges the range's rows by the replay's queries, layer by layer. Nothing of a replay
is stored. Which rows are judged is said by position: the cache may be compressed already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from asymkv.attention import Seen, compact_due, rotary_of_new, rotate_new, settle, taped_attention
from asymkv.budgets.rows import resolve_rows
from asymkv.cache import CompressedCache
from asymkv.curvature import replay_chunk_fisher
from asymkv.layer import CompressedLayer
from asymkv.models.adapter import FamilyAdapter
from asymkv.ops import ragged_attention
from asymkv.ops.sdpa import causal_attention, joined
from asymkv.replay_scores import FAINTEST, KEPT, SCORE, ReplayQueries, Scorer
from asymkv.step import Step

if TYPE_CHECKING:
    from asymkv.methods.kvzip import KVzip

OVERLAP = 8  # tokens before the range that tell the model where to go on (the paper's code)


@dataclass(frozen=True)
class Wording:
    """What is put around a range, as token ids.

    Args:
        repeat: asks for the whole context.
        again: asks for the part that starts with the tokens that follow.
        suffix: ends the question and opens the answer.
        prefix: own tokens at the start of the context that are never rebuilt.
    """

    repeat: tuple[int, ...]
    again: tuple[int, ...]
    suffix: tuple[int, ...]
    prefix: int = 0


@dataclass(frozen=True)
class Replay:
    """One replay on its way through the layers; ``begin``, ``end [B]`` int64: positions of the rows to score.

    Args:
        scorer: judges them.
    """

    begin: Tensor
    end: Tensor
    scorer: Scorer

    def attend(
        self, cache: CompressedCache, layer: CompressedLayer, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor,
        scale: float,
    ) -> Tensor:
        """Attention over everything stored and the replay itself, causal; scores the range's rows on the way.

        Args:
            q: ``[B, H, t, D]`` before RoPE.
            k: ``[B, H_kv, t, D]`` before RoPE.
            v: ``[B, H_kv, t, D]``, or in the stored size.
            hidden: ``[B, t, hidden_size]``, what they were projected from.

        Returns:
            ``[B, H, t, D]``, of the size of ``v``.
        """  # fmt: skip
        step = cache.step
        assert step is not None
        rotary = rotary_of_new(layer, step, k) if step.tape is not None or layer.policy != "original" else None
        q, k = rotate_new(cache, layer, step, rotary, q, k)
        if step.tape is not None:
            assert rotary is not None
            out = taped_attention(cache, layer, step, q, k, v, rotary, scale)
            past_lse = step.tape[layer.index].view.query_lse
            assert past_lse is not None
            own_lse = torch.full_like(past_lse, -torch.inf)  # the other one is over the replay too
        else:
            own, own_lse = causal_attention(q, k, v, scale)
            past, past_lse = ragged_attention(q, layer, scale=scale, backend=cache.backend)
            out = joined(past, past_lse, own, own_lse)
        self._score(layer, ReplayQueries(
            q.detach(), step.counts, out.detach(), past_lse, own_lse, hidden.detach(), scale, cache.rope))  # fmt: skip
        cache.measure(layer)
        return out.to(q.dtype)

    @torch.no_grad()
    def _score(self, layer: CompressedLayer, seen: ReplayQueries) -> None:
        """Writes what the scorer says of the range's rows, in the dtype of its arithmetic, autocast or not."""
        begin, end = (x.to(seen.q.device).repeat_interleave(layer.kv_heads) for x in (self.begin, self.end))
        with torch.autocast(seen.q.device.type, enabled=False):
            self.scorer.score(layer, seen, begin, end)


@dataclass
class Reconstruction:
    """Replays of one forward's prompt.

    Args:
        ids: ``[B, t]`` own tokens of the forward, packed to the left.
        skip: tokens of each row at its start that belong to the prefix.
    """

    adapter: FamilyAdapter
    lm: PreTrainedModel
    cache: CompressedCache
    ids: Tensor
    wording: Wording
    skip: list[int]

    @classmethod
    def of(
        cls, adapter: FamilyAdapter, lm: PreTrainedModel, cache: CompressedCache, ids: Tensor | None, counts: list[int]
    ) -> Reconstruction:
        """Before the forward: everything that can be refused is refused here.

        Raises:
            ValueError: for embeddings, if the words cannot be had, or where a kept prefix fills the budget.
        """
        if ids is None:
            raise ValueError(f"method {cache.config.method!r} repeats the prompt and needs its token ids; found "
                             "inputs_embeds")
        wording = cache.config.options.wording_for(lm)  # type: ignore[attr-defined]
        seen = cache.layers[0].tokens or [0] * len(counts)
        tokens = [n + before for n, before in zip(counts, cache.prompt_tokens or [0] * len(counts), strict=True)]
        _check_prefix(cache, wording.prefix, tokens)
        skip = [min(max(wording.prefix - s, 0), n) for s, n in zip(seen, counts, strict=True)]
        return cls(adapter, lm, cache, ids, wording, skip)

    def run(self, counts: list[int], at: int) -> None:
        """Scores each row's newest ``counts[b]`` rows, which are own tokens ``at, ...`` of the forward."""
        method: KVzip = self.cache.config.options  # type: ignore[assignment]
        first = [max(s, at) for s in self.skip]
        last = [at + n for n in counts]
        shift = [n - e for n, e in zip(self.cache.layers[0].tokens, last, strict=True)]
        if any(self.skip):
            until = [min(s, n) if n else 0 for s, n in zip(self.skip, last, strict=True)]
            self._mark_prefix(until, shift, KEPT if method.keep_prefix else FAINTEST)
        longest = max((e - f for f, e in zip(first, last, strict=True)), default=0)
        for offset in range(0, longest, method.replay_chunk):
            begin = [min(f + offset, e) for f, e in zip(first, last, strict=True)]
            end = [min(b + method.replay_chunk, e) for b, e in zip(begin, last, strict=True)]
            inputs = [self._input(row, b, e) for row, (b, e) in enumerate(zip(begin, end, strict=True))]
            ranges = [(b + s, e + s) if b < e else (0, 0) for b, e, s in zip(begin, end, shift, strict=True)]
            replay(self.adapter, self.lm, self.cache, inputs, ranges, method.scorer(self.wording))

    def _input(self, row: int, begin: int, end: int) -> Tensor:
        """Question and answer of one row; empty if it has no range. Replays start where the prefix ends."""
        if begin >= end:
            return self.ids[row, :0]
        start = self.skip[row]
        words = self.wording.repeat if begin == start else self.wording.again
        before = self.ids[row, max(begin - OVERLAP, start) : begin]
        asked, suffix = (self.ids.new_tensor(w) for w in (words, self.wording.suffix))
        return torch.cat((asked, before, suffix, self.ids[row, begin:end]))

    def _mark_prefix(self, until: list[int], shift: list[int], score: float) -> None:
        """Gives the prefix, which is never repeated, a score all the same."""
        for layer in self.cache.layers:
            layer.storage.add_column(SCORE, (), torch.float32)
            bound = torch.tensor([u + s if u else 0 for u, s in zip(until, shift, strict=True)],
                                 device=layer.storage.device)  # fmt: skip
            prefix = layer.dense("position") < bound[:, None, None]
            layer.storage.write(SCORE, torch.where(prefix, score, layer.dense(SCORE)).flatten(0, 1))


def replay(
    adapter: FamilyAdapter, lm: PreTrainedModel, cache: CompressedCache, inputs: list[Tensor],
    ranges: list[tuple[int, int]], scorer: Scorer,
) -> None:
    """Runs one replay against everything stored, and writes the score of the rows in ``ranges``.

    Args:
        inputs: per row of the batch, the token ids of its replay ``[n]``; none = this row has none.
        ranges: per row, the positions ``begin, end`` of the rows to score.
        scorer: judges them.
    """  # fmt: skip
    counts = [len(x) for x in inputs]
    ids = pad_sequence(inputs, batch_first=True)
    stored = cache.rope.of_rows
    positions, tables = cache.next_positions(counts, ids.device, lm.dtype)
    cache.rope.of_rows = stored  # a replay leaves nothing behind
    begin, end = torch.tensor(ranges, device=ids.device).unbind(1)
    step = Step(counts, positions, tables, [], [], [], prompt=True, store=False, replay=Replay(begin, end, scorer))
    cache.step = step
    present = step.query_positions(ids.device) >= 0

    def forward() -> Any:
        return adapter.decoder(lm)(
            input_ids=ids,
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
            position_ids=adapter.position_ids(lm, positions, present),
            past_key_values=cache,
            use_cache=True,
        )

    if "replay_loss" in cache.config.options.needs:
        replay_chunk_fisher(adapter, lm, cache, step, forward, ids, end - begin)
    else:
        forward()


def _check_prefix(cache: CompressedCache, prefix: int, tokens: list[int]) -> None:
    """Raises ValueError where a prefix that is always kept fills the budget of a prompt of so many tokens."""
    method: KVzip = cache.config.options  # type: ignore[assignment]
    if not method.compresses:
        return
    config = cache.config
    allowed, _ = resolve_rows(config.budget, config.ratio, config.minimum_rows, tokens, cache.shape)
    for rows, count in zip(allowed, tokens, strict=True):
        method.check_prefix(prefix, rows, count)


def compact_scored(cache: CompressedCache, step: Step) -> None:
    """Lets every layer judge by the scores that are stored now; layers that do not wait are compacted."""
    step.hold = False
    for layer in cache.layers:
        # Stored scores need no queries, and so no factor of their logits.
        compact_due(cache, layer, step, Seen(), layer.storage.columns["keys"].shape[-1] ** -0.5)


def prune(cache: CompressedCache, ratio: float | None, budget: int | str | None) -> CompressedCache:
    """See :meth:`asymkv.CompressedCache.prune`."""
    if (ratio is None) == (budget is None):
        raise ValueError(f"give exactly one of ratio and budget; found ratio={ratio!r}, budget={budget!r}")
    if not all(layer.is_initialized and SCORE in layer.storage.columns for layer in cache.layers):
        raise ValueError(f"this cache (method={cache.config.method!r}) stores no scores to prune by; fill it with "
                         "method='kvzip' (retain=True keeps every row and its score)")
    cache.check_whole()
    out = cache.fork()
    out.config = cache.config.replace(ratio=ratio, budget=budget, retain=False)
    batch = len(out.prompt_tokens)
    if isinstance(prefix := getattr(out.config.options, "prefix", None), int):
        _check_prefix(out, prefix, out.prompt_tokens)
    requests = out.requests([0] * batch, [True] * batch, now=True)
    nothing = torch.zeros(batch, 0, dtype=torch.long)
    due = out.exceeding(requests, [0] * batch)
    limits = out.limits(requests, [0] * batch)
    step = Step([0] * batch, nothing, (nothing, nothing), limits, requests, due, prompt=True)
    compact_scored(out, step)
    settle(out, step)
    if step.compacted:
        out.compactions += 1
        out.tail = out.tail[:, :0].clone()
    return out
