"""What the contracts are checked on: every method's defaults, every shipped settings file, and runs of a tiny model."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

import yaml
from tiny_models import OPTIONS, head_scores, prompt, tiny_model
from torch import Tensor, nn
from zack_bases import even_model, zack

import asymkv
from asymkv import CompressedCache, CompressionConfig
from asymkv.budgets import SLACK_ROWS
from asymkv.methods import METHODS
from asymkv.paths import config_root

LAYERS, HEADS, HEAD_DIM = 2, 2, 16
TOKENS, BUDGET, CHUNK, STEPS, TURN = 140, 48, 32, 6, 40
SHIPPED = sorted(p.stem for p in (config_root() / "methods").glob("*.yaml"))
# Settings that no file ships: mergers that count what they merge, and other splits.
EXTRA = {
    "aagc_derotate": {"method": "aagc", "rope_mode": "derotate", "kmeans_iters": 3},
    "aagc_ema": {"method": "aagc", "kmeans_update": "ema", "count_bias": False, "kmeans_learning_rate": 0.3},
    "aagc_global": {"method": "aagc", "score_scope": "global"},
    "aagc_layer": {"method": "aagc", "score_scope": "layer"},
    "aagc_options": {"method": "aagc", "evict_centroids": True, "exposure_fix": True, "importance": True},
    "asymkv_error": {"method": "asymkv", "key_weights": "output_error", "pair_rule": "output_error"},
    "asymkv_global": {"method": "asymkv", "layer_budgets": "global"},
    "asymkv_mean": {"method": "asymkv", "merged_position": "mean", "key_weights": "attention"},
    "asymkv_post": {"method": "asymkv", "merged_keys": "post_rope", "merged_position": "mean"},
    "asymkv_symmetric_attention": {"method": "asymkv_symmetric", "key_weights": "attention"},
    "cam_counts": {"method": "cam", "count_bias": True, "deterministic": True},
    "chunkkv_knorm": {"method": "chunkkv", "scorer": "knorm", "window_size": 8},
    "d2o_counts": {"method": "d2o", "count_bias": True},
    "echo_both": {"method": "echo", "action": "both", "window_size": 8},
    "echo_error": {"method": "echo", "action": "both", "currency": "output_error", "level": "layer"},
    "echo_mean": {"method": "echo", "action": "merge", "merged_position": "mean", "level": "pair_uniform"},
    "echo_post": {"method": "echo", "action": "merge", "merged_keys": "post_rope", "level": "pair_uniform"},
    "echo_fisher": {"method": "echo", "action": "merge", "merged_weights": "loss", "level": "pair_uniform"},
    "echo_newton": {"method": "echo", "action": "both", "merged_weights": "output", "level": "layer"},
    "echo_shares": {"method": "echo", "action": "merge", "merged_weights": "output_error", "merged_keys": "post_rope"},
    "echo_range": {"method": "echo", "over": "range"},
    "h2o_global": {"method": "h2o", "layer_budgets": "global"},
    "h2o_variance": {"method": "h2o", "layer_budgets": "variance"},
    "kvmerger_counts": {"method": "kvmerger", "count_bias": True},
    "razor_unbiased": {"method": "razor", "count_bias": False, "mean_after_rope": False},
    "asymkv_zack": {"method": "asymkv", "dimensions": zack(), "key_weights": "output_error"},
    "criticalkv_zack": {"method": "criticalkv", "dimensions": zack(ranks="energy", multiple=2, least=2)},
    "kvzip_zack": {"method": "kvzip", "plus": True, "dimensions": zack(0.75)},
    "value_merge_counts": {"method": "value_merge", "count_bias": True, "threshold": -1.0},
}
SETTINGS = [*METHODS, *(name for name in SHIPPED if name not in METHODS), *EXTRA]
# Published numbers that a prompt of this size would never reach, scaled down.
SMALL: dict[str, dict[str, Any]] = {
    "zack": {"dimensions": zack()},
    "snapkv_zack": {"dimensions": zack(fold=True)},
    "aagc_seed": {"num_clusters": 12},
    "asymkv_upstream": {"chunk_size": CHUNK},
    "duo_attention_paper": {"sink_size": 4, "recent_size": 12, "window_size": 8},
    "razor_paper": {"least_recent": 12, "window_size": 8},
    "kvpress_kvzip": {"prefix": 6},
    "kvzip_paper": {"prefix": 4},
}


def settings_of(name: str, **overrides: Any) -> CompressionConfig:
    """A setting for the tiny model; windows that leave no room in the budget are 8."""
    base = EXTRA.get(name) or ({"method": name} if name in METHODS else {})
    file = {} if base else yaml.safe_load((config_root() / "methods" / f"{name}.yaml").read_text(encoding="utf-8"))
    method = {**base, **file}["method"]
    given = {**base, **OPTIONS.get(method, {}), **head_scores(METHODS[method]), **SMALL.get(name, {}), **overrides}
    load = CompressionConfig if base else functools.partial(CompressionConfig.load, name)
    config = load(**{**given, "budget": 4096, "ratio": None})
    if "window_size" not in overrides and config.minimum_rows > BUDGET * 2 // 3 and config.window_size > 8:
        given["window_size"] = 8
    return load(**given)


def is_whole(config: CompressionConfig) -> bool:
    return "whole_prompt" in config.options.needs


def sized(name: str, *, chunk: int | str = CHUNK, **overrides: Any) -> CompressionConfig:
    """The setting at the budget of these tests; kvpress' settings by their ratio, as they are used."""
    asked = {"ratio": BUDGET / TOKENS} if name.startswith("kvpress") else {"budget": BUDGET}
    if {"budget", "ratio"} & set(overrides):
        asked = {}
    config = settings_of(name, **asked, **overrides)
    if is_whole(config) or not config.options.compresses or config.chunk_size is not None and chunk == CHUNK:
        return config
    return config.replace(chunk_size=chunk)


