"""Contracts that every method and every shipped settings file keeps; what a published form cannot keep is named."""

import functools
from itertools import product

import pytest
import torch
from contract_runs import (
    BUDGET,
    HEAD_DIM,
    HEADS,
    LAYERS,
    SETTINGS,
    STEPS,
    TOKENS,
    TURN,
    full_rows,
    heads_of,
    held,
    is_whole,
    model_of,
    one_shot,
    owned_bytes,
    settings_of,
    sized,
    spare,
    talk,
)
from tiny_models import OPTIONS, assert_close, assert_same_rows, prompt

import asymkv
from asymkv.methods import METHODS
from asymkv.replay_scores import CURVATURE, PAIR, SCORE, SHARE

CELLS = LAYERS * HEADS
# Rows may differ from the budget, and by how many in the whole cache: (fewer, more); None = the budget is not asked.
ROWS = {
    # What is kept is folded at once, and the head fills up again.
    **dict.fromkeys(["aagc", "aagc_derotate", "aagc_ema", "aagc_global", "aagc_layer"], (BUDGET * CELLS, 0)),
    **dict.fromkeys(["aagc_options", "aagc_seed"], (BUDGET * CELLS, 0)),
    "asymkv_upstream": (0, 32 * CELLS),  # the last chunk stays whole
    "duo_attention_paper": None,  # published shares
    "razor_paper": None,
    "kvpress_chunkkv": (20 * CELLS, 20 * CELLS),  # whole chunks of 20
    "kvpress_pyramidkv": (CELLS, CELLS),  # every layer rounds by itself
    "kvpress_kvzip": (0, CELLS),  # one share of all rows
    "kvzip_head": (TOKENS * CELLS, 0),  # whole heads
}
# Nothing but chunks is protected: the window's chunk ranks highest, and may be cut from by the ratio.
UNPROTECTED = {"kvpress_chunkkv"}
# What a merger changes beside the rows that it merges.
MERGERS = {"aagc", "asymkv", "asymkv_symmetric", "cam", "d2o", "kvmerger", "razor", "value_merge"}
KEYS_STAY = {"cam", "cam_streaming", "cam_counts", "value_merge", "value_merge_counts"}
# Cardinalities of a head sum to its tokens.
COUNTS_ALL = {"asymkv", "asymkv_zack", "asymkv_adaptive", "asymkv_paper", "asymkv_error", "asymkv_global",
              "asymkv_mean", "asymkv_post",
              "echo_fisher", "echo_mean", "echo_post", "echo_shares", "kvmerger_counts", "razor", "razor_paper",
              "value_merge_counts",
              "full"}  # fmt: skip
# A cardinality counts tokens, and some tokens are dropped with theirs.
COUNTS_SOME = {"aagc", "aagc_derotate", "aagc_global", "aagc_layer", "aagc_options", "asymkv_upstream", "cam_counts",
               "d2o_counts", "echo_both", "echo_error", "echo_newton"}  # fmt: skip


@functools.cache
def compresses(name):
    return settings_of(name, budget=600).options.compresses


COMPRESSING = [name for name in SETTINGS if compresses(name)]
COUNTING = COUNTS_ALL | COUNTS_SOME
EVICTORS = [n for n in COMPRESSING if settings_of(n, budget=600).method not in MERGERS and n not in COUNTING]
CHUNKED = [name for name in COMPRESSING if not is_whole(settings_of(name, budget=600))]


def test_every_exception_names_a_setting():
    for table in (ROWS, UNPROTECTED, KEYS_STAY, COUNTS_ALL, COUNTS_SOME):
        assert set(table) <= set(SETTINGS)
    assert {settings_of(name, budget=600).method for name in SETTINGS} == set(METHODS)


# -- one conversation, many properties -------------------------------------------------------------------------------
def asked_rows(name, stage):
    """Rows that the whole cache is to hold after a compaction at that stage."""
    config = talk(name).config
    tokens = TOKENS + (TURN if stage == "turn" else 0)
    answers = getattr(talk(name), stage).tokens_seen.item() - tokens if stage == "turn" else 0
    on_top = answers if config.ratio and config.options.keeps_generated else 0
    return CELLS * (int(config.ratio * tokens + 1e-9) + on_top if config.ratio else BUDGET)


