"""Prefill time, decode rate and peak memory of one arm at one context length, and the table of many.

A measurement runs in a process of its own (``scripts/bench_prefill_decode.py`` starts it), so that the process's peak
memory is the arm's. Nothing here asserts: numbers are reported with their conditions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import asymkv
from asymkv import CompressionConfig
from asymkv.longbench import models, runner
from asymkv.longbench.conditions import cpu_name
from asymkv.longbench.measure import Subject
from asymkv.longbench.memory import DeviceMemory, HostMemory, synchronize
from asymkv.longbench.retention import Prefix

STOCK = "stock"
PLAIN = "full"
MIB = 2**20
WARMUP_STEPS = 4

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class SpeedJob:
    """One measurement.

    Args:
        arm: name in the tables.
        config: keyword arguments of ``CompressionConfig``; None = the unpatched model on transformers' DynamicCache.
        model: short name, hub id, folder, or a model's config.json (random weights of that size).
        tokens: context length.
        chunk_size: tokens of a prefill chunk.
        decode_steps: tokens decoded after it; 0 = no decode.
        repeats: timed prefills and decodes.
        device: cpu, or an accelerator.
        dtype: of weights and cache.
        threads: torch threads.
    """

    arm: str
    config: dict[str, Any] | None
    model: str
    tokens: int
    chunk_size: int = 512
    decode_steps: int = 128
    repeats: int = 1
    device: str = "cpu"
    dtype: str = "bfloat16"
    threads: int = 1


def speed_arms(budget: int, chunk_size: int) -> dict[str, dict[str, Any] | None]:
    """The arms: stock cache, plain chunked prefill, each curvature, and the closed-form weights."""
    base = {"method": "asymkv", "budget": budget, "chunk_size": chunk_size}
    return {
        STOCK: None,
        PLAIN: {"method": "full", "chunk_size": chunk_size},
        **{f"asymkv-{name}": {**base, "curvature": name} for name in ("cardinality", "output", "loss")},
        "asymkv-output_error": {**base, "key_weights": "output_error", "pair_rule": "output_error"},
    }


def load_speed_model(job: SpeedJob) -> nn.Module:
    """The model in eval mode; random weights where the job names a config.json."""
    dtype, device = getattr(torch, job.dtype), torch.device(job.device)
    if job.model.endswith(".json"):
        config = AutoConfig.from_pretrained(job.model)
        with device:
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return models.load_model(models.resolve_spec(job.model, max_length=job.tokens), dtype=dtype, device=device)


@contextlib.contextmanager
def _patched(model: nn.Module, config: dict[str, Any] | None) -> Iterator[None]:
    if config is None:
        yield
        return
    with asymkv.replace(model.config.model_type, CompressionConfig(**config), model=model):
        yield


@torch.no_grad()
def prefill(model: nn.Module, ids: Tensor, job: SpeedJob) -> Prefix:
    """Prefills ids ``[1, t]``: a patched model chunks by itself, the stock cache is fed chunk by chunk."""
    if job.config is not None:
        out = model(ids, logits_to_keep=1, use_cache=True)
        return Prefix(out.past_key_values, out.logits[0, -1])
    cache = DynamicCache(config=model.config)
    for chunk in ids.split(job.chunk_size, dim=1):
        out = model(chunk, past_key_values=cache, logits_to_keep=1, use_cache=True)
    return Prefix(cache, out.logits[0, -1])


@torch.no_grad()
def decode(model: nn.Module, cache: Any, token: Tensor, steps: int) -> Tensor:
    """Greedy decoding of ``steps`` tokens on a cache, which grows; returns the last token ``[1, 1]``."""
    for _ in range(steps):
        logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
    return token


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of ``work``, the device's queue emptied before and after, and its result."""
    synchronize(device)
    started = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - started, result


