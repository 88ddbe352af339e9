"""AAGC: worked examples, conservation, seeds, scopes, triggers, and the public code's rule."""

import math

import pytest
import torch
from aagc_rows import axis, folded
from merging_views import DIM, make_view, options, rope
from tiny_models import assert_close, assert_same_rows, prompt, tiny_model

import asymkv
from asymkv.layer import CompressedLayer
from asymkv.methods import aagc_seed
from asymkv.methods.clustering import FOLDED, WORTH, Clusters, farthest_seeds, spread_seeds
from asymkv.ops.reference import lma_attention


def attention(storage, query):
    """Output and log of the mass of one scalar query, scale 1."""
    key, value, n = (storage.rows(name, 0)[None, None] for name in ("keys", "values", "cardinality"))
    out, lse = lma_attention(axis(query), key, value, n, scale=1.0)
    return out[0, 0, 0, 0].item(), lse.item()


# -- worked examples -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("count_bias", "expected"), [(True, 1.4), (False, 5 / 3)])
def test_equal_keys_are_exact_with_counts(count_bias, expected):
    """Keys 1, 1, 0 and values 0, 2, 3, query ln 2: 1.4; the first two as one row of two tokens, or of one."""
    out = folded(axis(1, 1, 9, 0), axis(0, 2, 9, 3), 2, count_bias=count_bias)
    assert out.rows("keys", 0)[:, 0].tolist() == [1, 0] and out.rows("values", 0)[:, 0].tolist() == [1, 3]
    assert attention(out, math.log(2))[0] == pytest.approx(expected)


def test_a_centroid_never_has_more_mass_than_its_tokens():
    """Jensen: keys 0 and 2 have 1 + e^2 = 8.389, two tokens at 1 have 2 e = 5.437."""
    out = folded(axis(0, 2, 9, -1e3), axis(1, 1, 1, 0), 2)
    assert math.exp(attention(out, 1.0)[1]) == pytest.approx(2 * math.e)


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, 2.0), ({"kmeans_update": "ema"}, 0.0597), ({"kmeans_update": "ema", "kmeans_learning_rate": 1.0}, 3.0),
    ({"kmeans_update": "ema", "kmeans_learning_rate": 0.0}, 0.0),
], ids=str)  # fmt: skip
def test_worked_examples_of_the_update(settings, expected):
    """A centroid of one token at 0 takes 2 and 4: the running mean, and (1 - 0.99^2) of the way to 3."""
    out = folded(axis(0, 2, 4, 9, 5), axis(0, 2, 4, 9, 5), 3, bank=[0], **settings)
    assert out.rows("keys", 0)[0, 0].item() == pytest.approx(expected, abs=5e-6)
    assert out.rows("values", 0)[0, 0].item() == pytest.approx(expected, abs=5e-6)
    assert out.rows("cardinality", 0).tolist() == [3, 1]
    assert out.rows(FOLDED, 0).tolist() == [[3, 1], [0, 0]]  # positions 0, 1, 2


def test_worked_example_of_the_public_codes_update():
    """The same rows there: 0.99 * 0 + 0.01 * 3 = 0.03."""
    _, view = make_view(3, 1, keys=axis(0, 2, 4), values=axis(0, 2, 4))
    led = {"keys": axis(0), "values": axis(0)}
    taken = torch.tensor([[[False, True, True]]])
    out = aagc_seed.move(view, led, taken, torch.ones(1, 1, 1, dtype=torch.bool), 0.01)
    assert [out[name][0, 0, 0, 0].item() for name in ("keys", "values")] == pytest.approx([0.03, 0.03])


# -- laws ----------------------------------------------------------------------------------------------------------
def bank_of(layer):
    """Sums over a layer's centroids, per head: tokens, keys before RoPE, keys as stored, values, positions."""
    view = layer.view(rope(), 0.25)
    n, place = view.statistics[FOLDED].double().unbind(-1)
    weight = n[..., None]
    turned = rope().rotate(view.keys, -place.round().long())
    by = view.statistics[WORTH].double()[..., None] if WORTH in view.statistics else weight
    moments = [(weight * turned).sum(2), (weight * view.keys).sum(2), (by * view.values).sum(2)]
    return [n.sum(2), *moments, (n * place).sum(2)]


