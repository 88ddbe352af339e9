"""AsymKV: what it selects, how it weighs, what it never loses."""

import pytest
import torch
from tiny_models import assert_close, prompt, tiny_model

import asymkv
from asymkv.layer import CompressedLayer
from asymkv.methods import METHODS
from asymkv.methods.asymkv import AsymKV, convex_weights
from asymkv.methods.asymkv_controls import AsymKVEvict, AsymKVSymmetric
from asymkv.observations import attention_mass, exposure, key_curvature, pair_cost, sampled
from asymkv.ops.reference import lma_attention
from asymkv.plan import contract_pairs, execute
from asymkv.rope import Rope, apply_rope
from asymkv.view import lowest

CONFIG = asymkv.CompressionConfig
CURVATURES = ["loss", "output", "cardinality"]


def make_view(rows=24, queries=9, budget=14, sink=2, window=3, dtype=torch.float64, seed=0):
    """Rows of two KV heads with cardinalities 1-5, and the queries of the newest tokens."""
    torch.manual_seed(seed)
    rope = Rope(tiny_model().model.rotary_emb)
    layer = CompressedLayer()
    k, v = torch.randn(1, 2, rows, 16, dtype=dtype), torch.randn(1, 2, rows, 16, dtype=dtype)
    layer.append(rope.rotate(k, torch.arange(rows).expand(1, 2, -1)).to(dtype), v)
    layer.storage.columns["cardinality"].random_(1, 6)
    layer.storage.columns["log_n"].copy_(layer.storage.columns["cardinality"].float().log())
    layer.storage.merged = True
    view = layer.view(rope, 0.25)
    view.queries = torch.randn(1, 4, queries, 16, dtype=dtype)
    view.query_positions = torch.arange(rows - queries, rows)[None]
    view.budget = torch.full((1, 2), budget)
    return layer, view


def method(cls=AsymKV, **options):
    name = next(name for name, registered in METHODS.items() if registered is cls)
    config = CONFIG(name, sink_size=2, window_size=3, **options)
    return config.options


def chosen_pairs(method, view):
    cost, free = method.judge(view)
    return lowest(cost, view.excess, free)


def dense_probs(view):
    """``[H, Q, T]`` probabilities by the definition, one query head at a time."""
    q, k = view.queries[0], view.keys[0].repeat_interleave(2, 0)
    logits = view.scale * q @ k.transpose(-1, -2) + view.cardinality[0].repeat_interleave(2, 0)[:, None].double().log()
    later = view.positions[0, 0][None] > view.query_positions[0][:, None]
    return torch.softmax(logits.masked_fill(later, -torch.inf), -1)


# -- observations ------------------------------------------------------------------------------------------------
def test_attention_mass_is_the_column_sum_of_probabilities():
    _, view = make_view()
    probs = dense_probs(view)
    assert_close("mass", probs.view(2, 2, 9, -1).sum((1, 2)), attention_mass(view)[0], 1e-12)
    per_head = attention_mass(view, per_query_head=True)[0].flatten(0, 1)
    assert_close("per head", probs.sum(1), per_head, 1e-12)


def test_mass_with_known_lse_equals_mass_without():
    _, view = make_view()
    plain = attention_mass(view)
    tail = view.cardinality.masked_fill(view.positions > 14, 0)  # all queries sit at one position
    view.query_positions = torch.full((1, 9), 14)
    plain = attention_mass(view)
    view.query_lse = lma_attention(view.queries, view.keys, view.values, tail, scale=view.scale)[1]
    assert_close("mass", plain, attention_mass(view), 1e-12)


def test_exposure_counts_the_queries_that_could_see_a_row():
    _, view = make_view()
    assert exposure(view)[0, 0].tolist() == [9] * 16 + [8, 7, 6, 5, 4, 3, 2, 1]


def test_absent_queries_count_for_nothing():
    _, view = make_view()
    _, other = make_view()
    other.queries = torch.cat([other.queries, torch.full_like(other.queries[:, :, :2], 1e3)], 2)
    other.query_positions = torch.cat([other.query_positions, torch.full((1, 2), -1)], 1)
    assert_close("mass", attention_mass(view), attention_mass(other), 1e-12)
    assert torch.equal(exposure(view), exposure(other))


def test_sampling_spreads_over_own_queries_only():
    _, view = make_view(queries=9)
    view.query_positions[0, 6:] = -1
    assert sampled(view, 3).query_positions.tolist() == [[15, 17, 19]]
    assert sampled(view, 9) is view and sampled(view, None) is view