def run_job(job: SpeedJob) -> Result:
    """Measures one arm at one length in this process."""
    torch.set_num_threads(job.threads)
    model, device = load_speed_model(job), torch.device(job.device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, job.tokens), generator=generator).to(device)
    result: Result = {"prefill_seconds": [], "decode_seconds": []}
    with _patched(model, job.config):
        warm = prefill(model, ids[:, : job.chunk_size // 2], job)
        decode(model, warm.cache, ids[:, :1], WARMUP_STEPS)
        del warm
        for _ in range(job.repeats):
            host, accelerator = HostMemory(), DeviceMemory(device)
            seconds, prefix = timed(device, lambda: prefill(model, ids, job))
            result["prefill_seconds"].append(seconds)
            # Of the first prefill: later ones meet a warm allocator.
            result = {**host.result(), **accelerator.result(), **_cache_bytes(prefix.cache), **result}
            if job.decode_steps:
                result["decode_seconds"].append(_timed_decode(model, prefix, job))
            del prefix
    return {"job": dataclasses.asdict(job), **result, "conditions": _conditions(model, job)}


def _timed_decode(model: nn.Module, prefix: Prefix, job: SpeedJob) -> float:
    token = decode(model, prefix.cache, prefix.last_logits.argmax().view(1, 1), WARMUP_STEPS)
    seconds, _ = timed(torch.device(job.device), lambda: decode(model, prefix.cache, token, job.decode_steps))
    return seconds


def _cache_bytes(cache: Any) -> Result:
    if isinstance(cache, asymkv.CompressedCache):
        stats = cache.stats()
        return {"stored_bytes": cache.nbytes, "peak_cache_bytes": stats["peak_nbytes"], "backend": stats["backend"]}
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return {"stored_bytes": held, "peak_cache_bytes": held, "backend": "transformers"}


def _conditions(model: nn.Module, job: SpeedJob) -> Result:
    spec = models.ModelSpec(Path(job.model).name, job.model, max(job.tokens, 2))
    subject = Subject(cast(Any, model), cast(Any, None), spec, frozenset())
    weights = "random" if job.model.endswith(".json") else "trained"
    found = runner.conditions(subject, runner.Ranks(0, 1, torch.device(job.device)))
    return {**found, "model": spec.name, "weights": weights, "dtype": job.dtype, "cpu": cpu_name()}


def medians(results: Iterable[Result]) -> list[Result]:
    """One entry per (length, arm): medians over all repeats and rounds, largest of the peaks, in order of appearance.

    ``prefill_over_plain`` is relative to plain chunked prefill, ``decode_over_stock`` to decoding on the stock cache,
    both at the same length.
    """
    groups: dict[tuple[int, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result["job"]["tokens"], result["job"]["arm"]), []).append(result)
    table = {key: _median(*key, found) for key, found in groups.items()}
    for (tokens, _), row in table.items():
        plain, stock = table.get((tokens, PLAIN)), table.get((tokens, STOCK))
        row["prefill_over_plain"] = row["prefill_seconds"] / plain["prefill_seconds"] if plain else None
        has_rates = stock is not None and stock["decode_rate"] and row["decode_rate"]
        row["decode_over_stock"] = row["decode_rate"] / stock["decode_rate"] if stock and has_rates else None
    return list(table.values())


def _median(tokens: int, arm: str, results: Sequence[Result]) -> Result:
    prefills = [seconds for result in results for seconds in result["prefill_seconds"]]
    rates = [result["job"]["decode_steps"] / s for result in results for s in result["decode_seconds"]]
    peaks = ("peak_rss_bytes", "peak_rss_increase_bytes", "peak_cache_bytes", "stored_bytes")
    device = ("device_peak_bytes", "device_peak_increase_bytes")
    return {
        "tokens": tokens,
        "arm": arm,
        "samples": len(prefills),
        "prefill_seconds": statistics.median(prefills),
        "prefill_range": [min(prefills), max(prefills)],
        "decode_rate": statistics.median(rates) if rates else None,
        "decode_range": [min(rates), max(rates)] if rates else None,
        **{name: max(result[name] for result in results) for name in peaks},
        **{name: max(result[name] for result in results) for name in device if name in results[0]},
        "backend": results[0]["backend"],
    }


def markdown(results: Sequence[Result]) -> str:
    """Table and conditions."""
    rows = medians(results)
    on_device = any("device_peak_increase_bytes" in row for row in rows)
    peak = "device_peak_increase_bytes" if on_device else "peak_rss_increase_bytes"
    header = ["tokens", "arm", "prefill s (range)", "x plain", f"{'device' if on_device else 'RSS'} peak increase MiB"]
    header += ["peak cache MiB", "stored MiB", "decode tok/s (range)", "x stock", "backend"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [str(row["tokens"]), row["arm"], _ranged(row["prefill_seconds"], row["prefill_range"])]
        cells += [_ratio(row["prefill_over_plain"])]
        cells += [f"{row[name] / MIB:.1f}" for name in (peak, "peak_cache_bytes", "stored_bytes")]
        cells += [_ranged(row["decode_rate"], row["decode_range"]), _ratio(row["decode_over_stock"]), row["backend"]]
        lines.append("| " + " | ".join(cells) + " |")
    parts = ["# Prefill and decode", conditions_text(results), "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _ranged(value: float | None, bounds: Sequence[float] | None) -> str:
    return "–" if value is None or bounds is None else f"{value:.2f} ({bounds[0]:.2f}–{bounds[1]:.2f})"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def conditions_text(results: Sequence[Result]) -> str:
    """What the numbers hold for; values that differ between processes stand side by side."""
    lines = ["Medians over repeats, a process per arm; 'plain' is chunked prefill without compaction in equal chunks."]
    names = [name for name in results[0]["conditions"] if name not in ("date", "world_size")]
    for name in names:
        values = dict.fromkeys(json.dumps(result["conditions"].get(name)).strip('"') for result in results)
        lines.append(f"- {name}: {' | '.join(values)}")
    for name in ("chunk_size", "decode_steps"):
        lines.append(f"- {name}: {results[0]['job'][name]}")
    configs = {result["job"]["arm"]: result["job"]["config"] for result in results}
    lines += [f"- {arm}: {json.dumps(config)}" for arm, config in configs.items() if config]
    return "\n".join(lines)
