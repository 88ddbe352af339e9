"""Milliseconds per decoded token and peak memory of a whole model at long contexts, on a cache filled with random rows.

No context is prefilled, so that 128k tokens cost seconds: the stock cache holds a random row per token, ours ``budget``
random rows per KV head whose cardinalities sum to the context. A cell runs in a process of its own
(``scripts/bench_model.py`` starts it), so that its peak memory is its own. Nothing here asserts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, PreTrainedModel

import asymkv
from asymkv import CompressedCache, CompressionConfig
from asymkv.longbench import models
from asymkv.longbench.memory import DeviceMemory, HostMemory
from asymkv.longbench.speed import MIB, decode, timed

OURS, STOCK = "asymkv", "DynamicCache"
ARMS = (STOCK, OURS)
OUT_OF_MEMORY = "out of memory"
WARMUP_STEPS = 4
CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072)

# Models by name whose weights are drawn at random: what a token costs does not depend on them.
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b-random": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
    "smollm2-random": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "max_position_embeddings": 8192,
        "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement.

    Args:
        arm: one of ``ARMS``.
        model: a key of ``RANDOM_MODELS``, short name, hub id or folder.
        batch: sequences.
        context: tokens seen before decoding begins.
        budget: rows per KV head of the compressed cache.
        steps: timed tokens; a multiple of ``decode_interval`` (128) spreads the compressed arm's compactions fairly.
        device: cpu, or an accelerator.
        dtype: of weights and cache.
        threads: torch threads.
    """

    arm: str
    model: str
    batch: int
    context: int
    budget: int = 2048
    steps: int = 128
    device: str = "cpu"
    dtype: str = "bfloat16"
    threads: int = 1


