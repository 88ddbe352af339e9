"""KVMerger: merge sets, Gaussian weights, exact budgets, protected rows."""

import math

import pytest
import torch
from merging_views import DIM, carried_out, directions, make_view, options, planned, rope, scalars
from tiny_models import assert_close

from asymkv.methods.kvmerger import Sets, free_pairs
from asymkv.ops.reference import lma_attention
from asymkv.plan import contract_pairs

ALL = {"sink": 2, "window": 3}
MODES = ["pre", "post"]


def pairs(*linked):
    """``[1, 1, T - 1]`` bool."""
    return torch.tensor([[linked]]).bool()


def two_keys(sigma, **settings):
    """Keys 0 (pivot: most attended) and 1, one dimension apart: weights and the merged key."""
    keys = torch.zeros(1, 1, 3, DIM, dtype=torch.float64)
    keys[..., 1, 0] = 1
    layer, view = make_view(3, 1, keys=keys, values=scalars(0, 1, 5), mass=[3, 2, 1])
    method = options("kvmerger", rope_mode="post", sigma=sigma, **settings)
    weight = method.weights(view, Sets(contract_pairs(pairs(1, 0)), view.statistics["mass"]))[0, 0, :2]
    return weight.tolist(), carried_out(method, layer, view, pairs(1, 0))


# -- weights -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("sigma", "g", "w"), [
    (math.sqrt(0.5), 0.3679, (0.7311, 0.2689)), (0.5, 0.1353, (0.8808, 0.1192)), (None, math.exp(-0.5), None),
], ids=str)  # fmt: skip
def test_worked_examples_of_the_gaussian(sigma, g, w):
    """With sigma**2 = 0.5 and sigma = 0.5 as given; by default sigma**2 is the mean squared distance, here 1."""
    weight, out = two_keys(sigma)
    assert weight[1] / weight[0] == pytest.approx(g, abs=5e-5)
    assert weight == pytest.approx(list(w or (1 / (1 + g), g / (1 + g))), abs=5e-5)
    assert out.rows("keys", 0)[0, 0].item() == pytest.approx(weight[1])
    assert out.rows("values", 0)[:, 0].tolist() == pytest.approx([weight[1], 5])


def test_value_scale_sum_multiplies_by_the_set():
    weight, out = two_keys(0.5, value_scale="sum")
    assert out.rows("values", 0)[:, 0].tolist() == pytest.approx([2 * weight[1], 5])
    assert out.rows("keys", 0)[0, 0].item() == pytest.approx(weight[1])


@pytest.mark.parametrize("count_bias", [False, True])
@pytest.mark.parametrize("rope_mode", MODES)
def test_weights_sum_to_one_and_the_pivot_has_the_largest(rope_mode, count_bias):
    _, view = make_view()
    method = options("kvmerger", rope_mode=rope_mode, count_bias=count_bias, **ALL)
    chosen = torch.rand(1, 2, 23) < 0.6
    sets = Sets(contract_pairs(chosen), view.statistics["mass"])
    weight = method.weights(view, sets)
    assert_close("sum", torch.ones_like(weight), sets.sum(weight), 1e-12)
    assert (weight <= weight.gather(2, sets.pivot) + 1e-12).all()
    assert (weight[sets.size == 1] == 1).all()


def test_with_counts_rows_weigh_by_their_tokens():
    _, view = make_view(2, 1, n=[3, 1], mass=[1, 2])
    sets = Sets(contract_pairs(pairs(1)), view.statistics["mass"])
    plain = options("kvmerger").weights(view, sets)[0, 0]
    counted = options("kvmerger", count_bias=True).weights(view, sets)[0, 0]
    assert (counted[0] / counted[1]).item() == pytest.approx(3 * (plain[0] / plain[1]).item())


@pytest.mark.parametrize("rope_mode", MODES)
def test_identical_keys_keep_the_key_and_average_the_values(rope_mode):
    key = torch.randn(DIM, dtype=torch.float64).expand(1, 1, 4, DIM)
    if rope_mode == "pre":
        key = rope().rotate(key, torch.arange(4).expand(1, 1, -1))
    layer, view = make_view(4, 1, keys=key, values=scalars(1, 2, 6, 9), mass=[1, 3, 2, 1])
    out = carried_out(options("kvmerger", rope_mode=rope_mode), layer, view, pairs(1, 1, 0))
    assert out.rows("position", 0).tolist() == ([2, 3] if rope_mode == "pre" else [1, 3])
    assert_close("key", view.keys[0, 0, 2 if rope_mode == "pre" else 1], out.rows("keys", 0)[0], 1e-6)
    assert out.rows("values", 0)[:, 0].tolist() == pytest.approx([3, 9])


