"""Budgets of heads by their scores: sums are exact, bounds hold, settings that cannot go together raise."""

import pytest
import torch
from tiny_models import HEAD_SCORES, prompt, tiny_model

import asymkv
from asymkv import CompressionConfig
from asymkv.budgets.layers import Request
from asymkv.budgets.scored import Entropy, HeadKV, Retrieval


def rows(split, table, request, layers=None, held=None):
    object.__setattr__(split, "table", torch.tensor(table, dtype=torch.double))
    held = held or [[request.longest] * len(table[0])] * len(table)
    return [list(r) for r in split.rows(request, layers or [request.rows] * len(table), held)]


def total(kept):
    return sum(map(sum, kept))


def test_headkv_gives_every_head_a_base_and_shares_the_pool():
    table = [[0.1, 0.2], [0.4, 0.3]]
    assert rows(HeadKV(), table, Request(12, 500, None, 0, 0)) == [[6, 10], [18, 14]]
    assert rows(HeadKV(), table, Request(48, 500, None, 4, 32)) == [[42, 46], [54, 50]]
    assert rows(HeadKV(beta=1), table, Request(10, 500, None, 0, 0)) == [[4, 8], [16, 12]]
    assert rows(HeadKV(), [[0.0, 0.0]], Request(12, 500, None, 0, 0)) == [[12, 12]]
    # What a head cannot fill goes to the others.
    assert rows(HeadKV(beta=1), [[0.0, 1.0]], Request(10, 12, None, 0, 0)) == [[8, 12]]


def test_entropy_gives_the_upper_half_twice_as_much():
    request = Request(30, 500, None, 4, 8)
    assert rows(Entropy(), [[0.1, 0.9, 0.2, 0.8]], request) == [[20, 40, 20, 40]]
    assert rows(Entropy(), [[0.5, 0.5]], request) == [[20, 40]]
    assert rows(Entropy(), [[1, 2, 3]], Request(40, 500, None, 4, 8)) == [[30, 30, 60]]
    assert rows(Entropy(groups=3), [[3, 2, 1]], request) == [[40, 30, 20]]
    # Layers share by themselves; the lowest head keeps its protected rows.
    assert rows(Entropy(), [[1, 2], [2, 1]], request, [45, 15]) == [[30, 60], [17, 13]]
    assert rows(Entropy(), [[1, 2]], Request(30, 34, None, 4, 8)) == [[26, 34]]


def test_retrieval_keeps_as_many_heads_whole_as_fit():
    table = [[0.1, 0.2], [0.9, 0.3]]
    # 4 * 40 rows: one head of 100, and 60 for three.
    assert rows(Retrieval(), table, Request(40, 100, None, 4, 8)) == [[20, 20], [100, 20]]
    assert rows(Retrieval(), table, Request(40, 100, None, 0, 0)) == [[20, 20], [100, 20]]
    assert rows(Retrieval(share=0.0), table, Request(40, 100, None, 4, 8)) == [[40, 40], [40, 40]]
    assert rows(Retrieval(share=0.5), table, Request(80, 100, None, 4, 8)) == [[60, 60], [100, 100]]
    assert rows(Retrieval(), table, Request(40, 30, None, 4, 8)) == [[30, 30], [30, 30]]
    # Generated tokens count: what does not fit any more loses rows.
    later = Request(40, 100, None, 4, 8, seen=200)
    assert rows(Retrieval(), table, later) == [[40, 40], [40, 40]]
    assert rows(Retrieval(), table, later, held=[[22, 22], [200, 22]]) == [[22, 22], [94, 22]]


def test_retrieval_by_a_published_rule():
    table = [[0.1, 0.2], [0.9, 0.3]]
    split = Retrieval(share=0.25, recent=10, divisor=5, extra=1)
    assert rows(split, table, Request(40, 100, None, 4, 8)) == [[25, 25], [100, 25]]
    assert rows(split, table, Request(40, 20, None, 4, 8)) == [[15, 15], [20, 15]]


def test_union_of_induction_and_echo():
    generator = torch.Generator().manual_seed(0)
    induction, echo = torch.rand(20, 10, generator=generator), torch.rand(20, 10, generator=generator)
    best = set(induction.flatten().topk(28).indices.tolist()) | set(echo.flatten().topk(2).indices.tolist())
    split = Retrieval(share=0.15, echo=True)
    order = split.combine({"induction": induction, "echo": echo})
    assert split.full_heads(order) == len(best)
    assert set(order.flatten().topk(len(best)).indices.tolist()) == best
    assert split.full_heads(split.combine({"induction": induction})) == 28


@pytest.mark.parametrize("seed", range(8))
def test_sums_are_exact_and_bounds_hold(seed):
    generator = torch.Generator().manual_seed(seed)
    layers, heads = int(torch.randint(1, 9, (), generator=generator)), int(torch.randint(1, 9, (), generator=generator))
    table = torch.rand(layers, heads, generator=generator).tolist()
    b = int(torch.randint(13, 200, (), generator=generator))
    tokens = int(torch.randint(20, 400, (), generator=generator))
    request = Request(b, tokens, None, 4, 8)
    for split in (HeadKV(), HeadKV(beta=1), HeadKV(beta=7), Entropy(), Entropy(groups=4), Retrieval()):
        kept = rows(split, table, request)
        assert total(kept) == layers * heads * min(b, tokens), split
        assert min(map(min, kept)) >= min(13, tokens) and max(map(max, kept)) <= tokens, split


