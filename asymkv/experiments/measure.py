"""One arm on one text: what every token costs in nats under compression, what is stored, and how fast it goes."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import asymkv
from asymkv.cache import CompressedCache
from asymkv.experiments.arms import SuiteArm
from asymkv.longbench.arms import StoredTooMuchError, allowed_rows, full_cache_bytes
from asymkv.longbench.jsonl import NotFiniteError
from asymkv.longbench.memory import synchronize
from asymkv.models import get_adapter

WARMUP_STEPS = 2
Record = dict[str, Any]


@torch.no_grad()
def stream(model: PreTrainedModel, ids: Tensor, stride: int) -> tuple[Tensor, Any, float]:
    """Reads a text as it would be read in use: turn by turn, each on what compression left of those before.

    Every token but the first is predicted from the tokens of its own turn before it, exact, and from the cache.

    Args:
        model: patched, or not (then on the stock cache).
        ids: ``[B, n]`` token ids.
        stride: tokens of a turn.

    Returns:
        Losses ``[B, n - 1]`` fp32 in nats, the cache, and seconds.
    """
    device, losses, last, cache = model.device, [], None, None
    synchronize(device)
    started = time.perf_counter()
    for turn in ids.to(device).split(stride, dim=1):
        out = model(turn, past_key_values=cache, use_cache=True)
        logits = out.logits if last is None else torch.cat([last, out.logits], dim=1)
        targets = turn[:, 1:] if last is None else turn
        cache, last = out.past_key_values, out.logits[:, -1:]
        scored = logits[:, :-1].float().flatten(0, 1)
        losses.append(torch.nn.functional.cross_entropy(scored, targets.flatten(), reduction="none").view_as(targets))
    synchronize(device)
    return torch.cat(losses, dim=1), cache, time.perf_counter() - started


@torch.no_grad()
def decode_rate(model: PreTrainedModel, cache: Any, tokens: Tensor, steps: int) -> float:
    """Tokens per second of greedy decoding on a filled cache, which grows.

    Args:
        tokens: ``[B, 1]`` to begin with.
        steps: tokens of each row that are timed.
    """
    for step in range(WARMUP_STEPS + steps):
        if step == WARMUP_STEPS:
            synchronize(model.device)
            started = time.perf_counter()
        tokens = model(tokens, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
    synchronize(model.device)
    return len(tokens) * steps / (time.perf_counter() - started)


def steps_left(model: PreTrainedModel, tokens: int, wanted: int) -> int:
    """How many of the ``wanted`` steps can be timed behind so many tokens: learned positions have an end."""
    most = get_adapter(model.config.model_type).most_positions(model.config)
    return wanted if most is None else max(min(wanted, most - tokens - WARMUP_STEPS), 0)


def measure_text(model: PreTrainedModel, arm: SuiteArm, ids: Tensor, decode_steps: int) -> list[Record]:
    """An arm on a batch of windows ``[B, n]``: one record per row of the batch; bytes are shared evenly.

    Decoding is timed as far as the model has positions; where it has none left, its rate is None.

    Raises:
        NotFiniteError: for a loss that is NaN or infinite.
        StoredTooMuchError: for a cache that holds more than the arm's settings allow.
        ValueError: what the method refuses.
    """
    accelerator = None if model.device.type == "cpu" else torch.get_device_module(model.device)
    if accelerator is not None:
        accelerator.reset_peak_memory_stats(model.device)
    with asymkv.replace(model.config.model_type, arm.config, model=model):
        losses, cache, seconds = stream(model, ids, arm.stride)
        if not bool(losses.isfinite().all()):
            at = int((~losses.isfinite()).any(0).nonzero()[0]) + 1
            raise NotFiniteError(f"the loss of token {at} is not finite")
        found = held(cache, model, ids.shape)
        check_rows(arm, found["rows_per_head"], ids.shape[1])
        steps = steps_left(model, ids.shape[1], decode_steps)
        rate = decode_rate(model, cache, ids[:, -1:].to(model.device), steps) if steps else None
    found |= {"seconds": seconds, "tokens_per_second": losses.numel() / seconds, "decode_tokens_per_second": rate}
    if accelerator is not None:
        found["device_peak_bytes"] = accelerator.max_memory_allocated(model.device)
    sums = losses.double().sum(1).tolist()
    return [{"nll_sum": nll, "scored_tokens": losses.shape[1], **found} for nll in sums]


def check_rows(arm: SuiteArm, rows_per_head: float, tokens: int) -> None:
    """Raises where a text of ``tokens`` left more rows per KV head, on average, than the arm's settings allow.

    What has come since the last compaction is one turn at most.
    """
    config = arm.config
    allowed = allowed_rows(config, tokens) if config.options.compresses else None
    if allowed is not None and rows_per_head > min(tokens, allowed + arm.stride):
        raise StoredTooMuchError(
            f"{arm.name} holds {rows_per_head:g} rows per KV head after {tokens} tokens; its settings "
            f"({config.describe()}) allow {allowed}, and what a turn of {arm.stride} brings"
        )


def held(cache: CompressedCache, model: PreTrainedModel, shape: torch.Size) -> Record:
    """What a cache stores now, a row of the batch on average, and what a stock cache would."""
    batch, tokens = shape
    stats = cache.stats()
    cells = sum(layer.storage.heads for layer in cache.layers)
    return {
        "stored_bytes": cache.nbytes / batch,
        "peak_bytes": stats["peak_nbytes"] / batch,
        "full_bytes": full_cache_bytes(model, tokens),
        "rows_per_head": stats["rows"] / cells,
        "peak_rows": stats["peak_rows"],
        "basis_bytes": stats["basis_nbytes"],
        "compactions": stats["compactions"],
        "backend": stats["backend"],
    }