def test_output_curvature_matches_autograd():
    """h_d = sum over queries and group of |d out / d k_d|^2, keys before RoPE."""
    _, view = make_view(rows=12, queries=5)
    pre = view.unrotate(view.keys).clone()
    later = view.positions[0, 0][None] > view.query_positions[0][:, None]

    def output(k):
        rotated = view.rope.rotate(k, view.rotary_positions).repeat_interleave(2, 1)
        logits = view.scale * view.queries @ rotated.transpose(-1, -2)
        logits = logits + view.cardinality.repeat_interleave(2, 1)[:, :, None].double().log()
        return torch.softmax(logits.masked_fill(later, -torch.inf), -1) @ view.values.repeat_interleave(2, 1)

    jacobian = torch.autograd.functional.jacobian(output, pre)  # [1, H, Q, D, 1, H_kv, T, D]
    assert_close("h", jacobian.square().sum((0, 1, 2, 3)), key_curvature(view), 1e-6)


def test_pair_cost_predicts_the_change_of_the_output():
    """Second order in the distance of the keys: a tenth of it gives a hundredth of the error, as predicted."""
    _, view = make_view(rows=16, queries=6, dtype=torch.float64)
    view.query_positions = torch.full((1, 6), 15)
    direction = torch.randn(1, 2, 16, dtype=torch.float64)
    view.keys[:, :, 5] = view.keys[:, :, 4] + 0.01 * direction
    for w in (0.0, 0.3, 1.0):
        predicted = pair_cost(view).error(torch.tensor(w))[0, :, 4]
        k, v, n = view.keys.clone(), view.values.clone(), view.cardinality.clone()
        before, _ = lma_attention(view.queries, k, v, n, scale=view.scale)
        total = n[:, :, 4:6].double()
        v[:, :, 4] = (total[..., None] * v[:, :, 4:6]).sum(2) / total.sum(2)[..., None]
        k[:, :, 4] = w * k[:, :, 4] + (1 - w) * k[:, :, 5]
        n[:, :, 4] += n[:, :, 5]
        n[:, :, 5] = 0
        after, _ = lma_attention(view.queries, k, v, n, scale=view.scale)
        change = (after - before).square().sum((0, 2, 3)).view(2, 2).sum(1)
        assert torch.allclose(predicted, change, rtol=0.05), (w, predicted / change)


def test_pair_weight_minimises_its_quadratic():
    _, view = make_view()
    cost = pair_cost(view)
    best = cost.error(cost.weight)
    for w in torch.linspace(0, 1, 21):
        assert (best <= cost.error(w) + 1e-12).all()
    assert ((cost.weight >= 0) & (cost.weight <= 1)).all()


# -- weights -----------------------------------------------------------------------------------------------------
def groups(pairs):
    return contract_pairs(torch.tensor([[pairs]]).bool())


def merge(weight, keys, destination):
    weight = weight / torch.zeros_like(weight).index_add_(2, destination[0, 0], weight)[:, :, destination[0, 0]]
    return torch.zeros_like(keys).index_add_(2, destination[0, 0], weight * keys)


def test_newton_merge_minimises_the_quadratic():
    """sum_j (k - k_j)' diag(h_j) (k - k_j), solved by torch.linalg."""
    torch.manual_seed(0)
    h, k = torch.rand(1, 1, 4, 6, dtype=torch.float64) * 1e-12, torch.randn(1, 1, 4, 6, dtype=torch.float64)
    destination = groups([1, 1, 0])
    got = merge(convex_weights(h, torch.ones(1, 1, 4), destination), k, destination)[0, 0, 2]
    diagonal = [torch.diag(x) for x in h[0, 0, :3]]
    right = sum(d @ x for d, x in zip(diagonal, k[0, 0, :3], strict=True))
    assert_close("k*", torch.linalg.solve(sum(diagonal), right), got, 1e-4)


def test_uniform_curvature_gives_the_mean():
    k, destination = torch.randn(1, 1, 3, 4), groups([1, 0])
    got = merge(convex_weights(torch.full((1, 1, 3, 4), 3e-20), torch.ones(1, 1, 3), destination), k, destination)
    assert_close("mean", k[0, 0, :2].mean(0), got[0, 0, 1], 1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-36])
def test_vanishing_curvature_falls_back_to_cardinality(scale):
    k, n, destination = torch.randn(1, 1, 3, 4), torch.tensor([[[1, 3, 1]]]), groups([1, 0])
    h = scale * torch.rand(1, 1, 3, 4)
    got = merge(convex_weights(h, n, destination), k, destination)
    assert_close("mean", (k[0, 0, 0] + 3 * k[0, 0, 1]) / 4, got[0, 0, 1], 1e-4)


def test_a_row_without_curvature_counts_like_its_groups_average():
    h = torch.tensor([4.0, 0.0, 2.0])[None, None, :, None].expand(1, 1, 3, 2)
    w = convex_weights(h, torch.tensor([[[2, 3, 1]]]), groups([1, 1]))
    assert_close("weights", torch.tensor([4.0, 6.0, 2.0]), w[0, 0, :, 0], 1e-4)


