"""Curvature of the language-model loss with respect to cached keys: one activation backward per chunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asymkv.attention import Seen, TapeEntry, compact_due, is_due
from asymkv.cache import CompressedCache
from asymkv.layer import CompressedLayer
from asymkv.models.adapter import FamilyAdapter
from asymkv.observations import attention_mass, statistic_dtype
from asymkv.replay_scores import CURVATURE
from asymkv.step import Step

FISHER = "fisher"


@contextmanager
def frozen(lm: PreTrainedModel) -> Iterator[None]:
    """Weights without requires_grad, so that a backward pass keeps no activation for their sake; undone on leaving."""
    trainable = [p for p in lm.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


def loss_chunk(
    adapter: FamilyAdapter,
    lm: PreTrainedModel,
    cache: CompressedCache,
    step: Step,
    forward: Callable[[Step], Any],
    ids: Tensor,
    following: list[int],
) -> Any:
    """One forward with keys as leaves, one backward; then every layer that exceeds its budget is compacted.

    Args:
        ids: ``[B, t or t + 1]`` the chunk's tokens and, where there is one, the token after it.
        following: tokens of each row from the chunk's first on.
    """
    ragged = cache.head_split.ragged
    each = [x.exceeding(step.limits[x.index], step.counts, ragged=ragged) for x in cache.layers]
    due = step.due if cache.deferred else [any(flags) for flags in zip(*each, strict=True)]
    if not any(due):
        return forward(step)
    step.tape = {}
    with torch.enable_grad():
        out = forward(step)
        loss = _token_losses(adapter, lm, out.last_hidden_state, ids, following).sum()
    gradients = _key_gradients(loss, step.tape)
    for layer in cache.layers:
        entry = step.tape.pop(layer.index)
        _store_fisher(cache, layer, entry, gradients[layer.index], step, due)
        view = entry.view
        seen = Seen(view.queries, view.query_positions, view.query_out, view.query_lse)
        compact_due(cache, layer, step, seen, view.scale)
        if not cache.config.decode_interval:
            layer.storage.drop_column(FISHER)
            cache.measure(layer)
    step.tape = None
    return _detached(out)


def replay_chunk(
    adapter: FamilyAdapter,
    lm: PreTrainedModel,
    cache: CompressedCache,
    step: Step,
    forward: Callable[[Step], Any],
    ids: Tensor,
) -> Any:
    """The released AsymKV code's order: the past is judged by the chunk and compacted, then the chunk runs on it.

    Two forwards and one backward; the loss is the mean inside the chunk, its first token not predicted.
    """
    look = dataclasses.replace(step, tape={}, store=False)
    step.limits = [[None] * len(step.counts) for _ in cache.layers]
    compacted = False
    if any(is_due(cache, layer, look) for layer in cache.layers if layer.is_initialized):
        with torch.enable_grad():
            hidden = forward(look).last_hidden_state
            inside = ids[:, : step.positions.shape[1]]
            tokens = torch.tensor([max(c - 1, 1) for c in step.counts], device=hidden.device)
            loss = (_token_losses(adapter, lm, hidden, inside, step.counts) / tokens).sum()
        assert look.tape is not None
        gradients = _key_gradients(loss, look.tape)
        for layer in cache.layers:
            _compact_judged(cache, layer, look.tape.pop(layer.index), gradients[layer.index][0], look)
        compacted = True
    out = forward(step)
    step.compacted |= compacted
    return out


def replay_chunk_fisher(
    adapter: FamilyAdapter,
    lm: PreTrainedModel,
    cache: CompressedCache,
    step: Step,
    forward: Callable[[], Any],
    ids: Tensor,
    answers: Tensor,
) -> None:
    """One replay (``asymkv.reconstruction``) with its backward: the squared gradient of the loss of what is repeated.

    Written, in pre-RoPE coordinates, to the ``curvature`` column of the rows that the replay scores.

    Args:
        step: with the replay; its tape is taken.
        forward: runs the decoder on it.
        ids: ``[B, t]`` the replay's tokens.
        answers: ``[B]`` int64, tokens at the end of each row that repeat the text.
    """
    assert step.replay is not None
    step.tape = {}
    with torch.enable_grad(), frozen(lm):
        hidden = forward().last_hidden_state
        asked = torch.tensor(step.counts) - answers.cpu()
        loss = _token_losses(adapter, lm, hidden, ids, step.counts, asked.tolist()).sum()
        gradients = _key_gradients(loss, step.tape)
    for layer in cache.layers:
        gradient, entry = gradients[layer.index][0], step.tape.pop(layer.index)
        assert gradient is not None and entry.past_rotary is not None  # the rows that are scored are stored
        dtype = statistic_dtype(gradient.dtype)
        layer.storage.add_column(CURVATURE, gradient.shape[-1:], dtype)
        wide = gradient if dtype == torch.float64 else gradient.float()
        square = cache.rope.rotate(wide, -entry.past_rotary).square().to(dtype)
        position = layer.dense("position")
        begin, end = (x.to(position.device)[:, None, None] for x in (step.replay.begin, step.replay.end))
        scored = ((position >= begin) & (position < end))[..., None]
        layer.storage.write(CURVATURE, torch.where(scored, square, layer.dense(CURVATURE)).flatten(0, 1))
        cache.measure(layer)
    step.tape = None


def _compact_judged(
    cache: CompressedCache, layer: CompressedLayer, entry: TapeEntry, gradient: Tensor | None, step: Step
) -> None:
    """Compacts the past by the attention and gradients of a chunk that is not stored."""
    assert gradient is not None  # there is a past: it exceeds its budget
    view = layer.view(cache.rope, entry.view.scale)
    past = view.valid.shape[-1]
    mass = attention_mass(entry.view, per_query_head=True)[..., :past]
    view.evidence["attention_sum"] = mass / view.cardinality[:, :, None]
    view.evidence["key_grad"] = cache.rope.rotate(gradient, -view.rotary_positions).to(view.keys.dtype)
    layer.compact(cache.config.options, view, step.limits[layer.index], cache.head_split)
    cache.measure(layer)


def _token_losses(
    adapter: FamilyAdapter, lm: PreTrainedModel, hidden: Tensor, ids: Tensor, following: list[int],
    begin: list[int] | None = None,
) -> Tensor:
    """Cross-entropy of the next token, summed per row ``[B]``, over positions whose next token is in ``ids``.

    ``begin``: own token of each row from which on tokens are to be predicted; None = from the second.
    """  # fmt: skip
    width = min(hidden.shape[1], ids.shape[1] - 1)
    if width <= 0:
        return hidden.sum(dim=(1, 2)) * 0
    targets = ids[:, 1 : width + 1].to(hidden.device)
    at = torch.arange(width, device=hidden.device) + 1
    known = at < torch.tensor(following, device=hidden.device)[:, None]
    if begin is not None:
        known &= at >= torch.tensor(begin, device=hidden.device)[:, None]
    logits = adapter.logits(lm, hidden[:, :width]).float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses.view_as(known) * known).sum(1)


def _key_gradients(loss: Tensor, tape: dict[int, TapeEntry]) -> dict[int, tuple[Tensor | None, Tensor]]:
    """Gradients with respect to past and new keys of every layer, zeros where the loss does not reach."""
    keys = [k for e in tape.values() for k in (e.past_keys, e.new_keys) if k is not None]
    found = iter(torch.autograd.grad(loss, keys, allow_unused=True))
    out: dict[int, tuple[Tensor | None, Tensor]] = {}
    for index, entry in tape.items():
        past = None if entry.past_keys is None else _or_zeros(next(found), entry.past_keys)
        out[index] = (past, _or_zeros(next(found), entry.new_keys))
    return out


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _store_fisher(
    cache: CompressedCache, layer: CompressedLayer, entry: TapeEntry, gradients: tuple, step: Step, due: list[bool]
) -> None:
    """Writes squared gradients, in pre-RoPE coordinates, to the ``fisher`` column of past and new rows.

    Only for the rows of the batch that are compacted now: what a row stores must not depend on its batch.
    """
    storage = layer.storage
    dim, dtype = entry.new_keys.shape[-1], statistic_dtype(entry.new_keys.dtype)
    storage.add_column(FISHER, (dim,), dtype)
    column = storage.ordered(FISHER).clone()
    past, new = gradients
    before = torch.tensor(entry.past_length or [0] * storage.heads, device=storage.device)[:, None]
    kept = torch.tensor([c * d for c, d in zip(step.counts, due, strict=True)], device=storage.device)
    counts = kept.repeat_interleave(layer.kv_heads)[:, None]
    parts = [(new, entry.new_rotary, before, counts)]
    if past is not None and entry.past_rotary is not None:
        parts.append((past, entry.past_rotary, torch.zeros_like(before), before * (counts > 0)))
    for gradient, rotary, offset, rows in parts:
        square = cache.rope.rotate(gradient.float() if dtype != torch.float64 else gradient, -rotary).square()
        index = torch.arange(square.shape[2], device=storage.device)
        inside = index < rows
        head = inside.nonzero(as_tuple=True)[0]
        column[head, (offset + index)[inside]] = square.flatten(0, 1)[inside].to(dtype)
    storage.write(FISHER, column)


def _detached(out: Any) -> Any:
    """The decoder's output without its graph."""
    for name, value in list(out.items()):
        if isinstance(value, Tensor):
            out[name] = value.detach()
        elif name == "hidden_states" and value is not None:
            out[name] = tuple(x.detach() for x in value)
    return out
