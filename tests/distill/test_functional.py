"""The differentiable cache: the real one's rows and logits, and gradients by finite differences."""

import functools

import pytest
import torch
from merging_views import make_view, rope
from tiny_models import OPTIONS, assert_close, head_scores, prompt, tiny_model
from zack_bases import zack

import asymkv
from asymkv.distill import DifferentiableCache, Student
from asymkv.distill.functional import DifferentiableLayer, check_differentiable, merge_groups
from asymkv.distill.student import DistillSettings
from asymkv.methods import METHODS
from asymkv.plan import CompactionPlan, contract_pairs, execute

AAGC = {"method": "aagc", **OPTIONS["aagc"]}
VARIANTS = {
    **{name: {"method": name, **OPTIONS.get(name, {}), **head_scores(cls)} for name, cls in METHODS.items()},
    "aagc_ema": {**AAGC, "kmeans_update": "ema", "kmeans_learning_rate": 0.3, "count_bias": False},
    "aagc_derotate": {**AAGC, "rope_mode": "derotate", "kmeans_iters": 2},
    "aagc_global": {**AAGC, "score_scope": "global"},
    "aagc_layer": {**AAGC, "score_scope": "layer"},
    "aagc_options": {**AAGC, "evict_centroids": True, "exposure_fix": True, "importance": True},
    "aagc_seed": {**AAGC, "seed_compat": True, "num_clusters": 12},
    "asymkv_adaptive": {"method": "asymkv", "head_budgets": "adaptive"},
    "h2o_global": {"method": "h2o", "layer_budgets": "global"},
    "zack": {"method": "zack", "dimensions": zack()},
    "h2o_zack": {"method": "h2o", "dimensions": zack()},
    "streaming_original": {"method": "streaming_llm", "position_policy": "original"},
}


def config_of(name, **overrides):
    settings = {"budget": 40, "window_size": 8, **VARIANTS[name]}
    if "seed" in name:
        settings |= {"window_size": 0}
    chunk = {"chunk_size": 32} if name not in REFUSED else {}
    return asymkv.CompressionConfig(**{**settings, **chunk, **overrides})


@functools.cache
def is_served(name):
    try:
        check_differentiable(config_of(name))
    except ValueError:
        return False
    return True


# The others judge a whole prompt at once, read it twice, or move their rows' positions.
REFUSED = {"adakv", "chunkkv", "criticalkv", "dynamic_kv", "echo", "expected_attention", "headkv", "kvzip", "pyramidkv",
           "snapkv", "streaming_llm", "uncomp"}  # fmt: skip
SERVED = [name for name in VARIANTS if name not in REFUSED]


def test_whoever_judges_chunks_by_queries_is_served():
    assert [name for name in VARIANTS if is_served(name)] == SERVED


@pytest.mark.parametrize(("settings", "message"), [
    ({"method": "snapkv"}, r"'snapkv' cannot be trained through: it needs \['whole_prompt'\]"),
    ({"method": "asymkv", "curvature": "loss"}, r"it needs \['loss'\]"),
    ({"method": "streaming_llm"}, "position_policy 'original'; found 'compact'"),
], ids=str)  # fmt: skip
def test_other_methods_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_differentiable(asymkv.CompressionConfig(budget=100, **settings))


def rows_of(cache, layer, name):
    """Per head of the batch: the present rows of a differentiable layer."""
    found = cache.layers[layer]
    return [[found.columns[name][b, h, :n] for h, n in enumerate(found.heads_of(b))] for b in range(found.batch)]


@pytest.mark.parametrize("name", SERVED)
def test_rows_are_those_of_the_real_cache(name):
    """After chunks of a batch of two: the same rows, counts and hidden states."""
    model, ids, config = tiny_model(dtype=torch.float64), prompt(110, batch=2), config_of(name)
    student = Student(model, config, DistillSettings(distillation_weight=0))
    real = model(ids)
    cache = DifferentiableCache.for_model(config, model)
    cache.expect_prompt([110, 110])
    with torch.no_grad():
        states = [student._states(cache, ids[:, at : at + 32]) for at in range(0, 110, 32)]
    assert_close("logits", real.logits, model.lm_head(torch.cat(states, 1)), 1e-9)
    assert cache.compactions == real.past_key_values.compactions
    assert (cache.compactions > 1) == config.options.compresses
    for layer in range(2):
        for column in ("keys", "values", "cardinality", "positions"):
            expected = getattr(real.past_key_values, column)(layer)
            for mine, theirs in zip(rows_of(cache, layer, column), expected, strict=True):
                for a, b in zip(mine, theirs, strict=True):
                    assert_close(f"{column} of layer {layer}", b, a, 1e-9)
    student.close()


