"""How much of a context survives compression, measured on what the model predicts.

Three measures, the teacher-forced ones on a frozen fork of the compressed cache:

* the loss of the gold answer (``answer_nll``), from which ``context_retention`` is built,
* the loss of, and the KL divergence on, the continuation of a long text (``continuation_score``),
* whether a planted fact is still said in a greedy answer (``contains_answer``).

Two protocols say what is in view while the cache is compressed: ``prompt`` compresses context and question together, as
LongBench does; ``context`` compresses the context before the question is known. Both see the same token ids, so that
their full-cache losses are comparable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from asymkv.compress import frozen_fork
from asymkv.longbench.models import input_device
from asymkv.longbench.prompts import Prompt

PROTOCOLS = ("prompt", "context")
_KL_BLOCK = 64


@dataclass(frozen=True)
class Prefix:
    """A compressed prefix: its cache and the logits [V] that follow its last token."""

    cache: Any
    last_logits: Tensor


@dataclass(frozen=True)
class Continuation:
    """Losses of one continuation: mean token loss, and against the full cache KL in nats and top-1 agreement."""

    nll: float
    kl: float
    agreement: float


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks with its bootstrap interval; a task without a positive denominator is NaN and left out."""

    value: float
    low: float
    high: float
    by_task: dict[str, float]
    rows: int


def split_prompt(prompt: Prompt, protocol: str) -> tuple[list[int], list[int]]:
    """Ids that are compressed under ``protocol``, and the prompt's ids that follow on the compressed cache."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; choose from {', '.join(PROTOCOLS)}")
    return (prompt.context_ids, prompt.question_ids) if protocol == "context" else (prompt.ids, [])


@torch.no_grad()
def compress(model: nn.Module, ids: Sequence[int]) -> Prefix:
    """Prefills ``ids`` with whatever cache the model makes for itself (a patched model compresses here)."""
    batch = torch.tensor([list(ids)], device=input_device(model))
    out = model(batch, logits_to_keep=1, use_cache=True)
    return Prefix(out.past_key_values, out.logits[0, -1])


@torch.no_grad()
def continuation_logits(model: nn.Module, prefix: Prefix, ids: Sequence[int], num_targets: int) -> Tensor:
    """Logits [num_targets, V] that predict the last ``num_targets`` of ``ids``, fed to a fork of the prefix."""
    fed = list(ids)[:-1]
    if num_targets > len(ids):
        raise ValueError(f"{num_targets} targets in {len(ids)} tokens")
    if not fed:
        return prefix.last_logits[None]
    batch = torch.tensor([fed], device=input_device(model))
    keep = min(num_targets, len(fed))
    logits = model(batch, past_key_values=frozen_fork(prefix.cache), use_cache=True, logits_to_keep=keep).logits[0]
    if num_targets == len(ids):
        logits = torch.cat([prefix.last_logits[None].to(logits), logits])
    return logits


def mean_nll(logits: Tensor, targets: Sequence[int]) -> float:
    """Mean loss in nats of ``targets`` under logits [T, V], in fp32."""
    goal = torch.tensor(list(targets), device=logits.device)
    return float(nn.functional.cross_entropy(logits.float(), goal))


def answer_nll(model: nn.Module, prefix: Prefix, rest: Sequence[int], answer: Sequence[int]) -> float:
    """Mean token loss of ``answer``, teacher-forced after ``rest`` on a fork of the compressed prefix."""
    logits = continuation_logits(model, prefix, [*rest, *answer], len(answer))
    return mean_nll(logits, answer)


def contains_answer(prediction: str, answers: Sequence[str]) -> bool:
    """Whether any reference answer occurs in the prediction, case ignored."""
    return any(answer.strip().lower() in prediction.lower() for answer in answers)


def kl_divergence(reference: Tensor, logits: Tensor) -> float:
    """Mean over positions of KL(softmax(reference) || softmax(logits)) in nats, logits [T, V], in fp32."""
    if reference.shape != logits.shape:
        raise ValueError(f"logits of different shapes: {tuple(reference.shape)} and {tuple(logits.shape)}")
    total = 0.0
    for full, other in zip(reference.split(_KL_BLOCK), logits.split(_KL_BLOCK), strict=True):
        log_p, log_q = full.float().log_softmax(-1), other.float().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
    return total / len(reference)


def continuation_score(logits: Tensor, reference: Tensor, targets: Sequence[int]) -> Continuation:
    """Scores logits [T, V] of ``targets`` against the full cache's logits on the same targets."""
    agreement = (logits.argmax(-1) == reference.argmax(-1)).float().mean()
    return Continuation(mean_nll(logits, targets), kl_divergence(reference, logits), float(agreement))