@pytest.mark.parametrize("settings", [
    {}, {"kmeans_iters": 3}, {"rope_mode": "derotate"}, {"rope_mode": "derotate", "kmeans_iters": 2},
    {"count_bias": False}, {"importance": True}, {"importance": True, "kmeans_iters": 2, "exposure_fix": True},
], ids=str)  # fmt: skip
def test_what_was_folded_is_conserved(settings):
    """Over three folds: sum of n C is the sum of all rows ever folded, sum of n their number; of values, by importance
    where that is asked for."""
    method = options("aagc", sink=2, window=3, budget=30, lookback_window=8, num_clusters=6, recent_size=5, **settings)
    layer, expected = CompressedLayer(), 0.0
    for step in range(3):
        torch.manual_seed(step)
        layer.append(*(torch.randn(1, 2, 34, DIM, dtype=torch.float64) for _ in range(2)))
        view = layer.view(rope(), 0.25)
        view.budget = torch.full((1, 2), 30)
        view.queries = torch.randn(1, 4, 12, DIM, dtype=torch.float64)
        view.query_positions = view.tokens[:, None] - 12 + torch.arange(12)
        importance, free = method.judge(view)
        gone = asymkv.budgets.HeadBudgets().choose(asymkv.budgets.heads.Judged(
            importance, free, view.lengths, view.budget))  # fmt: skip
        taken = (free & ~gone)[..., None]
        rows = (view.unrotate(view.keys), view.keys, view.values, view.positions.double()[..., None])
        sums = [taken.double().sum((2, 3)), *((taken * x).sum(2) for x in rows)]
        if method.importance:
            sums[3] = (taken * importance[..., None] * view.values).sum(2)
        expected = [a + b for a, b in zip(expected or [0.0] * 5, sums, strict=True)]
        layer.carry_out(method.carry_out(view, gone), view)
        found = bank_of(layer)
        assert torch.equal(found[0], expected[0])
        keys = 1 if "rope_mode" in settings else 2
        assert_close("keys", expected[keys], found[keys], 1e-6)
        assert_close("values", expected[3], found[3], 1e-6 if method.importance else 1e-12)
        assert_close("positions", expected[4][..., 0], found[4], 1e-6)
        n = layer.view(rope(), 0.25).cardinality
        assert bool((n == 1).all()) == (settings == {"count_bias": False})
        assert layer.heads_of(0) == [2 + 6 + 5] * 2


def test_the_order_of_the_rows_does_not_matter():
    """Given the centroids, permuted rows are folded to the same ones."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, 1, 12, DIM, dtype=torch.float64)
    shuffled = torch.cat([torch.arange(3), 3 + torch.randperm(7), torch.tensor([10, 11])])
    found = []
    for order in (torch.arange(12), shuffled):
        out = folded(keys[:, :, order], values[:, :, order], 10, bank=[0, 1, 2], num_clusters=3)
        rows = torch.cat([out.rows("keys", 0), out.rows("values", 0), out.rows("cardinality", 0)[:, None]], 1)
        found.append(rows[rows[:, 0].argsort()])
    assert_close("rows", *found, 1e-12)


def test_as_many_centroids_as_rows_change_nothing():
    """K = what is kept: every kept row is its own centroid, bit for bit; as with K above the budget (prune only)."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, 2, 20, DIM, dtype=torch.float64)
    one, pruned = (folded(keys, values, 7, num_clusters=k) for k in (18, 19))
    for name in ("keys", "values", "cardinality", "position"):
        assert torch.equal(one.columns[name], pruned.columns[name])
    assert torch.equal(pruned.rows("keys", 0), torch.cat([keys[0, 0, :7], keys[0, 0, 8:]]))
    assert FOLDED in one.columns and not pruned.columns.get(FOLDED, torch.zeros(1)).any()


