"""With room for every row, a patched model is the stock model; with compression, batching changes nothing."""

import pytest
import torch
from tiny_models import (
    FAMILIES,
    HEAD_SCORES,
    OPTIONS,
    assert_close,
    assert_same_rows,
    head_scores,
    left_padded,
    prompt,
    tiny_model,
)
from zack_bases import zack

import asymkv
from asymkv.methods import METHODS

# Variants of a method whose contracts are checked beside its defaults.
VARIANTS = {
    **{name: {"method": name, **OPTIONS.get(name, {}), **head_scores(cls)} for name, cls in METHODS.items()},
    "aagc-derotate": {"method": "aagc", **OPTIONS["aagc"], "rope_mode": "derotate", "kmeans_iters": 2},
    "aagc-global": {"method": "aagc", **OPTIONS["aagc"], "score_scope": "global", "kmeans_update": "ema"},
    "aagc-seed": {"method": "aagc", **OPTIONS["aagc"], "seed_compat": True, "num_clusters": 12},
    "asymkv-loss": {"method": "asymkv", "curvature": "loss"},
    "asymkv-output": {"method": "asymkv", "curvature": "output"},
    "asymkv-error": {"method": "asymkv", "key_weights": "output_error", "pair_rule": "output_error"},
    "asymkv-upstream": {"method": "asymkv", "upstream_compat": True, "sink_size": 4},
    "streaming-original": {"method": "streaming_llm", "position_policy": "original"},
    "h2o-mean": {"method": "h2o", "normalize": True},
    "h2o-global": {"method": "h2o", "layer_budgets": "global"},
    "asymkv-adaptive": {"method": "asymkv", "head_budgets": {"kind": "adaptive", "floor": 0.2}},
    "asymkv-hard": {"method": "asymkv", "head_budgets": {"kind": "adaptive", "mode": "hard"}},
    "asymkv-pyramid": {"method": "asymkv", "layer_budgets": {"kind": "pyramid", "beta": 4}},
    "asymkv-global": {"method": "asymkv", "layer_budgets": {"kind": "global", "floor": 0.3}},
    "asymkv-dynamic": {"method": "asymkv", "layer_budgets": "dynamic", "key_weights": "output_error"},
    "asymkv-loss-global": {"method": "asymkv", "curvature": "loss", "layer_budgets": "global"},
    "chunkkv-whole": {"method": "chunkkv", "whole_chunks": True},
    "chunkkv-knorm": {"method": "chunkkv", "scorer": "knorm", "window_size": 8},
    "criticalkv-adaptive": {"method": "criticalkv", "head_budgets": "adaptive", "scorer": "expected_attention"},
    "d2o-layers": {"method": "h2o", "layer_budgets": {"kind": "variance", "r_max": 2}},
    "cam-counts": {"method": "cam", "merge_budget": 5, "count_bias": True},
    "cam-streaming": {"method": "cam", "select": "streaming", "deterministic": True},
    "d2o-code-counts": {"method": "d2o", "mode": "code", "count_bias": True},
    "kvmerger-post": {"method": "kvmerger", "rope_mode": "post", "value_scale": "sum"},
    "kvmerger-counts": {"method": "kvmerger", "count_bias": True, "protect_share": 0.3},
    "value_merge-knorm": {"method": "value_merge", "select": "knorm", "merge_fraction": 0.5, "count_bias": True},
    "value_merge-pivot": {"method": "value_merge", "mode": "pivot"},
    "value_merge-weighted": {"method": "value_merge", "mode": "weighted", "select": "knorm"},
    "kvzip-uniform": {"method": "kvzip", "level": "pair_uniform", "plus": True, "prefix": 20, **OPTIONS["kvzip"]},
    "kvzip-head": {"method": "kvzip", "level": "head", **OPTIONS["kvzip"]},
    "kvzip-compact": {"method": "kvzip", "level": "layer", "position_policy": "compact", **OPTIONS["kvzip"]},
    "razor-window": {"method": "razor", "head_scores": HEAD_SCORES, "window_size": 8},
    "razor-unbiased": {"method": "razor", "head_scores": HEAD_SCORES, "count_bias": False, "mean_after_rope": False},
    "duo-half": {"method": "duo_attention", "head_scores": HEAD_SCORES, "sparsity": 0.5, "window_size": 8},
    "zack": {"method": "zack", "dimensions": zack(1.0)},
    "zack-folded": {"method": "zack", "dimensions": zack(1.0, fold=True)},
    "zack-h2o": {"method": "h2o", "dimensions": zack(1.0)},
    "zack-error": {"method": "asymkv", "dimensions": zack(1.0), "pair_rule": "output_error", "curvature": "output"},
    "uncomp-avg": {"method": "uncomp", "head_scores": HEAD_SCORES, "groups": 3, "pooling": "avg", "kernel_size": 5},
}
# What a family changes is the same for all methods: variants run on one family, and whole conversations of a few
# methods on the others.
FEW = ("asymkv", "h2o", "snapkv")
DEFAULTS_EVERYWHERE = [(f, v) for v in VARIANTS for f in FAMILIES
                       if f == "llama" or v in ({*FEW, "aagc", "kvzip"} if f == "gpt2" else METHODS)]  # fmt: skip
