"""Splits of a budget: exact sums, the published examples, deterministic ties, and what a split may not do."""

import pytest
import torch
from tiny_models import prompt, tiny_model

import asymkv
from asymkv.budgets import HEAD_BUDGETS, LAYER_BUDGETS, make_split
from asymkv.budgets.heads import Adaptive, HeadBudgets, Judged
from asymkv.budgets.layers import Dynamic, Global, LayerBudgets, Pyramid, Request, Variance
from asymkv.budgets.split import apportion


def judged(costs, budget, layer=0, free=None):
    """One sequence's layer whose units cost ``costs [H_kv][U]``."""
    cost = torch.tensor(costs, dtype=torch.float64)[None]
    lengths = torch.full(cost.shape[:2], cost.shape[-1])
    return Judged(cost, torch.ones_like(cost, dtype=torch.bool) if free is None else free, lengths,
                  torch.full_like(lengths, budget), layer)  # fmt: skip


def request(rows, tokens=1000, ratio=None, sink=0, window=0):
    return Request(rows, tokens, ratio, sink, window)


def kept(chosen):
    return (~chosen).sum(-1)[0].tolist()


# -- whole numbers -------------------------------------------------------------------------------------------------
def test_apportion_sums_exactly_within_bounds():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        n = int(torch.randint(1, 9, (), generator=generator))
        shares = torch.rand(3, n, generator=generator) ** 4
        most = torch.randint(0, 50, (3, n), generator=generator)
        least = (most * torch.rand(3, n, generator=generator)).long()
        total = least.sum(1) + (torch.rand(3, generator=generator) * (most - least).sum(1)).long()
        out = apportion(shares, total, least, most)
        assert torch.equal(out.sum(1), total) and (out >= least).all() and (out <= most).all()


def test_apportion_is_the_largest_remainder():
    zero, many = torch.zeros(1, 3, dtype=torch.long), torch.full((1, 3), 100)
    assert apportion(torch.tensor([[3.6, 0.4, 0.0]]), torch.tensor([4]), zero, many).tolist() == [[4, 0, 0]]
    assert apportion(torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([4]), zero, many).tolist() == [[2, 1, 1]]
    assert apportion(torch.tensor([[9.0, 1.0, 0.0]]), torch.tensor([10]), zero, many.clamp(max=6)).sum() == 10


# -- heads -----------------------------------------------------------------------------------------------------------
def test_adakv_interpolates_between_what_a_head_wins_and_the_even_share():
    """b = 10, floor 0.2, two heads, the first wins all: 0.8 * 20 + 0.2 * 10 = 18 and 2."""
    layer = judged([[1.0 + i / 100 for i in range(20)], [i / 100 for i in range(20)]], budget=10)
    assert kept(Adaptive(0.2).choose(layer)) == [18, 2]
    assert kept(Adaptive(0.0).choose(layer)) == [20, 0]
    assert kept(Adaptive(1.0).choose(layer)) == [10, 10]


def test_adakv_loses_no_row_to_rounding():
    layer = judged([[4.0, 3.0, 2.5, 2.2], [1.0, 0.9, 0.8, 0.1]], budget=2)
    assert sum(kept(Adaptive(0.2).choose(layer))) == 4


def test_hard_floor_keeps_the_best_of_every_head():
    layer = judged([[1.0 + i / 100 for i in range(20)], [i / 100 for i in range(20)]], budget=10)
    chosen = Adaptive(0.2, "hard").choose(layer)
    assert kept(chosen) == [18, 2] and (~chosen)[0, 1].nonzero().flatten().tolist() == [18, 19]
    assert kept(Adaptive(0.0, "hard").choose(layer)) == [20, 0]


@pytest.mark.parametrize("mode", ["interpolated", "hard"])
def test_equal_heads_share_evenly(mode):
    costs = torch.rand(20, generator=torch.Generator().manual_seed(3)).tolist()
    assert kept(Adaptive(0.2, mode).choose(judged([costs, costs, costs], budget=7))) == [7, 7, 7]


def test_a_shorter_head_makes_room_for_the_others():
    layer = judged([[1.0] * 12, [0.5] * 12], budget=8)
    layer.lengths[0, 1], layer.free[0, 1, 5:] = 5, False
    chosen = Adaptive(0.0).choose(layer)
    assert (layer.lengths[0] - chosen[0].sum(-1)).sum() == 16
    assert kept(HeadBudgets().choose(layer))[0] == 8


# -- layers ----------------------------------------------------------------------------------------------------------
def test_pyramid_of_the_paper():
    """L = 4, capacity 128, window 8, 2,000 tokens: 234, 158, 82, 6 and the window in each."""
    assert Pyramid(20).rows(request(128, 2000, window=8), 4) == [n + 8 for n in (234, 158, 82, 6)]


def test_pyramid_of_a_prompt_below_twice_the_mean_is_even():
    assert Pyramid(20).rows(request(608, 1000, window=8), 4) == [608] * 4
    assert len(set(Pyramid(20).rows(request(508, 1000, window=8), 4))) == 4