def test_centroids_are_the_means_of_the_nearest_rows():
    """Two far groups and two centroids; a row joins by its key, its value follows."""
    out = folded(axis(0, 10, 1, 11, 2, 9, 5), axis(1, 2, 3, 4, 5, 6, 7), 5, num_clusters=2, bank=[0, 1])
    assert out.rows("keys", 0)[:, 0].tolist() == pytest.approx([10.5, 1, 5])  # at the newest members' places
    assert out.rows("values", 0)[:, 0].tolist() == pytest.approx([3, 3, 7])
    assert out.rows("position", 0).tolist() == [3, 4, 6] and out.rows("cardinality", 0).tolist() == [2, 3, 1]


def test_more_iterations_lower_the_distortion():
    """Lloyd's steps: the squared distance of the points to their centroids never rises, and old centroids may join."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 60, DIM, dtype=torch.float64)
    points, n = torch.ones(1, 2, 60, dtype=torch.bool), torch.ones(1, 2, 60)
    seeds = spread_seeds(torch.rand(1, 2, 60), points, torch.full((1, 2), 7))
    loss = []
    for iterations in (1, 2, 4, 8):
        found = Clusters.of(x, points, seeds, n, iterations)
        loss.append((x - found.spread(found.means(x, n))).square().sum().item())
    assert loss == sorted(loss, reverse=True) and loss[0] > loss[-1]


def test_seeds_are_distinct_rows():
    """Evenly spaced by importance; those that follow are the farthest from the bank."""
    importance = torch.tensor([[[5.0, 1, 4, 2, 3, 9]]])
    rows = torch.tensor([[[True] * 5 + [False]]])
    assert spread_seeds(importance, rows, torch.tensor([[5]])).tolist() == rows.tolist()
    assert spread_seeds(importance, rows, torch.tensor([[1]]))[0, 0].tolist().count(True) == 1
    far = farthest_seeds(axis(0, 3, -7, 5, 1), torch.tensor([[[False, True, True, True, True]]]),
                         torch.tensor([[[True, False, False, False, False]]]), torch.tensor([[2]]))  # fmt: skip
    assert far[0, 0].tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("exposure_fix", [False, True])
def test_score_is_the_attention_of_the_last_queries(exposure_fix):
    """By hand: softmax over rows with log n, causal, the last 3 of 5 queries, summed over a group's heads; divided by
    the 3, 2 or 1 of them that could see a row."""
    _, view = make_view(9, 2, n=[4, 1, 1, 2, 1, 1, 1, 1, 1])
    view.queries, view.query_positions = torch.randn(1, 4, 5, DIM, dtype=torch.float64), torch.arange(4, 9)[None]
    found = options("aagc", budget=20, lookback_window=3, exposure_fix=exposure_fix).score(view)
    logits = torch.einsum("hgqd,htd->hgqt", view.queries.view(2, 2, 5, DIM), view.keys[0]) * 0.25
    logits = logits + view.cardinality[0, :, None, None].double().log()
    later = view.positions[0, 0] > view.query_positions[0][:, None]
    expected = logits.masked_fill(later, -torch.inf).softmax(-1)[:, :, 2:].sum((1, 2))
    if exposure_fix:
        expected = expected / torch.tensor([3, 3, 3, 3, 3, 3, 3, 2, 1])
    assert_close("score", expected, found[0], 1e-6)


# -- through a model -----------------------------------------------------------------------------------------------
SMALL = {"method": "aagc", "budget": 40, "pruning_interval": 16, "lookback_window": 12, "window_size": 4}
OPTIONAL = {"evict_centroids": True, "exposure_fix": True, "importance": True}
SEED = {**SMALL, "seed_compat": True, "num_clusters": 9, "window_size": 0, "kmeans_learning_rate": 0.2}


def fed(model, ids, *ends):
    """The cache after the tokens up to each end were fed, one forward each."""
    cache, begin = None, 0
    for end in ends:
        cache = model(ids[:, begin:end], past_key_values=cache).past_key_values
        begin = end
    return cache


@pytest.mark.parametrize("settings", [
    SMALL, {**SMALL, "score_scope": "global"}, {**SMALL, "rope_mode": "derotate"},
    {**SMALL, **OPTIONAL}, SEED,
], ids=["kv_head", "global", "derotate", "options", "seed"])  # fmt: skip
def test_token_by_token_equals_chunks(settings):
    """Decode compacts every P tokens by the last Delta queries, as chunks of P do.

    Importance is as exact as log n, which is stored in fp32; so are values that are weighed by it.
    """
    model, ids = tiny_model(dtype=torch.float64), prompt(96)
    with asymkv.replace("llama", model=model, **settings):
        chunks, tokens = fed(model, ids, 96), fed(model, ids, 32, *range(33, 97))
    assert chunks.compactions > 1 and chunks.stats()["rows"] == tokens.stats()["rows"]
    assert_same_rows(chunks, tokens, rtol=1e-6 if settings.get("importance") else 1e-9)


def test_common_scopes_keep_common_rows():
    """Pruned only: the same positions in the heads of a layer, in all heads, or in none."""
    model, ids = tiny_model(), prompt(140)
    for scope, layers in (("layer", False), ("global", True)):
        with asymkv.replace("llama", model=model, **{**SMALL, "score_scope": scope, "num_clusters": 99}):
            cache = fed(model, ids, 140)
        at = [[p.tolist() for p in cache.positions(layer)[0]] for layer in range(2)]
        assert at[0][0] == at[0][1] and at[1][0] == at[1][1]
        assert (at[0][0] == at[1][0]) == layers
    with asymkv.replace("llama", model=model, **SMALL, num_clusters=99):
        cache = fed(model, ids, 140)
    assert len({tuple(p.tolist()) for layer in range(2) for p in cache.positions(layer)[0]}) == 4


def test_bytes_and_rows_are_bounded_and_runs_repeat():
    model, ids = tiny_model(), prompt(200)
    with asymkv.replace("llama", model=model, **SMALL):
        first, second = fed(model, ids, 200), fed(model, ids, 200)
    assert first.stats()["peak_rows"] <= 40 + 16
    for layer in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first.keys(layer)[0], second.keys(layer)[0], strict=True))
    assert first.layers[0].storage.columns[FOLDED].dtype == torch.float32


@pytest.mark.parametrize("settings", [SMALL, {**SMALL, **OPTIONAL}], ids=["plain", "options"])
def test_centroids_survive_saving_and_go_on(tmp_path, settings):
    model, ids = tiny_model(), prompt(150)
    with asymkv.replace("llama", model=model, **settings):
        cache = fed(model, ids, 100, *range(101, 105))
        cache.save(tmp_path)
        loaded = asymkv.CompressedCache.load(tmp_path, model)
        for end in range(105, 150):
            for each in (cache, loaded):
                model(ids[:, end - 1 : end], past_key_values=each)
    assert_same_rows(cache, loaded)


# -- the public code's rule ----------------------------------------------------------------------------------------
def test_public_rule_replaces_every_heads_cache_by_the_same_rows():
    model, ids = tiny_model(), prompt(64)
    with asymkv.replace("llama", model=model, **SEED):
        cache = fed(model, ids, 48)
    for layer in range(2):
        keys, n = cache.keys(layer)[0], cache.cardinality(layer)[0]
        assert [len(k) for k in keys] == [9, 9] and torch.equal(*keys) and torch.equal(*cache.values(layer)[0])
        assert all((x == 1).all() for x in n)
    assert [p.tolist() for p in cache.positions(0)[0]] == [p.tolist() for p in cache.positions(1)[0]]


@pytest.mark.parametrize("eta", [0.0, 0.01, 1.0])
def test_public_rule_moves_random_rows_by_eta(eta):
    """``(1 - eta) c + eta mean``: from rows of some head, the public code's loop restated."""
    model, ids = tiny_model(dtype=torch.float64), prompt(48)
    with asymkv.replace("llama", model=model, method="full"):
        keys = model(ids).past_key_values.keys(0)[0]
    with asymkv.replace("llama", model=model, **{**SEED, "kmeans_learning_rate": eta, "budget": 47}):
        cache = fed(model, ids, 48)
    kept = torch.stack(keys)  # [H, T, D]; one token of 48 was dropped
    with asymkv.replace("llama", model=model, **{**SEED, "kmeans_learning_rate": 0.0, "budget": 47}):
        start = fed(model, ids, 48).keys(0)[0][0]
    assert ((kept.flatten(0, 1)[None] - start[:, None]).abs().amax(-1).amin(1) < 1e-12).all()
    gaps = []
    for gone in range(48):  # whichever it was
        rows = torch.cat([kept[:, :gone], kept[:, gone + 1 :]], 1).flatten(0, 1)
        assign = torch.cdist(rows, start).argmin(1)
        moved = torch.stack([(1 - eta) * c + eta * rows[assign == k].mean(0) for k, c in enumerate(start)])
        gaps.append((moved - cache.keys(0)[0][0]).abs().max().item())
    assert min(gaps) < 1e-10