def test_merging_duplicates_is_exact_with_counts_and_off_by_the_count_without():
    """Of three equal rows one is left: their share of attention is 3 e / (3 e + r) with counts, e / (e + r) without."""
    key = torch.randn(1, 1, 5, DIM, dtype=torch.float64)
    key[..., 1:3, :] = key[..., :1, :]
    value = scalars(2, 2, 2, 5, 7)
    query = torch.randn(1, 1, 1, DIM, dtype=torch.float64)
    full, _ = lma_attention(query, key, value, torch.ones(1, 1, 5), scale=0.25)
    logits = torch.exp(0.25 * (query @ key.transpose(-1, -2)))[0, 0, 0]
    rest = logits[3] + logits[4]
    tail = (5 * logits[3] + 7 * logits[4]) / rest
    for count_bias in (True, False):
        layer, view = make_view(5, 1, keys=key, values=value, mass=[1, 3, 2, 1, 1])
        out = carried_out(options("kvmerger", rope_mode="post", count_bias=count_bias), layer, view, pairs(1, 1, 0, 0))
        n = out.rows("cardinality", 0)[None, None]
        assert n.tolist() == [[[3 if count_bias else 1, 1, 1]]]
        got, _ = lma_attention(query, out.dense("keys")[None], out.dense("values")[None], n, scale=0.25)
        mass = logits[:1] * (3 if count_bias else 1)
        assert_close("closed form", (2 * mass + tail * rest) / (mass + rest), got[0, 0, 0, :1], 1e-9)
        assert torch.allclose(got, full) == count_bias


# -- sets --------------------------------------------------------------------------------------------------------
def test_a_threshold_on_neighbours_gives_the_sets_of_the_papers_scan():
    """From the last row to the first: a row joins the set behind it while their similarity reaches epsilon."""
    layer, view = make_view(40, 2, mass=torch.ones(40), budget=25)
    method = options("kvmerger", rope_mode="post", protect_share=0.0, sink=0, window=0)
    keys = torch.nn.functional.normalize(view.keys[0], dim=-1)
    out = planned(method, layer, view)
    for head in range(2):
        cosine = (keys[head, 1:] * keys[head, :-1]).sum(-1)
        epsilon = cosine.sort(descending=True).values[14]
        sets, current = [], [39]
        for i in range(38, -1, -1):
            if cosine[i] >= epsilon:
                current.insert(0, i)
            else:
                sets.insert(0, current)
                current = [i]
        sets.insert(0, current)
        assert len(sets) == 25 == out.length[head] and sum(sets, []) == list(range(40))
        assert out.rows("position", head).tolist() == [s[0] for s in sets]  # equal attention: the oldest leads


def test_sets_cover_every_row_once_and_in_order():
    _, view = make_view(30, 2)
    sets = Sets(contract_pairs(torch.rand(1, 2, 29) < 0.5), view.statistics["mass"])
    assert (sets.last.diff() >= 0).all() and (sets.last >= sets.index).all()
    leads = sets.last == sets.index
    assert (torch.where(leads, sets.size, 0).sum(-1) == 30).all()
    assert ((sets.pivot <= sets.last) & (sets.pivot > sets.last - sets.size)).all()


@pytest.mark.parametrize("budget", range(6, 25))
@pytest.mark.parametrize("rope_mode", MODES)
def test_budget_is_exact_and_nothing_is_dropped(rope_mode, budget):
    """From every row down to sinks, window and one row; the rest of each head survives bit for bit."""
    layer, view = make_view(budget=budget, n=[1, 2, 3] * 8)
    source = view.keys.clone()
    out = planned(options("kvmerger", rope_mode=rope_mode, count_bias=True, protect_share=0.5, **ALL), layer, view)
    assert out.length == [budget, budget]
    for head in range(2):
        positions = out.rows("position", head).tolist()
        assert positions[:2] == [0, 1] and positions[-3:] == [21, 22, 23]
        assert out.rows("cardinality", head).sum() == 48
        fixed = [0, 1, -3, -2, -1]
        assert torch.equal(out.rows("keys", head)[fixed], source[0, head, fixed])