@pytest.mark.parametrize("layers", [1, 2, 32, 33])
@pytest.mark.parametrize("tokens", [260, 300, 2000])
def test_pyramid_sums_exactly_and_never_asks_for_more_than_there_is(layers, tokens):
    rows = Pyramid(20).rows(request(256, tokens, sink=4, window=32), layers)
    assert sum(rows) == 256 * layers and max(rows) <= tokens and min(rows) > 36
    assert all(a >= b for a, b in zip(rows, rows[1:], strict=False))


def test_pyramid_of_kvpress_falls_back_below_its_window():
    kvpress = Pyramid(20, "kvpress")
    assert kvpress.rows(request(100, 400, 0.25, window=64), 4) == [100] * 4
    line = kvpress.rows(request(2000, 4000, 0.5, window=64), 4)
    assert line[0] == 3900 and line[-1] == 100


def test_dynamic_counts_the_best_units_of_all_layers():
    first = judged([[0.5, 0.3, 0.25, 0.22]], 2)
    second = judged([[0.2, 0.15, 0.1, 0.02]], 2, layer=1)
    split = Dynamic(r_max=2, r_min=0)
    assert split.budgets([first, second], [request(2)]).tolist() == [[4, 0]]
    first = judged([[0.5, 0.3, 0.1, 0.05]], 2)
    assert split.budgets([first, second], [request(2)]).tolist() == [[2, 2]]
    assert Dynamic(r_max=1.5, r_min=0).budgets([judged([[9.0] * 8], 4), judged([[1.0] * 8], 4)],
                                               [request(4)]).tolist() == [[6, 2]]  # fmt: skip


@pytest.mark.parametrize("split", [Dynamic(3, 0.2), Variance(3, 0.2), Global(0.1), Global()])
def test_deferred_splits_sum_exactly_and_spare_rows_without_a_request(split):
    torch.manual_seed(0)
    layers = []
    for i in range(3):
        cost = torch.rand(2, 2, 40, dtype=torch.float64) * (i + 1)
        lengths = torch.full((2, 2), 40)
        limit = torch.tensor([[11, 11], [40, 40]])
        layers.append(Judged(cost, torch.ones_like(cost, dtype=torch.bool), lengths, limit, i))
    chosen = split.split(layers, [request(11, 40), None], HeadBudgets())
    assert sum(int((~c[0]).sum()) for c in chosen) == 3 * 2 * 11
    assert not any(c[1].any() for c in chosen)


def test_variance_shares_by_softmax():
    """D2O's example, f = (.1, .2, .7): shares .407556, .368772, .223672."""
    f = torch.tensor([[0.1, 0.2, 0.7]], dtype=torch.float64)
    shares = (-f).softmax(1)
    assert torch.allclose(shares, torch.tensor([[0.407556, 0.368772, 0.223672]], dtype=torch.float64), atol=1e-6)
    even, spiky = [[1.0] * 20, [1.0] * 20], [[0.0] * 10 + [9.0] * 10, [1.0] * 20]
    rows = Variance(10, 0).budgets([judged(even, 5), judged(spiky, 5)], [request(5)])[0].tolist()
    # f = 0 for the even layer; of the other's heads one has the largest variance: (1 + 0) / 2.
    assert rows == [6, 4] and sum(rows) == 10


def test_global_takes_the_cheapest_of_the_whole_cache_and_may_empty_a_head():
    chosen = Global().split([judged([[5.0, 6.0], [0.1, 0.2]], 1), judged([[3.0, 4.0], [0.3, 7.0]], 1, 1)],
                            [request(1, 2)], HeadBudgets())  # fmt: skip
    assert [kept(c) for c in chosen] == [[2, 0], [1, 1]]


def test_global_total_takes_the_ratio_of_all_rows_at_once():
    layers = [judged([[float(j) for j in range(11)]] * 2, 2, i) for i in range(3)]
    chosen = Global(rounding="total").split(layers, [request(2, 11, 0.25)], HeadBudgets())
    assert sum(sum(kept(c)) for c in chosen) == 66 - int(66 * 0.75)