# -- bad input -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("settings", "message"), [
    ({"num_clusters": 900}, r"num_clusters \+ sink_size \+ recent rows = 900 \+ 4 \+ 256 exceed the budget of 1024.*"
                            "at most 764 clusters, or at least 1024"),
    ({"recent_size": 1020, "num_clusters": 1}, r"= 1 \+ 4 \+ 1020 exceed the budget"),
    ({"budget": 64, "recent_size": 100, "num_clusters": 8}, r"= 8 \+ 4 \+ 100 exceed the budget of 64 rows; allowed: "
        r"no clusters, since sinks and recent rows alone, 4 \+ 100, leave no row, or at least 64"),
    ({"lookback_window": 600}, "lookback_window must be at most pruning_interval=512.*found 600"),
    ({"num_clusters": 0}, "num_clusters must be an integer >= 1; found 0"),
    ({"kmeans_learning_rate": 1.5}, "kmeans_learning_rate must be a number from 0 to 1; found 1.5"),
    ({"score_scope": "model"}, "score_scope='model'; allowed: .*global"),
    ({"kmeans_update": "sgd"}, "kmeans_update='sgd'; allowed: .*ema"),
    ({"rope_mode": "pre"}, "rope_mode='pre'; allowed: .*derotate"),
    ({"rope_mode": "derotate", "position_policy": "compact"}, "position_policy must be 'original', found 'compact'"),
    ({"kmeans_update": "ema", "kmeans_iters": 2}, "kmeans_iters must be 1, found 2"),
    ({"score_scope": "layer", "head_budgets": "adaptive"}, "head_budgets must be 'pooled', found 'adaptive'"),
    ({"score_scope": "global", "layer_budgets": "pyramid"}, "layer_budgets must be 'pooled', found 'pyramid'"),
    ({"seed_compat": True, "sink_size": 4}, "seed_compat=True.*'sink_size': 0.*found .*'sink_size': 4"),
    ({"evict_centroids": "yes"}, "evict_centroids must be True or False; found 'yes'"),
    ({"seed_compat": True, "importance": True}, "seed_compat=True.*'importance': False.*found .*'importance': True"),
    ({"seed_compat": True, "rope_mode": "derotate"}, "seed_compat=True.*found .*'derotate'"),
], ids=str)  # fmt: skip
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        asymkv.CompressionConfig("aagc", **{"budget": 1024, **settings})


def test_a_share_of_a_prompt_that_holds_too_few_rows_is_named():
    """K is known, the budget only with the prompt."""
    model = tiny_model()
    with asymkv.replace("llama", model=model, **{**SMALL, "budget": None, "ratio": 0.2, "num_clusters": 15}):
        with pytest.raises(ValueError, match=r"= 15 \+ 4 \+ 5 exceed the budget of 20 rows"):
            model(prompt(100))
        assert model(prompt(200)).past_key_values.compactions
