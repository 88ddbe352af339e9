"""Contracts of every method that folds leaving rows into kept ones, and of what they share."""

import pytest
import torch
from merging_views import DIM, carried_out, directions, make_view, marked, options, planned
from tiny_models import prompt, tiny_model

import asymkv
from asymkv.methods import merging
from asymkv.methods.merging import leaving_rows, nearest_row

VARIANTS = [
    ("cam", {}), ("cam", {"count_bias": True}), ("cam", {"select": "streaming", "deterministic": True}),
    ("d2o", {}), ("d2o", {"mode": "code", "count_bias": True}),
    ("kvmerger", {}), ("kvmerger", {"rope_mode": "post"}), ("kvmerger", {"count_bias": True}),
    ("value_merge", {}), ("value_merge", {"mode": "pivot"}), ("value_merge", {"mode": "weighted", "select": "knorm"}),
    ("value_merge", {"mode": "weighted", "count_bias": True}),
]  # fmt: skip
every = pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=str)
COUNTS_ALL = [("kvmerger", {}), ("value_merge", {"mode": "weighted"}), ("value_merge", {"mode": "pivot"})]


# -- contracts ---------------------------------------------------------------------------------------------------
@every
def test_budget_sinks_window_and_live_rows(name, settings):
    """Heads end at their own budgets; what a method edits is a copy, not the cache."""
    layer, view = make_view(30, 2, batch=2)
    view.budget = torch.tensor([[14, 20], [30, 11]])
    before = {n: c.clone() for n, c in layer.storage.columns.items()}
    source = view.keys.clone()
    method = options(name, sink=2, window=3, **settings)
    plan = method.plan(view)
    assert all(torch.equal(before[n], c) for n, c in layer.storage.columns.items())
    out = asymkv.plan.execute(plan, view, layer.storage, "original")
    assert out.length == [14, 20, 30, 11]
    for head in range(4):
        positions, keys = out.rows("position", head).tolist(), out.rows("keys", head)
        assert positions[:2] == [0, 1] and positions[-3:] == [27, 28, 29] and positions == sorted(set(positions))
        assert torch.equal(keys[:2], source.flatten(0, 1)[head, :2])
        assert torch.isfinite(keys).all() and torch.isfinite(out.rows("values", head)).all()
    assert torch.equal(out.rows("keys", 2), source[1, 0]) and torch.equal(out.rows("values", 2), view.values[1, 0])


@every
@pytest.mark.parametrize("mass", [0.0, 1.0])
@pytest.mark.parametrize("same", [False, True], ids=["random", "equal"])
def test_equal_scores_and_equal_rows_give_no_nan(name, settings, mass, same):
    rows = {"keys": torch.ones(1, 2, 24, DIM), "values": torch.ones(1, 2, 24, DIM)} if same else {}
    layer, view = make_view(mass=torch.full((24,), mass), **rows)
    out = planned(options(name, sink=2, window=3, **settings), layer, view)
    assert out.length == [14, 14]
    for column in ("keys", "values", "log_n"):
        assert torch.isfinite(out.dense(column)).all()


@every
def test_zero_rows_give_no_nan(name, settings):
    layer, view = make_view(keys=torch.zeros(1, 2, 24, DIM), values=torch.zeros(1, 2, 24, DIM))
    out = planned(options(name, sink=2, window=3, **settings), layer, view)
    assert out.length == [14, 14] and not out.dense("values").any() and not out.dense("keys").any()


@every
@pytest.mark.parametrize("rows", [1, 3])
def test_heads_inside_the_window_lose_nothing(name, settings, rows):
    """One row, and fewer rows than the window, whatever the budget says."""
    layer, view = make_view(rows, 2, budget=1)
    keys, values = view.keys.clone(), view.values.clone()
    out = planned(options(name, sink=0, window=3, **settings), layer, view)
    assert out.length == [rows, rows]
    assert torch.equal(out.dense("keys")[None], keys) and torch.equal(out.dense("values")[None], values)


@every
def test_half_precision_rows_that_nothing_joins_keep_their_bits(name, settings):
    layer, view = make_view(60, 2, budget=59, dtype=torch.bfloat16)
    keys, values = view.keys.clone(), view.values.clone()
    out = planned(options(name, sink=2, window=3, **settings), layer, view)
    touched = 0
    for head in range(2):
        position = out.rows("position", head).long()
        touched += int((out.rows("values", head) != values[0, head, position]).any(-1).sum())
        moved = (out.rows("keys", head) != keys[0, head, position]).any(-1)
        assert moved.sum() <= 1
    assert touched <= (2 * 32 if name == "cam" else 2)