def test_of_equal_similarities_the_newest_merge_first():
    layer, view = make_view(12, 1, keys=torch.ones(1, 1, 12, DIM), mass=torch.ones(12), budget=9)
    method = options("kvmerger", rope_mode="post", sink=1, window=2, protect_share=0.0, count_bias=True)
    assert planned(method, layer, view).rows("cardinality", 0).tolist() == [1, 1, 1, 1, 1, 1, 4, 1, 1]


def test_pre_compares_keys_before_rope():
    """Row 4 equals row 3 before RoPE; rows 6 and 7 are equal after it."""
    pre = torch.randn(1, 1, 12, DIM, dtype=torch.float64)
    pre[..., 4, :] = pre[..., 3, :]
    at = torch.arange(12).expand(1, 1, -1)
    keys = rope().rotate(pre, at)
    keys[..., 7, :] = keys[..., 6, :]
    for rope_mode, gone in (("pre", 3), ("post", 6)):
        layer, view = make_view(12, 1, keys=keys, mass=torch.arange(12), budget=11)
        out = planned(options("kvmerger", rope_mode=rope_mode, protect_share=0.0), layer, view)
        assert out.rows("position", 0).tolist() == [i for i in range(12) if i != gone]


# -- protected rows ----------------------------------------------------------------------------------------------
def test_the_most_attended_rows_stay_alone():
    layer, view = make_view(40, 2, budget=25)
    source, mass = view.keys.clone(), view.statistics["mass"].clone()
    out = planned(options("kvmerger", protect_share=0.2, **ALL), layer, view)
    for head in range(2):
        top = (mass[0, head, 2:37].argsort(descending=True)[:5] + 2).tolist()
        positions = out.rows("position", head).tolist()
        assert set(top) <= set(positions)
        assert torch.equal(out.rows("keys", head)[[positions.index(p) for p in top]], source[0, head, top])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
def test_as_many_are_protected_as_the_budget_allows(share):
    """Against trying every number."""
    _, view = make_view(30, 2, budget=14, seed=3)
    method = options("kvmerger", protect_share=share, **ALL)
    fixed = view.protected(2, 3)
    mass = view.statistics["mass"]
    found = method.pivotal(mass, fixed, view.excess, view.budget)
    for head in range(2):
        order = (mass[0, head, 2:27].argsort(descending=True) + 2).tolist()
        fits = []
        for count in range(int(14 * share) + 1):
            tried = fixed[0, head].clone()
            tried[order[:count]] = True
            fits.append(int(free_pairs(tried).sum()) >= 16)
        best = max(i for i, ok in enumerate(fits) if ok)
        assert found[0, head].nonzero().flatten().tolist() == sorted(order[:best])


def test_mass_of_a_set_adds_up():
    layer, view = make_view(5, 1, mass=[1, 2, 4, 8, 16])
    out = carried_out(options("kvmerger"), layer, view, pairs(1, 1, 0, 0))
    assert out.rows("mass", 0).tolist() == [7, 8, 16]


def test_neighbours_that_are_alike_merge_first():
    """Cosines 0.95 and 0.1 of neighbours: the budget takes the first."""
    layer, view = make_view(3, 1, keys=directions(0.95, 0.1), budget=2)
    out = planned(options("kvmerger", rope_mode="post", window=0, protect_share=0.0, count_bias=True), layer, view)
    assert out.rows("cardinality", 0).tolist() == [2, 1]


@pytest.mark.parametrize(("settings", "message"), [
    ({"rope_mode": "none"}, "rope_mode='none'; allowed:.*pre.*post"),
    ({"value_scale": 2}, "value_scale=2; allowed:.*mean.*sum"),
    ({"protect_share": 2}, "protect_share must be a number from 0 to 1; found 2"),
    ({"sigma": 0}, "sigma must be a number >= 1e-06; found 0"),
    ({"count_bias": 0}, "count_bias must be True or False; found 0"),
    ({"count_bias": True, "value_scale": "sum"}, "value_scale must be 'mean', found 'sum'"),
    ({"head_budgets": "pooled"}, "head_budgets must not be 'pooled'"),
    ({"layer_budgets": "pooled"}, "layer_budgets must not be 'pooled'"),
], ids=str)  # fmt: skip
def test_bad_options_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        options("kvmerger", **settings)