@pytest.mark.parametrize("name", COMPRESSING)
def test_rows_meet_the_budget(name):
    """Exactly, after a compaction; in between, generated tokens come on top."""
    if ROWS.get(name, ()) is None:
        return
    fewer, more = ROWS.get(name, (0, 0))
    found = talk(name)
    interval = found.config.decode_interval
    for stage, cache in found.stages().items():
        added = {"prompt": 0, "token": 1, "decode": STEPS, "turn": 0}[stage]
        if interval:
            added %= interval
        asked = asked_rows(name, stage)
        assert asked - fewer + added * CELLS <= held(cache) <= asked + more + added * CELLS, stage
    assert held(one_shot(name)) <= asked_rows(name, "prompt") + max(more, 0) or name == "asymkv_upstream"


@pytest.mark.parametrize("name", SETTINGS)
def test_bytes_are_what_the_buffers_take(name):
    for stage, cache in talk(name).stages().items():
        for layer, table in product(cache.layers, ("start", "length", "capacity")):
            layer.storage.table(table)  # made where first asked for
        buffers = {cache.tail.data_ptr(): cache.tail.untyped_storage().nbytes()}
        for layer in cache.layers:
            buffers |= owned_bytes(layer)
        assert cache.nbytes == sum(buffers.values()), stage
        statistics = sum(c.element_size() * c[0].numel() for n, c in cache.layers[0].storage.columns.items()
                         if n not in ("keys", "values", "cardinality", "log_n", "position"))  # fmt: skip
        widths = [sum(layer.storage.columns[n].shape[1] for n in ("keys", "values")) for layer in cache.layers]
        assert cache.config.dimensions or set(widths) == {2 * HEAD_DIM}
        row = sum(widths) / LAYERS * 4 + 12 + statistics
        assert cache.shape.row_bytes >= row, "a byte budget counts every column"


@pytest.mark.parametrize("name", COMPRESSING)
def test_compaction_frees_memory(name):
    cache = talk(name).prompt
    if not cache.compactions or cache.config.options.needs & {"replay"}:
        return
    rows = [n for layer in range(LAYERS) for n in cache.num_rows(layer)[0].tolist()]
    tables = LAYERS * 3 * 8 * HEADS
    taken = sum(layer.storage.nbytes for layer in cache.layers)
    assert taken <= (sum(rows) + sum(map(spare, rows))) * cache.shape.row_bytes + tables


@pytest.mark.parametrize("name", COMPRESSING)
def test_sinks_and_window_survive(name):
    if name in UNPROTECTED:
        return
    found = talk(name)
    sink, window = found.config.sink_size, found.config.window_size
    for stage, cache in found.stages().items():
        seen = int(cache.tokens_seen[0])
        wanted = {*range(sink), *range(seen - window, seen)}
        for layer, head, (positions,) in heads_of(cache, "positions"):
            assert wanted <= set(positions.tolist()), (stage, layer, head)


@pytest.mark.parametrize("name", SETTINGS)
def test_positions_ascend_and_follow_the_tokens(name):
    found = talk(name)
    for stage, cache in found.stages().items():
        seen = int(cache.tokens_seen[0])
        assert seen == TOKENS + {"prompt": 0, "token": 1, "decode": STEPS, "turn": STEPS + TURN}[stage]
        for _, _, (positions, n) in heads_of(cache, "positions", "cardinality"):
            assert (positions.diff() > 0).all() and (positions >= 0).all() and (positions < seen).all()
            assert len(positions) == len(n) and (n >= 1).all()
            if found.config.window_size and name not in UNPROTECTED:
                assert positions[-1] == seen - 1