def test_gpt2_and_a_share_of_the_text():
    """No RoPE, a budget that follows the prompt, a last chunk of one token."""
    model, ids = tiny_model("gpt2", dtype=torch.float64), prompt(97)
    config = config_of("aagc", budget=None, ratio=0.5)
    student = Student(model, config, DistillSettings(distillation_weight=0))
    expected = model(ids, labels=ids)
    assert student(ids)["loss"].item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert student.compactions == expected.past_key_values.compactions > 0


# -- gradients -----------------------------------------------------------------------------------------------------
def inside(settings, keys, values, queries):
    """Attention of some queries over rows after AAGC has folded them, as a function of keys and values."""
    config = asymkv.CompressionConfig("aagc", sink_size=1, window_size=2, recent_size=2, budget=10, num_clusters=3,
                                      pruning_interval=16, lookback_window=8, **settings)  # fmt: skip
    layer = DifferentiableLayer()
    at = torch.arange(16)[None]
    layer.append_packed(keys, values, at, [16])
    view = layer.view(rope(), 0.25)
    view.queries, view.query_positions = queries, torch.arange(12, 16)[None]
    layer.compact(config.options, view, [10], asymkv.budgets.HeadBudgets())
    assert layer.heads_of(0) == [1 + 3 + 2] and layer.columns["cardinality"].max() > 1
    out, _ = layer.attend(queries, None, [4], 0.25, "reference")
    return out


@pytest.mark.parametrize("settings", [
    {}, {"kmeans_update": "ema", "kmeans_learning_rate": 0.3}, {"rope_mode": "derotate"}, {"kmeans_iters": 2},
], ids=str)  # fmt: skip
def test_gradients_of_folded_rows_by_finite_differences(settings):
    """Choices and assignments do not change nearby; keys and values that were kept or folded all get theirs."""
    torch.manual_seed(3)
    keys, values = torch.randn(2, 1, 1, 16, 16, dtype=torch.float64)
    queries = torch.randn(1, 2, 4, 16, dtype=torch.float64)
    keys.requires_grad_(), values.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda k, v: inside(settings, k, v, queries), (keys, values), fast_mode=True, atol=1e-6
    )
    inside(settings, keys, values, queries).square().sum().backward()
    moved = keys.grad.abs().sum(-1) > 0
    assert int(moved.sum()) == 10 and torch.equal(moved, values.grad.abs().sum(-1) > 0)  # the six that left: nothing


@pytest.mark.parametrize("weighted", [False, True])
def test_merging_a_plan_equals_the_executor_and_has_its_gradient(weighted):
    """Runs of pairs, dropped rows, key weights per dimension: what the compiled executor does."""
    layer, view = make_view(14, 2, n=[3] + [1] * 13)
    destination = contract_pairs(torch.rand(1, 2, 13) < 0.5)
    destination[..., 4] = torch.where(destination[..., 4] == 4, -1, destination[..., 4])
    weight = torch.rand(1, 2, 14, 16) if weighted else None
    plan = CompactionPlan(destination, weight)
    expected = execute(plan, layer.view(rope(), 0.25), layer.storage, "original")
    keys, values = view.keys.clone(), view.values.clone()

    def merged(k, v):
        _, fresh = make_view(14, 2, keys=keys, values=values, n=[3] + [1] * 13)
        fresh.keys, fresh.values = k, v
        stays = merge_groups(plan, fresh)
        return tuple(x[stays] for x in (fresh.keys, fresh.values, fresh.cardinality, fresh.positions))

    for found, name in zip(merged(keys, values), ("keys", "values", "cardinality", "position"), strict=True):
        theirs = torch.cat([expected.rows(name, h) for h in range(2)])
        assert_close(name, theirs, found, 1e-6)
    inputs = (keys.requires_grad_(), values.requires_grad_())
    assert torch.autograd.gradcheck(lambda k, v: merged(k, v)[:2], inputs, fast_mode=True)