# -- whole runs ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("settings", [
    {"method": "asymkv", "head_budgets": {"kind": "adaptive", "floor": 0.2}},
    {"method": "asymkv", "layer_budgets": {"kind": "pyramid", "beta": 5}},
    {"method": "asymkv", "layer_budgets": "global"},
    {"method": "h2o", "layer_budgets": "dynamic", "head_budgets": "adaptive"},
    {"method": "adakv", "window_size": 8, "layer_budgets": "pyramid"},
    {"method": "keydiff", "layer_budgets": {"kind": "variance"}},
], ids=lambda s: f"{s['method']}-{s.get('layer_budgets', 'even')}-{s.get('head_budgets', 'even')}")  # fmt: skip
def test_total_rows_meet_the_budget_and_memory_is_freed(settings):
    model = tiny_model(num_hidden_layers=3, num_key_value_heads=4)
    with asymkv.replace("llama", model=model, budget=64, **settings):
        cache = model(prompt(400)).past_key_values
        rows = torch.stack([cache.num_rows(layer)[0] for layer in range(3)])
        assert rows.sum() == 64 * rows.numel() and len(set(rows.flatten().tolist())) > 1
        slack = sum(max(16, int(0.125 * n)) for n in rows.flatten().tolist())
        per_row = 2 * 16 * 4 + 12 + (4 if "attention" in cache.config.options.needs else 0)
        tables = 4096  # start, length and capacity of each head
        assert sum(layer.storage.nbytes for layer in cache.layers) <= (64 * rows.numel() + slack) * per_row + tables
        if settings["method"] == "asymkv":
            assert all(int(n.sum()) == 400 for layer in range(3) for n in cache.cardinality(layer)[0])
        if cache.config.chunk:
            assert 64 < cache.peak_rows <= 64 + cache.config.chunk
        out = model.generate(prompt(30, seed=5), past_key_values=None, max_new_tokens=4, do_sample=False)
        assert out.shape[1] == 34


@pytest.mark.parametrize(("settings", "message"), [
    ({"head_budgets": {"kind": "adaptive", "floor": 1.5}}, "floor.*from 0 to 1; found 1.5"),
    ({"head_budgets": {"kind": "adaptive", "mode": "soft"}}, "mode.*'soft'.*interpolated"),
    ({"head_budgets": None}, "head_budgets must be a kind or a mapping with one; found None; allowed: .*adaptive"),
    ({"layer_budgets": ["pyramid"]}, "layer_budgets must be a kind or a mapping"),
    ({"method": "duo_attention", "sparsity": 0.5, "recent_size": 10.5}, "recent .*an integer >= 1; found 10.5"),
    ({"layer_budgets": {"kind": "pyramid", "beta": 0.5}}, "beta.*>= 1; found 0.5"),
    ({"layer_budgets": {"kind": "dynamic", "r_max": 0}}, "r_max.*>= 1"),
    ({"layer_budgets": "global", "head_budgets": "adaptive"}, "splits over heads too"),
    ({"upstream_compat": True, "head_budgets": "adaptive"}, "decides for itself.*head_budgets"),
    ({"method": "chunkkv", "whole_chunks": True, "layer_budgets": "dynamic"}, "decides for itself.*layer_budgets"),
])  # fmt: skip
def test_bad_splits_say_what_is_allowed(settings, message):
    with pytest.raises(ValueError, match=message):
        asymkv.CompressionConfig(**settings)


def test_every_kind_is_made_by_its_name():
    assert isinstance(make_split("layer_budgets", "uniform", LAYER_BUDGETS), LayerBudgets)
    for name, table in (("head_budgets", HEAD_BUDGETS), ("layer_budgets", LAYER_BUDGETS)):
        with pytest.raises(ValueError, match="unknown.*'nothing'.*uniform"):
            make_split(name, "nothing", table)


# -- pooled --------------------------------------------------------------------------------------------------------
def test_pooled_heads_and_layers_lose_the_same_units():
    """Sums over heads, and over layers: free units are counted from the oldest, wherever they lie."""
    free = torch.tensor([[[True, True, True, False], [False, True, True, True]]])
    cost = torch.tensor([[[1.0, 5, 9, 0], [0, 9, 3, 2]]])  # in sum over the heads: 10, 8, 11
    one = Judged(cost, free, torch.full((1, 2), 4), torch.tensor([[3, 3]]))
    assert HEAD_BUDGETS["pooled"]().choose(one)[0].nonzero().tolist() == [[0, 1], [1, 2]]
    other = Judged(torch.tensor([[[0.0, 8, 0], [0, 0, 0]]]), torch.ones(1, 2, 3, dtype=torch.bool),
                   torch.full((1, 2), 3), torch.tensor([[2, 3]]))  # with the first layer: 10, 16, 11
    first, second = LAYER_BUDGETS["pooled"]().split([one, other], [None], HEAD_BUDGETS["uniform"]())
    assert first[0].nonzero().tolist() == [[0, 0], [1, 1]] and second[0].nonzero().tolist() == [[0, 0], [1, 0]]


def test_pooled_refuses_heads_that_hold_different_rows():
    free = torch.tensor([[[True, True], [True, False]]])
    judged = Judged(torch.zeros(1, 2, 2), free, torch.full((1, 2), 2), torch.ones(1, 2).long())
    with pytest.raises(ValueError, match=r"heads that hold the same rows.*\[2, 1\]"):
        HEAD_BUDGETS["pooled"]().choose(judged)
    none = Judged(torch.zeros(1, 2, 2), free, torch.full((1, 2), 2), torch.full((1, 2), 2))
    assert not HEAD_BUDGETS["pooled"]().choose(none).any()