@pytest.mark.parametrize("name", SETTINGS)
def test_the_next_token_stands_behind_all_tokens_seen(name):
    """Its row's position, and the rotation of its key: behind the tokens, or behind the rows where those close up."""
    found = talk(name)
    if found.config.decode_interval == 1 and not found.config.window_size:
        return
    before, after = found.prompt, found.token
    ref = full_rows(TOKENS + 1, name)
    for head in range(HEADS):  # of layer 0: its keys are the embedding's alone
        assert after.positions(0)[0][head][-1] == TOKENS
        n = before.cardinality(0)[0][head]
        at = {"original": TOKENS, "compact": len(n), "cardinality": int(n.sum())}[found.config.positions]
        if after.num_rows(0)[0, head] > len(n):  # no compaction since
            key = ref.rope.rotate(ref.keys(0)[0][head][-1:], torch.tensor([at - TOKENS]))
            assert_close("key", key, after.keys(0)[0][head][-1:], 1e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_cardinalities_are_honest(name):
    for stage, cache in talk(name).stages().items():
        seen = int(cache.tokens_seen[0])
        for _, _, (n,) in heads_of(cache, "cardinality"):
            if name in COUNTS_ALL:
                assert int(n.sum()) == seen, stage
            elif name in COUNTS_SOME:
                assert len(n) <= int(n.sum()) <= seen, stage
            else:
                assert (n == 1).all(), stage
        if name in COUNTS_ALL | COUNTS_SOME and compresses(name) and cache.compactions:
            assert max(int(n.max()) for _, _, (n,) in heads_of(cache, "cardinality")) > 1


@pytest.mark.parametrize("name", COMPRESSING)
def test_rows_that_stay_keep_their_bits(name):
    """Against every row of the same prompt; a policy that moves rows turns their keys."""
    cache, ref = one_shot(name), full_rows(TOKENS, name)
    config, evicts = cache.config, name in EVICTORS
    columns = ("positions", "cardinality", "keys", "values")
    for (layer, _, found), (_, _, (_, _, keys, values)) in zip(heads_of(cache, *columns), heads_of(ref, *columns),
                                                                strict=True):  # fmt: skip
        at, n, own_keys, own_values = found
        if config.method == "razor":
            assert (own_values != values[at]).any(-1).sum() <= 1
        exact = torch.ones_like(at, dtype=torch.bool)
        if not evicts:
            exact = n == 1 if name in COUNTS_ALL | COUNTS_SOME else at < config.sink_size
        assert exact.any() or not config.sink_size
        assert torch.equal(own_values[exact], values[at][exact]), f"layer {layer}"
        exact |= torch.tensor(name in KEYS_STAY)
        if config.positions == "original":
            assert torch.equal(own_keys[exact], keys[at][exact]), f"layer {layer}"
        elif evicts:
            turned = cache.rope.rotate(keys[at], torch.arange(len(at)) - at)
            assert_close("keys", turned, own_keys, 1e-5)


# -- what does not depend on chunks ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SETTINGS)
def test_a_budget_for_all_rows_loses_none(name):
    cache = run(name, model_of(), [TOKENS, 1, 30], budget=400)
    whole = full_rows(TOKENS + 31, name)
    if ROWS.get(name, ()) is None:
        return  # published shares ask for no budget
    assert held(cache) == CELLS * (TOKENS + 31) and not cache.compactions
    assert_same_rows(whole, cache, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in CHUNKED if ROWS.get(name, ()) is not None])
def test_chunks_leave_no_trace_where_nothing_is_lost(name):
    ids, model = prompt(60), model_of()
    caches = []
    for chunk in ("prompt", 7):
        with asymkv.replace("llama", settings_of(name, budget=80, chunk_size=chunk), model=model):
            caches.append(model(ids).past_key_values)
    assert_same_rows(*caches)
    for layer in range(LAYERS):
        one, many = (c.layers[layer] for c in caches)
        assert one.storage.columns.keys() == many.storage.columns.keys()
        # A chunk is what is replayed: that scores follow it is the method.
        judged = {SCORE, PAIR, SHARE, CURVATURE} if "reconstruction" in caches[0].config.options.needs else set()
        for column in one.storage.columns.keys() - judged:
            assert_close(column, one.dense(column), many.dense(column), 1e-5)


# -- edges -------------------------------------------------------------------------------------------------------------
def run(name, model, turns, **overrides):
    """Feeds turns of so many tokens; after each, logits and rows are finite. The cache."""
    config = overrides.pop("config", None) or sized(name, **overrides)
    ids, at = prompt(max(sum(turns), TOKENS + STEPS + TURN)), 0
    with asymkv.replace("llama", config, model=model):
        cache = None
        for count in turns:
            out = model(ids[:, at : at + count], past_key_values=cache)
            cache, at = out.past_key_values, at + count
            assert torch.isfinite(out.logits).all(), f"logits at token {at}"
            for layer, head, columns in heads_of(cache, "keys", "values"):
                assert all(torch.isfinite(x).all() for x in columns), f"rows at token {at}, layer {layer}, head {head}"
    assert cache.tokens_seen.tolist() == [at]
    return cache