def share_of(view, pairs, weights):
    """Normalised weights ``[T]`` of the runs of head 0, one run at a time."""
    weights = weights.clone()
    destination = contract_pairs(pairs)[0, 0]
    for group in destination.unique():
        weights[destination == group] /= weights[destination == group].sum()
    return weights, destination


@pytest.mark.parametrize("name", ["mean", "attention"])
def test_key_weights_that_need_no_curvature(name):
    layer, view = make_view()
    options = method(key_weights=name)
    pairs = chosen_pairs(options, view)
    mass = (attention_mass(view) / exposure(view))[0, 0]
    share, destination = share_of(view, pairs, torch.ones(24).double() if name == "mean" else mass)
    before = view.unrotate(view.keys)[0, 0]
    storage = execute(options.carry_out(view, pairs), view, layer.storage, "original")
    merged = torch.zeros(24, 16).double().index_add_(0, destination, share[:, None] * before)[destination.unique()]
    kept = storage.rows("position", 0)[None].long()
    assert_close("keys", merged, view.rope.rotate(storage.rows("keys", 0)[None], -kept)[0], 1e-9)
    assert int(storage.rows("cardinality", 0).sum()) == int(view.cardinality[0, 0].sum())


@pytest.mark.parametrize("options", [{"key_weights": "attention"}, {"key_weights": "mean"}, {},
                                     {"curvature": "output"}], ids=str)  # fmt: skip
def test_symmetric_values_take_the_keys_weights_and_count_once(options):
    _, view = make_view()
    layer, view.cardinality = CompressedLayer(), torch.ones_like(view.cardinality)
    layer.append(view.keys, view.values)
    options = method(AsymKVSymmetric, **options)
    pairs = chosen_pairs(options, view)
    weight = options.key_weight(view, pairs, contract_pairs(pairs))
    weight = torch.ones(1, 2, 24).double() if weight is None else weight.double()
    if weight.dim() == 4:
        weight = torch.stack([share_of(view, pairs, weight[0, 0, :, d])[0] for d in range(16)]).mean(0)[None, None]
    share, destination = share_of(view, pairs, weight[0, 0])
    values = view.values[0, 0].clone()
    storage = execute(options.carry_out(view, pairs), view, layer.storage, "original")
    merged = torch.zeros(24, 16).double().index_add_(0, destination, share[:, None] * values)[destination.unique()]
    assert_close("values", merged, storage.rows("values", 0), 1e-6)
    assert storage.rows("cardinality", 0).unique().tolist() == [1] and not storage.merged


def test_symmetric_rows_remember_their_tokens_by_their_positions():
    """Merged twice by cardinality, a row's key is still the mean of its tokens' keys, the attention's count aside."""
    layer, view = make_view()
    view.cardinality = torch.ones_like(view.cardinality)
    before = view.unrotate(view.keys)[0, 0]
    layer = CompressedLayer()
    layer.append(view.keys, view.values)
    for budget in (17, 10):
        again = layer.view(view.rope, 0.25)
        again.queries, again.query_positions = view.queries, view.query_positions
        again.budget = torch.full_like(view.budget, budget)
        layer.storage = execute(method(AsymKVSymmetric).plan(again), again, layer.storage, "original")
    ends = layer.storage.rows("position", 0).long() + 1
    starts = torch.nn.functional.pad(ends[:-1], (1, 0))
    means = torch.stack([before[a:b].mean(0) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)])
    assert len(ends) == 10 and (ends - starts).max() > 2
    kept = layer.storage.rows("keys", 0)[None]
    assert_close("keys", means, view.rope.rotate(kept, -(ends - 1)[None])[0], 1e-6)


# -- selection ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"pair_rule": "output_error"}, {"mean_attention": False},
                                     {"key_weights": "output_error", "pair_rule": "output_error"},
                                     {"position_factor": True, "cardinality_factor": True}], ids=str)  # fmt: skip
def test_plan_reaches_the_budget_without_losing_a_token(options):
    layer, view = make_view()
    tokens = view.cardinality.sum(-1)
    storage = execute(method(**options).plan(view), view, layer.storage, "original")
    assert storage.length == [14, 14]
    assert [int(storage.rows("cardinality", h).sum()) for h in range(2)] == tokens[0].tolist()
    for head in range(2):  # sinks and the window are untouched
        assert torch.equal(storage.rows("keys", head)[:2], view.keys[0, head, :2])
        assert torch.equal(storage.rows("values", head)[-3:], view.values[0, head, -3:])