@functools.cache
def model_of(kind: str = "plain") -> nn.Module:
    """A tiny llama; "even": every query scores every key alike."""
    return even_model() if kind == "even" else tiny_model()


@dataclass
class Talk:
    """Caches of one conversation: after the prompt, after one token, after ``STEPS``, after a second turn."""

    config: CompressionConfig
    prompt: CompressedCache
    token: CompressedCache
    decoded: CompressedCache
    turn: CompressedCache

    def stages(self) -> dict[str, CompressedCache]:
        return {"prompt": self.prompt, "token": self.token, "decode": self.decoded, "turn": self.turn}


@functools.cache
def talk(name: str) -> Talk:
    """A prompt of TOKENS, STEPS generated tokens, a turn of TURN; decode compacts every 4 tokens where it may."""
    config = sized(name)
    if config.decode_interval and config.decode_interval > 4:
        config = config.replace(decode_interval=4)
    model, ids = model_of(), prompt(TOKENS + STEPS + TURN)
    with asymkv.replace("llama", config, model=model):
        out = model(ids[:, :TOKENS])
        cache, caches = out.past_key_values, []
        for end in (TOKENS, TOKENS + 1, TOKENS + STEPS):
            while cache.get_seq_length() < end:
                at = cache.get_seq_length()
                model(ids[:, at : at + 1], past_key_values=cache)
            caches.append(cache.fork())
        model(ids[:, TOKENS + STEPS :], past_key_values=cache)
    return Talk(config, *caches, cache)


def full_rows(tokens: int, name: str) -> CompressedCache:
    """Every row of a prompt, read at once, in the dimensions of a setting."""
    dimensions = settings_of(name, budget=600).dimensions
    return _full_rows(tokens, None if dimensions is None else json.dumps(dimensions))


@functools.cache
def _full_rows(tokens: int, dimensions: str | None) -> CompressedCache:
    model = model_of()
    rows = None if dimensions is None else json.loads(dimensions)
    with asymkv.replace("llama", model=model, method="full", dimensions=rows):
        return model(prompt(TOKENS + STEPS + TURN)[:, :tokens]).past_key_values


@functools.cache
def one_shot(name: str) -> CompressedCache:
    """The prompt read at once, then compressed."""
    model = model_of()
    with asymkv.replace("llama", sized(name, chunk="prompt"), model=model):
        return model(prompt(TOKENS + STEPS + TURN)[:, :TOKENS]).past_key_values


def held(cache: CompressedCache) -> int:
    """Rows of all layers and heads."""
    return sum(int(cache.num_rows(layer).sum()) for layer in range(LAYERS))


def heads_of(cache: CompressedCache, *names: str) -> list[tuple[int, int, list[Tensor]]]:
    """Layer, KV head, and the named columns of the only sequence."""
    return [(layer, head, [getattr(cache, name)(layer)[0][head] for name in names])
            for layer in range(LAYERS) for head in range(HEADS)]  # fmt: skip


def owned_bytes(layer: Any) -> dict[int, int]:
    """Every buffer that is reachable from a layer, but for what belongs to the model: address -> bytes."""
    found: dict[int, int] = {}

    def walk(x: Any) -> None:
        if isinstance(x, Tensor):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, dict):
            for value in x.values():
                walk(value)
        elif isinstance(x, (list, tuple)):
            for value in x:
                walk(value)
        elif type(x).__module__.startswith("asymkv"):
            walk(vars(x))

    walk({k: v for k, v in vars(layer).items() if k not in ("output_weight", "learned")})
    found.pop(0, None)  # empty
    return found


def spare(rows: int) -> int:
    """Spare rows that a head may have."""
    return max(SLACK_ROWS, rows // 8)