FEW_EVERYWHERE = [(f, v) for v in VARIANTS for f in FAMILIES if f == "llama" or v in FEW]


def chunked(variant: str, size: int) -> dict:
    whole = "whole_prompt" in asymkv.CompressionConfig(**VARIANTS[variant]).options.needs
    return {} if variant == "full" or whole else {"chunk_size": size}


@pytest.mark.parametrize(("family", "variant"), DEFAULTS_EVERYWHERE)
def test_full_budget_matches_uncompressed(family, variant):
    model = tiny_model(family)
    ids = prompt(150, batch=2)
    ref = model(ids)
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
    with asymkv.replace(family, budget=600, **VARIANTS[variant], **chunked(variant, 64)):
        assert_close("logits", ref.logits, model(ids).logits, 1e-5)
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_matches_recompute(family):
    model = tiny_model(family)
    ids = prompt(90, batch=2)
    ref = model(ids).logits
    with asymkv.replace(family, method="full"):
        out = model(ids[:, :80])
        steps = [model(ids[:, i : i + 1], past_key_values=out.past_key_values).logits for i in range(80, 90)]
    assert_close("decode", ref[:, 80:], torch.cat(steps, 1), 1e-5)


@pytest.mark.parametrize(("family", "size"), [("llama", 1), ("llama", 7), ("llama", 64), ("gpt2", 7)])
def test_chunked_prefill_matches_one_shot(family, size):
    model = tiny_model(family)
    ref = model(prompt(100)).logits
    with asymkv.replace(family, method="full", chunk_size=size):
        assert_close("logits", ref, model(prompt(100)).logits, 1e-5)


@pytest.mark.parametrize("rope", [
    {"rope_type": "default", "rope_theta": 1e4},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64},
    {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
], ids=lambda r: r["rope_type"])  # fmt: skip
def test_rope_types(rope):
    """Past the trained window too, where dynamic frequencies follow the length; and merged keys stay between."""
    def fresh():
        return tiny_model(rope_parameters=rope, max_position_embeddings=64)

    model = fresh()
    ids, mask, alone = left_padded([110, 150])
    refs = [fresh()(row).logits for row in alone]  # dynamic frequencies remember the longest call
    with asymkv.replace("llama", method="full", chunk_size=40):
        logits = model(ids, attention_mask=mask).logits
    for row, ref in enumerate(refs):
        assert_close("logits", ref[0], logits[row, -ref.shape[1] :], 1e-5)
    with asymkv.replace("llama", budget=60, chunk_size=40):
        cache = model(ids, attention_mask=mask).past_key_values
    assert [int(n.sum()) for n in cache.cardinality(0)[0]] == [110, 110]
    assert all(torch.isfinite(k).all() for k in cache.keys(1)[1])