@pytest.mark.parametrize(("settings", "message"), [
    ({"head_budgets": {"kind": "headkv", "beta": 0.5}}, "beta of head_budgets='headkv' must be a number >= 1"),
    ({"head_budgets": {"kind": "entropy", "groups": 1}}, "groups.*integer >= 2; found 1"),
    ({"head_budgets": {"kind": "retrieval", "share": 2}}, "share of head_budgets='retrieval'.*from 0 to 1"),
    ({"head_budgets": {"kind": "retrieval", "recent": 64}}, "needs share"),
    ({"head_budgets": {"kind": "retrieval", "share": 0.1, "divisor": 5}}, "needs recent"),
    ({"head_budgets": {"kind": "retrieval", "share": 0.1, "recent": 31}}, "recent=31 .*window_size=32"),
    ({"head_budgets": {"kind": "retrieval", "share": 0.1, "recent": 99}, "ratio": 0.5}, "ratio must be None"),
    ({"head_budgets": {"kind": "entropy"}, "budget": 55}, "entropy 36 rows; needed.*37"),
    ({"head_budgets": "headkv", "layer_budgets": "pyramid"}, "'headkv' knows.*must be 'uniform', found 'pyramid'"),
    ({"head_budgets": "entropy", "layer_budgets": "dynamic"}, "'entropy' knows.*found 'dynamic'"),
    ({"head_budgets": "headkv", "upstream_compat": True}, "must be 'uniform'"),
], ids=lambda x: str(x)[:60])  # fmt: skip
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CompressionConfig("asymkv", **settings)


def test_scores_must_be_there_and_fit():
    with pytest.raises(ValueError, match="CompressedCache.for_model"):
        HeadKV().rows(Request(40, 100, None, 4, 8), [40], [[50]])
    with pytest.raises(ValueError, match=">= 0; found -1"):
        HeadKV([[1.0, -1.0], [0.0, 0.0]]).prepare(tiny_model())


def test_replace_follows_the_methods_options():
    config = CompressionConfig("razor", head_scores=HEAD_SCORES, ratio=0.5)
    assert config.replace(retrieval_share=0.5).head_split.share == 0.5
    other = config.replace(method="uncomp", head_scores=HEAD_SCORES)
    assert other.head_budgets == {"kind": "entropy", "file": HEAD_SCORES, "groups": 2} and other.window_size == 8
    assert other.replace(method="h2o").head_budgets == "uniform" and other.replace(method="h2o").window_size == 32
    kept = CompressionConfig("razor", head_scores=HEAD_SCORES, head_budgets="uniform", sink_size=2)
    assert kept.replace(budget=64).head_budgets == "uniform" and kept.replace(budget=64).sink_size == 2


@pytest.mark.parametrize("settings", [
    {"method": "h2o", "head_budgets": {"kind": "headkv", "file": HEAD_SCORES}},
    {"method": "asymkv", "head_budgets": {"kind": "entropy", "file": HEAD_SCORES}, "layer_budgets": "pyramid"},
    {"method": "asymkv", "curvature": "loss", "head_budgets": {"kind": "headkv", "file": HEAD_SCORES}},
    {"method": "asymkv_evict", "head_budgets": {"kind": "retrieval", "file": HEAD_SCORES}},
], ids=lambda s: f"{s['method']}-{s['head_budgets']['kind']}")  # fmt: skip
def test_any_judging_method_takes_them(settings):
    """Every step of a conversation ends at exactly the budget, and each head at its own share of it."""
    model = tiny_model()
    with asymkv.replace("llama", budget=60, window_size=8, chunk_size=40, decode_interval=5, **settings):
        cache = model(prompt(200)).past_key_values
        assert sum(int(cache.num_rows(i).sum()) for i in range(2)) == 4 * 60
        held = [cache.num_rows(i)[0].tolist() for i in range(2)]
        assert len({n for layer in held for n in layer}) > 1
        for i in range(10):
            model(torch.tensor([[i + 3]]), past_key_values=cache)
        assert sum(int(cache.num_rows(i).sum()) for i in range(2)) == 4 * 60
        model(prompt(70, seed=5), past_key_values=cache)
    assert sum(int(cache.num_rows(i).sum()) for i in range(2)) == 4 * 60
    if settings["method"] == "asymkv":
        assert all(int(n.sum()) == 280 for i in range(2) for n in cache.cardinality(i)[0])


def test_scores_survive_fork_and_disk(tmp_path):
    model = tiny_model()
    settings = {"method": "headkv", "head_scores": HEAD_SCORES, "budget": 40}
    with asymkv.replace("llama", **settings):
        cache = model(prompt(100)).past_key_values
        cache.save(tmp_path)
        loaded = asymkv.CompressedCache.load(tmp_path, model)
        for each in (cache.fork(), loaded):
            model(prompt(30, seed=3), past_key_values=each)
            assert sum(int(each.num_rows(i).sum()) for i in range(2)) == 4 * 40


@pytest.mark.parametrize(("heads", "sparsity"), [(10, 0.45), (90, 0.25), (90, 0.5), (8, 0.3), (7, 0.0), (7, 1.0)])
def test_streaming_heads_are_those_below_duo_attentions_quantile(heads, sparsity):
    scores = torch.rand(heads, generator=torch.Generator().manual_seed(heads)).double()
    full = int((scores >= scores.quantile(sparsity)).sum()) if sparsity < 1 else 0
    assert Retrieval(share=1 - sparsity).full_heads(scores[:, None]) == full
