"""One prefill for several settings: those that judge a whole prompt at once differ only in what they do after it.

The first setting's cache runs through the model. As soon as a layer holds the prompt, every other cache (a branch)
takes a copy of the layer, together with the queries that judge it, and compacts it by its own settings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asymkv.attention import settle, take_over
from asymkv.cache import CompressedCache
from asymkv.config import CompressionConfig
from asymkv.reconstruction import compact_scored

# What makes a pass of its own, or lets only some tokens through to later layers.
_ALONE = frozenset({"loss", "replay", "stages"})


def prefill_key(config: CompressionConfig) -> str | None:
    """What settings must agree in to share one prefill; None: these share it with none.

    Prompts are read in one piece and attended to before anything is lost, so method, budget and its splits are free.
    Replays (KVzip) are shared by settings of the same method that score rows by the same options.
    """
    needs = config.options.needs
    if config.chunk is not None or needs & _ALONE:
        return None
    shared: list[Any] = [config.positions, config.backend, config.dimensions]
    if "reconstruction" in needs:
        own = {k: v for k, v in config.options.to_dict().items() if k not in config.options.after_scoring}
        shared += [config.method, config.sink_size, own]
    return json.dumps(shared, sort_keys=True, default=str)


def prefill_many(
    model: PreTrainedModel, configs: Sequence[CompressionConfig], ids: Tensor, attention_mask: Tensor | None = None
) -> tuple[list[CompressedCache], Tensor]:
    """One forward of a patched model, and the compressed cache of each of several settings.

    Each cache is what a prefill of its own would have left. While the model runs, a layer is held once for each
    setting, or (where layers wait for each other: a split over layers) the whole prompt is.

    Args:
        model: a patched causal LM.
        configs: settings with one :func:`prefill_key`.
        ids: ``[B, t]`` int64, on the model's device.
        attention_mask: ``[B, t]``, 0 at padding; None = no padding.

    Returns:
        A cache per setting, and the logits ``[B, V]`` after the last column.

    Raises:
        ValueError: for no settings, or settings that cannot share a prefill.
    """
    check_shared(configs)
    caches = [CompressedCache.for_model(config, model) for config in configs]
    first, *branches = caches
    first.branches = branches
    try:
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=attention_mask, past_key_values=first, logits_to_keep=1)
    finally:
        first.branches = ()
    return caches, out.logits[:, -1]


def check_shared(configs: Sequence[CompressionConfig]) -> None:
    """Raises ValueError unless all settings can share one prefill."""
    if not configs:
        raise ValueError("give at least one setting")
    keys = [prefill_key(config) for config in configs]
    for config, key in zip(configs, keys, strict=True):
        if key is None and len(configs) > 1:
            raise ValueError(f"{config.describe()} compacts while the prompt is read, or reads it in its own way, and "
                             "needs a prefill of its own; methods that judge the whole prompt at once can share one "
                             "(any method with chunk_size='prompt')")  # fmt: skip
        if key != keys[0]:
            raise ValueError(f"{config.describe()} and {configs[0].describe()} cannot share a prefill: positions, "
                             "backend and dimensions must be equal, and for KVzip all options that rows are scored "
                             f"by; found {key} and {keys[0]}")  # fmt: skip


def settle_branches(cache: CompressedCache) -> None:
    """Ends the branches' part of a prompt, before the cache they branch from is compacted."""
    for branch in cache.branches:
        step = branch.step
        assert step is not None
        if step.hold:  # its rows were judged by a replay, after the layers had run
            for layer in cache.layers:
                take_over(branch, layer)
            branch.peak_rows, branch.peak_nbytes = cache.peak_rows, cache.peak_nbytes
            branch.forget_rows()
            compact_scored(branch, step)
        settle(branch, step)
        branch.compactions += step.compacted