@pytest.mark.parametrize(("family", "variant"), FEW_EVERYWHERE)
def test_padded_batch_equals_rows_alone(family, variant):
    """A row's cache and logits never depend on what it is batched with, through prefill, decode and a second turn."""
    model = tiny_model(family, dtype=torch.float64)  # so that rounding never decides between two rows
    lengths = [170, 95, 130]
    ids, mask, alone = left_padded(lengths)
    settings = {**VARIANTS[variant], **chunked(variant, 50), "decode_interval": 0 if "upstream" in variant else 5}
    budget = {} if variant == "full" else {"ratio": 0.4}
    follow, follow_mask, follow_alone = left_padded([60, 40, 9], seed=7)

    def talk(ids, mask, follow, follow_mask):
        first = model(ids, attention_mask=mask)
        cache, logits = first.past_key_values, [first.logits[:, -1]]
        for i in range(12):
            step = torch.full((ids.shape[0], 1), 10 + i)
            mask = torch.cat([mask, torch.ones_like(step)], 1)
            logits.append(model(step, attention_mask=mask, past_key_values=cache).logits[:, -1])
        mask = torch.cat([mask, follow_mask], 1)
        logits.append(model(follow, attention_mask=mask, past_key_values=cache).logits[:, -1])
        return cache, torch.stack(logits, 1)

    with asymkv.replace(family, **settings, **budget):
        cache, logits = talk(ids, mask, follow, follow_mask)
        for row in range(len(lengths)):
            one, ref = talk(alone[row], torch.ones_like(alone[row]), follow_alone[row],
                            torch.ones_like(follow_alone[row]))  # fmt: skip
            assert_close("logits", ref[0], logits[row], 1e-6)
            assert_same_rows(one, cache, row_b=row, rtol=1e-6)
            if cache.config.options.compresses:
                held = torch.stack([cache.num_rows(layer)[row] for layer in range(2)]).double().mean()
                assert cache.compactions and held < 0.8 * cache.tokens_seen[row]
    assert cache.tokens_seen.tolist() == [a + 12 + b for a, b in zip(lengths, [60, 40, 9], strict=True)]


def test_queries_remembered_in_decode_do_not_depend_on_the_batch():
    """A row that has room while another is compacted goes on remembering its queries."""
    model = tiny_model(dtype=torch.float64)
    ids, mask, alone = left_padded([170, 30])
    settings = {"method": "uncomp", "head_scores": HEAD_SCORES, "budget": 42, "decode_interval": 5}
    with asymkv.replace("llama", **settings):
        batch = model(ids, attention_mask=mask).past_key_values
        one = model(alone[1]).past_key_values
        for i in range(26):
            step = torch.full((2, 1), 10 + i)
            mask = torch.cat([mask, torch.ones_like(step)], 1)
            model(step, attention_mask=mask, past_key_values=batch)
            model(step[:1], past_key_values=one)
    assert one.compactions and one.num_rows(0)[0].sum() < 2 * one.tokens_seen[0]
    assert_same_rows(one, batch, row_b=1, rtol=1e-6)


def test_right_padding_and_holes_are_never_stored():
    model = tiny_model()
    ids = prompt(12, batch=2)
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    mask[1, [0, 5]] = 0
    with asymkv.replace("llama", method="full"):
        out = model(ids, attention_mask=mask)
        for row in range(2):
            alone = model(ids[row : row + 1, mask[row].bool()])
            assert_close("logits", alone.logits[0], out.logits[row, mask[row].bool()], 1e-5)
            assert_same_rows(alone.past_key_values, out.past_key_values, row_b=row)


def test_forward_returns_what_stock_returns():
    model = tiny_model()
    ids = prompt(40, batch=2)
    labels = ids.clone()
    labels[:, :3] = -100
    ref = model(ids, labels=labels, output_hidden_states=True)
    with asymkv.replace("llama", method="full", chunk_size=16):
        out = model(ids, labels=labels, output_hidden_states=True)
        assert_close("loss", ref.loss, out.loss, 1e-6)
        for a, b in zip(ref.hidden_states, out.hidden_states, strict=True):
            assert_close("hidden", a, b, 1e-5)
        assert_close("embeds", ref.logits, model(inputs_embeds=model.get_input_embeddings()(ids)).logits, 1e-5)
        for keep in (1, 5, 39, torch.tensor([0, 17, 39])):
            expected = model(ids, use_cache=False, logits_to_keep=keep).logits
            assert_close(f"keep {keep}", expected, model(ids, logits_to_keep=keep).logits, 1e-5)
        loss, logits, cache = model(ids, labels=labels, return_dict=False)[:3]
        assert torch.equal(logits, out.logits) and isinstance(cache, asymkv.CompressedCache)
