"""KVzip's head-level scores (arXiv 2505.23416, section on head-level eviction): measured once, used for any prompt."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asymkv.compress import compress
from asymkv.head_scores import HeadScores, model_of
from asymkv.methods.kvzip import head_scores


def kvzip_scores(model: PreTrainedModel, tokenizer: Any, samples: Iterable[Tensor]) -> HeadScores:
    """The best reconstruction score of each KV head over all positions of all samples.

    Args:
        model: the model; it must not be patched with other settings.
        tokenizer: its tokenizer, for the request to repeat.
        samples: token ids ``[n]`` each.

    Raises:
        ValueError: without a sample.
    """
    best: Tensor | None = None
    tokens = []
    for ids in samples:
        cache = compress(model, tokenizer, ids[None].to(model.device), method="kvzip", ratio=1.0, retain=True)
        found = head_scores(cache)
        best = found if best is None else torch.maximum(best, found)
        tokens.append(len(ids))
    if best is None:
        raise ValueError("KVzip's head scores need at least one sample; found none")
    measured = {"tokens": tokens, "reduce": "max", "dtype": str(model.dtype).removeprefix("torch.")}
    return HeadScores("kvzip", best.tolist(), model_of(model), measured)