@every
def test_prefill_decode_and_a_second_turn(name, settings):
    """Exact budgets throughout; cardinalities never exceed the tokens seen, and are 1 without counts."""
    model = tiny_model()
    with asymkv.replace("llama", method=name, budget=60, chunk_size=40, decode_interval=16, **settings):
        first = model.generate(prompt(300), max_new_tokens=50, do_sample=False, return_dict_in_generate=True)
        cache = first.past_key_values
        assert all((cache.num_rows(i) >= 60).all() and (cache.num_rows(i) < 76).all() for i in range(2))
        model(prompt(90, seed=5), past_key_values=cache)
    for layer in range(2):
        assert cache.num_rows(layer).tolist() == [[60, 60]]
        for n, p in zip(cache.cardinality(layer)[0], cache.positions(layer)[0], strict=True):
            assert (n.sum() <= 439) if settings.get("count_bias") else (n == 1).all()
            assert p[-1] == 438 and (p.diff() > 0).all()
    assert cache.peak_rows <= 100


@pytest.mark.parametrize(("name", "settings"), COUNTS_ALL, ids=str)
def test_cardinalities_sum_to_all_tokens_where_everything_merges(name, settings):
    model = tiny_model()
    with asymkv.replace("llama", method=name, budget=60, chunk_size=40, count_bias=True, **settings):
        cache = model(prompt(300)).past_key_values
    assert [[int(n.sum()) for n in cache.cardinality(layer)[0]] for layer in range(2)] == [[300, 300]] * 2


def test_d2o_remembers_its_threshold_per_layer_and_row():
    """It moves with every compaction, follows the batch, and a fork has its own."""
    model = tiny_model()
    with asymkv.replace("llama", method="d2o", budget=60, chunk_size=40):
        cache = model(prompt(120, 2)).past_key_values
        first = [layer.memory["threshold"].clone() for layer in cache.layers]
        fork = cache.fork()
        model(prompt(90, 2, seed=5), past_key_values=fork)
    assert all(t.shape == (2,) and t.isfinite().all() for t in first) and not torch.equal(*first)
    for layer, other, old in zip(cache.layers, fork.layers, first, strict=True):
        assert torch.equal(layer.memory["threshold"], old) and not torch.equal(other.memory["threshold"], old)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[0].memory["threshold"], first[0].flip(0))


@pytest.mark.parametrize("method", ["cam", "d2o", "kvmerger", "value_merge"])
def test_a_run_repeats_itself(method):
    """Draws included: two runs give the same rows, bit for bit."""
    model = tiny_model()
    with asymkv.replace("llama", method=method, budget=60, chunk_size=40):
        a, b = (model(prompt(200)).past_key_values for _ in range(2))
    assert all(torch.equal(x, y) for i in range(2) for x, y in zip(a.values(i)[0], b.values(i)[0], strict=True))


# -- shared parts ------------------------------------------------------------------------------------------------
def test_leaving_rows_are_listed_by_position():
    chosen = torch.tensor([[[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]]).bool()
    index, present = leaving_rows(chosen)
    assert present.tolist() == [[[True, True], [True, False], [False, False]]]
    assert index[present].tolist() == [1, 3, 0]
    assert leaving_rows(chosen[:, 2:])[1].tolist() == [[[False]]]


@pytest.mark.parametrize("elements", [1, 40, 1 << 19])
def test_nearest_row_is_the_brute_force_one_whatever_the_block(monkeypatch, elements):
    monkeypatch.setattr(merging, "block_elements", lambda device: elements)
    _, view = make_view(20, 2, batch=2)
    index = torch.randint(20, (2, 2, 7))
    allowed = torch.rand(2, 2, 20) < 0.5
    similarity, target = nearest_row(view.keys, index, allowed)
    for b, h, e in torch.cartesian_prod(*(torch.arange(s) for s in index.shape)).tolist():
        cosine = torch.cosine_similarity(view.keys[b, h, index[b, h, e]][None], view.keys[b, h])
        best = cosine.masked_fill(~allowed[b, h], -torch.inf)
        assert target[b, h, e] == best.argmax() and similarity[b, h, e].item() == pytest.approx(best.max().item())


def test_nearest_row_takes_the_older_of_equals_and_says_where_there_is_none():
    keys = directions(0.5, 0.5, 0.5)
    keys[..., 2, :] = keys[..., 1, :]
    index = torch.tensor([[[0]]])
    allowed = torch.tensor([[[False, True, True, False]]])
    assert nearest_row(keys, index, allowed)[1].item() == 1
    assert nearest_row(keys, index, torch.zeros_like(allowed))[0].item() == -torch.inf


def test_chosen_rows_of_other_sizes_are_carried_out():
    """Heads may lose different numbers of rows, also none, as budgets across heads will have it."""
    for name, settings in VARIANTS:
        if name == "kvmerger":
            continue
        layer, view = make_view(12, 2, batch=2)
        chosen = marked(view, 3, 5, 6)
        chosen[0, 1, 5:] = False
        chosen[1] = False
        out = carried_out(options(name, sink=2, window=3, **settings), layer, view, chosen)
        assert out.length == [9, 11, 12, 12]