def every_token(name, **overrides):
    """The setting, compacting at every token where it may in decode."""
    config = sized(name, **overrides)
    return config if not config.decode_interval else config.replace(decode_interval=1)


@pytest.mark.parametrize("name", SETTINGS)
def test_short_prompts(name):
    """One token; fewer than the window; then decode and a turn."""
    for first in (1, 6):
        cache = run(name, model_of(), [first, 1, 5], config=every_token(name, budget=BUDGET))
        assert held(cache) == CELLS * (first + 6)


@pytest.mark.parametrize("name", COMPRESSING)
def test_the_least_budget(name):
    """Sinks, window and one row: a compaction at every token, a second turn of one token and of many."""
    least = settings_of(name, budget=600).minimum_rows
    if settings_of(name, budget=600).options.defaults().get("head_budgets") and name == "uncomp":
        least = -(-least * 3 // 2)  # the lowest heads are given two thirds
    cache = run(name, model_of(), [70, 1, 1, 30, 1], config=every_token(name, budget=least))
    if name not in ROWS and cache.config.decode_interval and cache.config.method != "kvzip":
        assert held(cache) == CELLS * least


@pytest.mark.parametrize("name", COMPRESSING)
def test_equal_scores(name):
    """Every query looks at every row alike: ties are broken, nothing is divided by zero."""
    cache = run(name, model_of("even"), [80, 1, 1, 9], config=every_token(name, budget=BUDGET))
    assert held(cache) < CELLS * 91


EMPTYING = {
    "h2o": {"method": "h2o", "layer_budgets": "global"},
    "keydiff": {"method": "keydiff", "layer_budgets": "global"},
    "adaptive": {"method": "knorm", "head_budgets": {"kind": "adaptive", "floor": 0}},
    "critical": {"method": "criticalkv", "layer_budgets": "global", "window_size": 1, "first_stage": 0},
    "expected": {"method": "expected_attention", "layer_budgets": "global"},
    "merge": {"method": "value_merge", "layer_budgets": "global"},
    "cam": {"method": "cam", "layer_budgets": "global"},
    "d2o": {"method": "d2o", "layer_budgets": "global", "count_bias": True},
    "asymkv_error": {"method": "asymkv", "layer_budgets": "global", "pair_rule": "output_error"},
    "kvmerger": {"method": "kvmerger", "layer_budgets": "global"},
    "evict": {"method": "asymkv_evict", "layer_budgets": "global"},
    "kvzip": {"method": "kvzip", **OPTIONS["kvzip"]},
    "kvzip_layer": {"method": "kvzip", "level": "layer", **OPTIONS["kvzip"]},
    "kvzip_head": {"method": "kvzip", "level": "head", **OPTIONS["kvzip"]},
}
# Of these some head is empty for sure; a run of pairs leaves a row, a window of one too, and equal scores share evenly.
EMPTIES = {"h2o", "keydiff", "adaptive", "merge", "cam", "d2o", "kvzip", "kvzip_layer", "kvzip_head"}


@pytest.mark.parametrize("kind", EMPTYING)
def test_heads_without_rows(kind):
    """No sinks, no window, one threshold: heads lose every row, and generation goes on."""
    settings = {"sink_size": 0, "window_size": 0, "decode_interval": 2, **EMPTYING[kind]}
    config = asymkv.CompressionConfig(budget=settings["window_size"] + 1, **settings)
    first = run("", model_of(), [20], config=config)
    assert held(first) <= CELLS * config.budget
    if kind in EMPTIES:
        assert min(int(first.num_rows(layer).min()) for layer in range(LAYERS)) == 0
    run("", model_of(), [20, 1, 1, 1, 30, 1], config=config)


def test_a_cache_with_an_empty_layer_can_be_pruned_and_saved(tmp_path):
    """One row for four heads: a layer holds nothing at all."""
    model = model_of()
    settings = {**OPTIONS["kvzip"], "sink_size": 0, "window_size": 0, "retain": True}
    with asymkv.replace("llama", model=model, method="kvzip", budget=1, **settings):
        cache = model(prompt(20)).past_key_values
        pruned = cache.prune(budget=1)
        assert held(pruned) == CELLS and min(int(pruned.num_rows(layer).sum()) for layer in range(LAYERS)) == 0
        assert held(pruned.prune(budget=1)) == CELLS
        pruned.save(tmp_path)
        loaded = asymkv.CompressedCache.load(tmp_path, model)
        assert_same_rows(pruned, loaded)
        step = prompt(1, seed=3)
        assert torch.equal(model(step, past_key_values=loaded).logits, model(step, past_key_values=pruned).logits)


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", COMPRESSING)
def test_a_budget_below_sinks_and_window_is_named(name):
    least = settings_of(name, budget=600).minimum_rows
    if least > 1:
        with pytest.raises(ValueError, match=rf"budget={least - 1} .*(sink_size \+ window_size \+ 1 = {least})"):
            settings_of(name, budget=least - 1, window_size=settings_of(name, budget=600).window_size)


WHOLE = [name for name in COMPRESSING if name not in CHUNKED]


@pytest.mark.parametrize("name", WHOLE)
def test_whole_prompt_methods_refuse_chunks(name):
    with pytest.raises(ValueError, match=r"judges the whole prompt at once; chunk_size must be None, found 64"):
        settings_of(name, budget=BUDGET, chunk_size=64)
    model = model_of()
    with asymkv.replace("llama", sized(name), model=model), pytest.raises(ValueError, match="leave prefill_chunk_size"):
        model.generate(prompt(100), max_new_tokens=2, prefill_chunk_size=40)


BY_WINDOW = [name for name in WHOLE if settings_of(name, budget=600).method not in ("kvzip", "expected_attention")]


@pytest.mark.parametrize("name", BY_WINDOW)
def test_a_window_longer_than_the_prompt_is_named(name):
    model = model_of()
    with asymkv.replace("llama", settings_of(name, ratio=0.5, window_size=64), model=model):
        with pytest.raises(ValueError, match="window_size=64 is not shorter than the prompt of 50.*smaller window"):
            model(prompt(50))
        assert model(prompt(150)).past_key_values.compactions == 1


@pytest.mark.parametrize(("method", "settings", "message"), [
    ("chunkkv", {"scorer": "nothing"}, "unknown scorer 'nothing'; allowed: .*snapkv"),
    ("criticalkv", {"scorer": {"kind": "h2o", "kernel": 3}}, "unknown settings .*kernel.* of scorer 'h2o'.*normalize"),
    ("snapkv", {"pooling": "sum"}, "pooling='sum'; allowed: .*avg"),
    ("headkv", {"pooling": "median"}, "pooling='median'; allowed: .*max"),
    ("uncomp", {"pooling": 3}, "pooling=3; allowed: .*max"),
    ("snapkv", {"kernel_size": 4}, "kernel_size must be an odd integer"),
    ("snapkv", {"group_reduce": "sum"}, "group_reduce='sum'; allowed: .*mean"),
    ("snapkv", {"window_size": 0}, "window_size must be >= 1"),
    ("asymkv", {"curvature": "hessian"}, "curvature='hessian'; allowed: .*loss"),
    ("d2o", {"mode": "fast"}, "mode='fast'; allowed: .*paper"),
    ("value_merge", {"mode": "mean"}, "mode='mean'; allowed: .*pivot"),
    ("cam", {"select": "random"}, "select='random'; allowed: .*streaming"),
    ("kvmerger", {"rope_mode": "none"}, "rope_mode='none'; allowed: .*post"),
    ("kvzip", {"level": "token"}, "level='token'; allowed: .*pair_uniform"),
    ("h2o", {"normalise": True}, r"unknown settings \['normalise'\].*normalize"),
    ("duo_attention", {"sparsity": 2}, "sparsity must be a number from 0 to 1; found 2"),
    ("uncomp", {"groups": 1}, "groups.*>= 2; found 1"),
])  # fmt: skip
def test_unknown_choices_are_named(method, settings, message):
    with pytest.raises(ValueError, match=message):
        asymkv.CompressionConfig(method, **settings)