def text_windows(ids: Sequence[int], prefix: int, targets: int, count: int) -> list[tuple[list[int], list[int]]]:
    """``count`` evenly spread (prefix, targets) windows of a text; fewer where they would overlap, none if short."""
    span = prefix + targets
    count = min(count, len(ids) // span)
    room = len(ids) - span
    starts = [room * i // max(count - 1, 1) for i in range(count)]
    return [(list(ids[s : s + prefix]), list(ids[s + prefix : s + span])) for s in starts]


def context_retention(none: float, method: float, full: float) -> float:
    """R = (none - method) / (none - full) of one row's losses: 1 like the full cache, 0 like no context at all.

    NaN where the context does not lower the full cache's loss: such a row has nothing to retain.
    """
    return (none - method) / (none - full) if none > full else float("nan")


def retention_pairs(none: Sequence[float], method: Sequence[float], full: Sequence[float]) -> np.ndarray:
    """Rows [n, 2] of (none - method, none - full): numerator and denominator of context retention."""
    base = np.asarray(none, dtype=np.float64)
    return np.stack([base - np.asarray(method), base - np.asarray(full)], axis=1)


def paired_pairs(
    none: Sequence[float], reference: Sequence[float], method: Sequence[float], full: Sequence[float]
) -> np.ndarray:
    """Rows [n, 2] whose pooled ratio is R(method) - R(reference) on the same rows."""
    span = np.asarray(none, dtype=np.float64) - np.asarray(full)
    return np.stack([np.asarray(reference, dtype=np.float64) - np.asarray(method), span], axis=1)


def pooled_ratio(
    groups: Mapping[str, np.ndarray], *, samples: int = 2000, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Sum of numerators over sum of denominators within each task, then the plain mean over tasks.

    Context retention of a task is (sum of NLL_none - NLL_method) / (sum of NLL_none - NLL_full) over its rows, not the
    mean of the rows' own R: a row that hardly depends on its context has a denominator near 0 and would drown the rest.
    The interval is a percentile bootstrap that redraws rows within tasks, and the tasks stay fixed; a draw uses the
    same rows for numerator and denominator. The same seed and group sizes draw the same rows. One row a task has no
    interval (NaN).

    Args:
        groups: task to rows [n, 2] of (numerator, denominator).
        samples: bootstrap draws.
        level: coverage of the interval.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    by_task, draws, most = {}, [], 0
    for task in sorted(groups):
        rows = np.asarray(groups[task], dtype=np.float64).reshape(-1, 2)
        if not len(rows):
            continue
        by_task[task] = float(_ratio(rows.sum(0)))
        picks = rng.integers(len(rows), size=(samples, len(rows)))
        if np.isfinite(by_task[task]):
            draws.append(_ratio(rows[picks].sum(1)))  # [samples]
            most = max(most, len(rows))
    count = sum(len(rows) for rows in groups.values())
    if not draws:
        return Estimate(float("nan"), float("nan"), float("nan"), by_task, count)
    table = np.stack(draws)  # [tasks, samples]
    means = np.nanmean(table[:, ~np.isnan(table).all(0)], axis=0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    value = float(np.nanmean(list(by_task.values())))
    if most < 2:
        low = high = np.nan
    return Estimate(value, float(low), float(high), by_task, count)


def _ratio(sums: np.ndarray) -> np.ndarray:
    """Numerator over denominator of sums [..., 2], NaN where the denominator is not positive."""
    positive = sums[..., 1] > 0
    return np.where(positive, sums[..., 0] / np.where(positive, sums[..., 1], 1.0), np.nan)