def test_attention_rule_takes_the_lowest_pairs():
    _, view = make_view(budget=20)
    mass = (attention_mass(view) / exposure(view))[0, 0]
    pairs = chosen_pairs(method(), view)[0, 0]
    score = mass[1:] + mass[:-1]
    free = torch.arange(2, 20)  # behind the sinks; both members before the window
    assert set(pairs.nonzero().flatten().tolist()) == set(free[score[free].argsort()[:4]].tolist())


def test_heads_choose_differently():
    _, view = make_view()
    pairs = chosen_pairs(method(), view)[0]
    assert pairs[0].sum() == pairs[1].sum() == 10 and not torch.equal(pairs[0], pairs[1])


def test_position_and_cardinality_factor_are_upstreams():
    _, view = make_view()
    plain = method().pair_score(view, None)
    n = view.cardinality.double()
    both = method(position_factor=True, cardinality_factor=True).pair_score(view, None)
    i = torch.arange(23).sub(2).clamp(min=0) + 1
    gamma = 4096 / torch.log(torch.tensor(512.0, dtype=torch.float64))
    assert_close("score", plain * torch.exp(-i / gamma) * (n[..., 1:] + n[..., :-1]), both, 1e-12)


def test_eviction_control_keeps_the_most_attended_row_of_each_run():
    layer, view = make_view()
    destination = contract_pairs(chosen_pairs(method(), view))[0, 0]
    mass = (attention_mass(view) / exposure(view))[0, 0]
    expected = [max((destination == d).nonzero().flatten().tolist(), key=lambda j: mass[j]) for d in
                destination.unique()]  # fmt: skip
    storage = execute(method(AsymKVEvict).plan(view), view, layer.storage, "original")
    assert storage.rows("position", 0).tolist() == sorted(expected)


# -- whole runs --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("pair_rule", ["attention", "output_error"])
def test_budgets_cardinalities_and_peaks_over_prefill_decode_and_a_second_turn(curvature, pair_rule):
    model = tiny_model()
    settings = {"curvature": curvature, "pair_rule": pair_rule, "budget": 60, "chunk_size": 40, "decode_interval": 16}
    with asymkv.replace("llama", **settings):
        first = model.generate(prompt(300), max_new_tokens=50, do_sample=False, return_dict_in_generate=True)
        cache, seen = first.past_key_values, 349
        for turn in range(2):
            rows = [cache.num_rows(layer) for layer in range(2)]
            assert all((r <= 60 + 16).all() and (r >= 60).all() for r in rows)
            for layer in range(2):
                assert [int(n.sum()) for n in cache.cardinality(layer)[0]] == [seen, seen]
                assert all((p.diff() > 0).all() and p[-1] == seen - 1 for p in cache.positions(layer)[0])
            assert cache.peak_rows <= 60 + 40 and cache.tokens_seen.tolist() == [seen]
            if turn == 0:
                follow = model(prompt(90, seed=5), past_key_values=cache)
                assert follow.logits.shape[1] == 90
                seen += 90
                assert all((cache.num_rows(layer) == 60).all() for layer in range(2))


@pytest.mark.parametrize("curvature", CURVATURES)
def test_merged_keys_lie_between_their_members(curvature):
    """Coordinatewise, in pre-RoPE coordinates, in every real compaction of a run."""
    model = tiny_model()
    with asymkv.replace("llama", method="full"):
        full = model(prompt(100)).past_key_values
    with asymkv.replace("llama", budget=50, chunk_size=100, curvature=curvature):
        cache = model(prompt(100)).past_key_values
    rope = cache.rope
    for head in range(2):
        pre = rope.rotate(full.keys(0)[0][head], -torch.arange(100))
        got = rope.rotate(cache.keys(0)[0][head], -cache.positions(0)[0][head])
        start = 0
        for n, key in zip(cache.cardinality(0)[0][head].tolist(), got, strict=True):
            members = pre[start : start + n]
            assert (key >= members.amin(0) - 1e-5).all() and (key <= members.amax(0) + 1e-5).all()
            start += n
        assert start == 100


def test_statistics_of_the_loss_ride_along_only_where_decode_may_use_them():
    model = tiny_model()
    for interval, present in ((16, True), (0, False)):
        with asymkv.replace("llama", budget=50, chunk_size=40, curvature="loss", decode_interval=interval):
            cache = model(prompt(120)).past_key_values
        assert ("fisher" in cache.layers[0].storage.columns) == present


def test_rotation_helper_agrees_with_the_models_tables():
    rope = Rope(tiny_model().model.rotary_emb)
    x = torch.randn(1, 7, 16)
    cos, sin = rope.tables(torch.arange(7)[None], torch.float32)
    assert_close("rotation", apply_rope(x, cos, sin), rope.rotate(x, torch.arange(7)[None]), 1e-6)
