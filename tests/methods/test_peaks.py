"""Rows that are stored never exceed budget and chunk, counted in the buffers."""

import pytest
import torch
from contract_runs import (
    BUDGET,
    CHUNK,
    HEADS,
    LAYERS,
    SETTINGS,
    STEPS,
    TOKENS,
    TURN,
    is_whole,
    model_of,
    settings_of,
    sized,
)
from tiny_models import prompt, tiny_model

import asymkv
from asymkv import CompressedCache

CELLS = LAYERS * HEADS
# Published shares ask for no budget.
UNBOUNDED = {"duo_attention_paper", "razor_paper"}


def bounded(name):
    config = settings_of(name, budget=600)
    return config.options.compresses and config.chunk and not is_whole(config) and name not in UNBOUNDED


@pytest.fixture
def most(monkeypatch):
    """Rows of all layers and heads together, at every append and compaction."""
    counts, measure = [], CompressedCache.measure

    def count(cache, layer):
        measure(cache, layer)
        counts.append(sum(sum(each.storage.length) for each in cache.layers if each.is_initialized))

    monkeypatch.setattr(CompressedCache, "measure", count)
    return counts


@pytest.mark.parametrize("name", filter(bounded, SETTINGS))
def test_rows_never_exceed_budget_and_chunk(name, most):
    """On the average of all heads, through a prompt, generated tokens and a second turn."""
    config, ids, cache, at = sized(name, chunk=CHUNK, budget=BUDGET), prompt(TOKENS + STEPS + TURN), None, 0
    with asymkv.replace("llama", config, model=model_of()), torch.no_grad():
        for count in [TOKENS, *[1] * STEPS, TURN]:
            cache = model_of()(ids[:, at : at + count], past_key_values=cache).past_key_values
            at += count
    spared = CHUNK if name == "asymkv_upstream" else 0  # its last chunk stays whole
    assert max(most) <= CELLS * (BUDGET + config.chunk + spared)
    assert cache.peak_rows <= BUDGET + config.chunk + spared
    if cache.layers_share:
        assert cache.peak_rows == -(-max(most) // CELLS)
    if cache.deferred:
        assert cache.peak_rows == max(most) / CELLS


@pytest.mark.parametrize("setting", [
    {"layer_budgets": {"kind": "pyramid", "beta": 20, "variant": "kvpress"}},
    {"layer_budgets": {"kind": "pyramid", "beta": 20}},
    {"head_budgets": {"kind": "headkv", "beta": 1, "file": [[9 - i] * 2 for i in range(8)]}},
], ids=["pyramid, kvpress", "pyramid", "headkv"])  # fmt: skip
def test_the_peak_may_lie_between_the_first_and_the_last_layer(setting, most):
    """Upper layers shrink while lower ones grow: no layer's append alone tells the most of a forward."""
    settings = {"method": "knorm", "budget": 64, "sink_size": 0, "window_size": 8, "chunk_size": 60, **setting}
    model = tiny_model(num_hidden_layers=8)
    with asymkv.replace("llama", model=model, **settings), torch.no_grad():
        cache = model(prompt(300)).past_key_values
    assert cache.peak_rows == -(-max(most) // (8 * 2))


@pytest.mark.parametrize("layer_budgets", ["pyramid", "global"])
def test_rows_that_layers_share_are_counted_anew(layer_budgets):
    """After a compaction, and after whatever changes layers without a forward; a fork counts for itself."""
    model = tiny_model(num_hidden_layers=4)
    settings = {"method": "knorm", "budget": 64, "window_size": 8, "decode_interval": 4, "layer_budgets": layer_budgets}

    def check(cache):
        model(prompt(1, batch=len(cache.prompt_tokens)), past_key_values=cache)
        held = [sum(sum(layer.heads_of(row)) for layer in cache.layers) for row in range(len(cache.prompt_tokens))]
        assert cache.rows_that_share(cache.layers[-1], 0) == -(-max(held) // (4 * 2))

    with asymkv.replace("llama", model=model, **settings), torch.no_grad():
        cache = model(prompt(300, batch=3)).past_key_values
        for _ in range(6):
            check(cache)
        fork = cache.fork()
        for change in (lambda: cache.crop(-1), lambda: cache.batch_select_indices(torch.tensor([2, 0])),
                       lambda: cache.batch_repeat_interleave(2), lambda: None):  # fmt: skip
            change()
            check(cache)
        check(fork)


def test_counting_bytes_makes_no_table():
    """A table is a copy to the device, once a layer and token."""
    model = tiny_model()
    with asymkv.replace("llama", model=model, method="h2o", budget=64, window_size=8, backend="reference"):
        cache = model(prompt(100)).past_key_values
    storage = cache.layers[0].storage
    storage._tables.clear()
    before = storage.nbytes
    assert not storage._tables
    for name in ("start", "length", "capacity"):
        assert storage.table(name).untyped_storage().nbytes() == 8 * storage.heads
    assert storage.nbytes == before