def load_model(name: str, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model in eval mode; random weights, made on the device, for the names of ``RANDOM_MODELS``."""
    if name not in RANDOM_MODELS:
        # Nothing is prompted here, so that any limit does.
        return models.load_model(models.resolve_spec(name, max_length=2), dtype=dtype, device=device)
    from transformers import AutoModelForCausalLM

    with device:
        return AutoModelForCausalLM.from_config(LlamaConfig(**RANDOM_MODELS[name]), dtype=dtype).eval()


def cardinalities(heads: int, rows: int, context: int) -> Tensor:
    """``[heads, rows]`` int64: random sizes of groups that share ``context`` tokens, at least one each."""
    generator = torch.Generator().manual_seed(0)
    cuts = [torch.randperm(context - 1, generator=generator)[: rows - 1].sort().values + 1 for _ in range(heads)]
    edges = torch.nn.functional.pad(torch.stack(cuts), (1, 0))
    return torch.nn.functional.pad(edges, (0, 1), value=context).diff(dim=-1)


def _random_rows(model: PreTrainedModel, batch: int, rows: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[batch, H_kv, rows, D]`` of one layer, drawn in place: no second copy of another dtype."""
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (batch, config.num_key_value_heads, rows, dim)
    keys, values = (torch.empty(shape, dtype=model.dtype, device=model.device).normal_() for _ in range(2))
    return keys, values


def stock_cache(model: PreTrainedModel, batch: int, context: int) -> DynamicCache:
    """A stock cache after ``context`` random tokens."""
    cache = DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        cache.update(*_random_rows(model, batch, context), layer)
    return cache


def compressed_cache(
    model: PreTrainedModel, config: CompressionConfig, batch: int, context: int, rows: int
) -> CompressedCache:
    """A cache as a compaction leaves it after a prompt of ``context`` tokens, with random rows.

    Args:
        rows: per KV head; their cardinalities sum to ``context``, positions are those of each group's last token.

    Raises:
        ValueError: for more rows than tokens.
    """
    if not 1 <= rows <= context:
        raise ValueError(f"rows must be from 1 to the {context} tokens of the context; found {rows}")
    cache = CompressedCache.for_model(config, model)
    n = cardinalities(batch * cache.shape.kv_heads, rows, context).to(model.device)
    for layer in cache.layers:
        layer.append(*_random_rows(model, batch, rows))
        layer.storage.write("cardinality", n)
        layer.storage.write("log_n", n.float().log())
        layer.storage.write("position", n.cumsum(-1) - 1)
        layer.storage.merged = rows < context
        layer.tokens, layer.columns_seen = [context] * batch, context
    cache.prompt_tokens, cache.pending = [context] * batch, [0] * batch
    cache.tail = torch.zeros(batch, 0, dtype=torch.bool)
    return cache


@contextlib.contextmanager
def _cache_of(cell: Cell, model: PreTrainedModel, *, warmup: bool = False) -> Iterator[Any]:
    """The cell's filled cache, the model patched for it if it is ours; one to warm up on is small or compacts soon."""
    if cell.arm == STOCK:
        yield stock_cache(model, cell.batch, 2 * WARMUP_STEPS if warmup else cell.context)
        return
    config = CompressionConfig(method="asymkv", budget=cell.budget)
    config = config.replace(decode_interval=WARMUP_STEPS) if warmup else config
    with asymkv.replace(model.config.model_type, config, model=cast(nn.Module, model)):
        yield compressed_cache(model, config, cell.batch, cell.context, min(cell.budget, cell.context))


def measure(cell: Cell) -> dict[str, str]:
    """Runs one cell in this process: values of its row in the table.

    Memory counts from the loaded model on; its peak is that of decoding, not of drawing random rows.
    """
    torch.set_num_threads(cell.threads)
    device = torch.device(cell.device)
    model = load_model(cell.model, dtype=getattr(torch, cell.dtype), device=device)
    token = torch.ones(cell.batch, 1, dtype=torch.long, device=device)
    with torch.no_grad():
        model(token, use_cache=False)  # pages of weights and scratch of the kernels are no cache's
    # Before the warm-up: what an allocator keeps of its cache must not hide what the cell's takes.
    start = (HostMemory(), DeviceMemory(device))
    with _cache_of(cell, model, warmup=True) as cache:
        decode(model, cache, token, WARMUP_STEPS)
    del cache
    with _cache_of(cell, model) as cache:
        filled = (HostMemory(), DeviceMemory(device))
        token = decode(model, cache, token, WARMUP_STEPS)
        seconds = _timed_steps(cell, model, cache, token)
        held, backend = _held(cache)
        return {
            "status": "ok",
            "ms per token": f"{statistics.mean(seconds) * 1e3:.2f}",
            "median ms": f"{statistics.median(seconds) * 1e3:.2f}",
            "peak MiB": f"{_peak(device, start, filled) / MIB:.1f}",
            "cache MiB": f"{held / MIB:.1f}",
            "backend": backend,
        }


def _timed_steps(cell: Cell, model: PreTrainedModel, cache: Any, token: Tensor) -> list[float]:
    """Seconds of each decoded token."""
    out = []
    for _ in range(cell.steps):
        seconds, _ = timed(torch.device(cell.device), lambda: decode(model, cache, token, 1))
        out.append(seconds)
    return out


def _peak(device: torch.device, start: tuple[Any, Any], filled: tuple[Any, Any]) -> int:
    """Bytes at the peak of decoding on top of those before the cache was filled."""
    if device.type == "cpu":
        return filled[0].peak() - start[0].before
    return filled[1].result()["device_peak_bytes"] - start[1].before


def _held(cache: Any) -> tuple[int, str]:
    """Bytes of the cache, and who computes attention on it."""
    if isinstance(cache, CompressedCache):
        return cache.nbytes, cache.backend
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers), "transformers"


def guarded(cell: Cell) -> dict[str, str]:
    """As :func:`measure`; a cell that does not fit the memory says so instead of failing."""
    try:
        return measure(cell)
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError, and so is the CPU's
        if not is_out_of_memory(error):
            raise
        return out_of_memory()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on an accelerator or on the host."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")  # the last is cuBLAS's
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def out_of_memory() -> dict[str, str]:
    """The row of a cell that did not fit."""
    names = ("ms per token", "median ms", "peak MiB", "cache MiB", "backend")
    return {"status": OUT_OF_MEMORY, **dict.fromkeys(names, "")}


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Time per token and peak memory against context, a line per arm and batch; cells that did not fit are missing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(14, 5))
    for axis, column in zip(axes, ("ms per token", "peak MiB"), strict=True):
        series: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if row["status"] == "ok":
                label = f"{row['model']}, {row['dtype']}, batch {row['batch']}, {row['arm']}"
                series.setdefault(label, []).append((int(row["context"]), float(row[column])))
        for label, points in series.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        axis.set(xlabel="context, tokens", ylabel=column, xscale="log", yscale="log")
        axis.legend(fontsize=6)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
