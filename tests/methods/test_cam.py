"""CaM: values go to the rows that follow, by chance or by expectation; keys never change."""

import pytest
import torch
from merging_views import carried_out, make_view, marked, options, planned, scalars
from tiny_models import assert_close

from asymkv.methods.cam import uniform

ALL = {"sink": 2, "window": 3}


# -- the published form ------------------------------------------------------------------------------------------
def test_probability_is_attention_over_the_mean_of_the_targets():
    """0.2 against a mean of 0.4: p = 0.5, and each of the two targets gets p v / 2."""
    layer, view = make_view(5, 1, values=scalars(1, 8, 2, 3, 4), mass=[1, 0.2, 0.3, 0.5, 0.9])
    method = options("cam", merge_budget=2, deterministic=True)
    out = carried_out(method, layer, view, marked(view, 1))
    assert_close("values", torch.tensor([1.0, 4, 5, 4]), out.rows("values", 0)[:, 0], 1e-7)


@pytest.mark.parametrize("select", ["attention", "streaming"])
def test_sum_of_values_is_conserved_where_everything_merges(select):
    """Equal attention: p = 1, so that b = 1 too. Rows near the end divide by the targets that there are."""
    layer, view = make_view(mass=torch.ones(24))
    before = view.values.sum(2)[0]
    out = planned(options("cam", select=select, merge_budget=6, **ALL), layer, view)
    after = torch.stack([out.rows("values", h).sum(0) for h in range(2)])
    assert out.length == [14, 14]
    assert_close("sum", before, after, 1e-12)


@pytest.mark.parametrize("rest", [0.0, 1.0])
def test_no_attention_is_plain_eviction(rest):
    """Leaving rows with p = 0, and the 0 / 0 of heads where nothing has attention."""
    column = torch.full((24,), rest)
    column[2:12] = 0
    layer, view = make_view(mass=column)
    source = view.values.clone()
    out = planned(options("cam", merge_budget=4, deterministic=True, **ALL), layer, view)
    for head in range(2):
        assert torch.equal(out.rows("values", head), source[0, head, out.rows("position", head).long()])


def test_a_row_with_attention_always_joins_targets_without():
    """0.5 / 0 is infinite, and clips to p = 1."""
    layer, view = make_view(4, 1, values=scalars(1, 8, 2, 3), mass=[1, 0.5, 0, 0])
    out = carried_out(options("cam", merge_budget=2, deterministic=True), layer, view, marked(view, 1))
    assert_close("values", torch.tensor([1.0, 6, 7]), out.rows("values", 0)[:, 0], 1e-12)


@pytest.mark.parametrize("settings", [{}, {"deterministic": True}, {"count_bias": True}, {"select": "streaming"}],
                         ids=str)  # fmt: skip
def test_keys_are_bitwise_the_sources(settings):
    layer, view = make_view(dtype=torch.float32)
    source = view.keys.clone()
    out = planned(options("cam", **settings, **ALL), layer, view)
    for head in range(2):
        assert torch.equal(out.rows("keys", head), source[0, head, out.rows("position", head).long()])


def test_fewer_targets_at_the_end_divide_by_their_number():
    layer, view = make_view(6, 1, values=scalars(1, 1, 1, 6, 1, 1), mass=torch.ones(6))
    out = carried_out(options("cam", merge_budget=32), layer, view, marked(view, 3))
    assert_close("values", torch.tensor([1.0, 1, 1, 4, 4]), out.rows("values", 0)[:, 0], 1e-12)


def test_targets_are_kept_rows_only():
    """Rows 1 to 3 leave: all of them are spread over rows 4 and 5, none over one another."""
    layer, view = make_view(7, 1, values=scalars(0, 2, 4, 6, 0, 0, 0), mass=torch.ones(7))
    out = carried_out(options("cam", merge_budget=2), layer, view, marked(view, 1, 2, 3))
    assert_close("values", torch.tensor([0.0, 6, 6, 0]), out.rows("values", 0)[:, 0], 1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_the_oldest_leave_one_behind_the_other(bias):
    """Rows 1 to 4 leave at once as they would in four compactions, each spread over the two rows behind it."""
    method = options("cam", merge_budget=2, select="streaming", deterministic=True, count_bias=bias)
    # Where tokens are counted, p of 1: a fraction of a token weighs less than a whole one until the rows are stored.
    mass = torch.linspace(8, 1, 8) if bias else torch.tensor([1, 0.4, 0.5, 2.0, 1, 0.3, 3, 2])
    source = scalars(9, 1, 2, 4, 8, 16, 32, 64)
    made = {"values": source, "mass": mass, "n": [1, 2, 3, 1, 1, 4, 1, 1]}
    layer, view = make_view(8, 1, **made)
    once = carried_out(method, layer, view, marked(view, 1, 2, 3, 4))
    _, view = make_view(8, 1, **made)
    values = view.values[0, 0, :, 0].clone()
    for i in (1, 2, 3, 4):
        method.carry_out(view, marked(view, i))
        values[i + 1 : i + 3] += min(1.0, float(mass[i] / mass[i + 1 : i + 3].mean())) * values[i] / 2
    rest = [0, 5, 6, 7]
    assert_close("values", view.values[0, 0, rest], once.rows("values", 0), 1e-12)
    assert torch.equal(view.cardinality[0, 0, rest], once.rows("cardinality", 0))
    if bias:
        assert int(once.rows("cardinality", 0).sum()) == 14, "all tokens are still there"
    else:
        assert_close("published", values[rest], once.rows("values", 0)[:, 0], 1e-12)


@pytest.mark.parametrize("settings", [{}, {"count_bias": True}], ids=str)
def test_values_stay_of_their_size_where_a_chunk_of_the_oldest_leaves(settings):
    """Hundreds of rows at once do not all land on the first that stay."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 1, 600, 16, generator=generator, dtype=torch.float64)
    layer, view = make_view(600, 1, values=values, mass=torch.linspace(2, 1, 600))
    chosen = marked(view, *range(4, 500))
    out = carried_out(options("cam", select="streaming", merge_budget=16, **settings), layer, view, chosen)
    sizes = out.rows("values", 0).norm(dim=-1)[4:]
    assert sizes.max() < 4 * values.norm(dim=-1).max() and sizes[:16].mean() < 4 * sizes[16:].mean()


def test_a_row_merges_as_a_whole_or_not_at_all():
    """One draw per row and KV head: what is added is b v / m with b of 0 or 1, and both happen."""
    mass = torch.ones(40)
    mass[2:38:3] = 0.5  # p = 0.5 of each against two targets of 1
    layer, view = make_view(40, 2, values=torch.eye(40)[None, None, :, :16].expand(1, 2, -1, -1), mass=mass)
    view.values = torch.eye(40, dtype=torch.float64).expand(1, 2, -1, -1).clone()  # a row's own axis tells who came
    chosen = torch.zeros_like(view.valid)
    chosen[..., 2:38:3] = True
    options("cam", merge_budget=2).carry_out(view, chosen)
    came = view.values[0].transpose(1, 2)[:, 2:38:3]  # [H, leaving, T]
    first, second = (came.gather(2, torch.arange(2 + s, 38 + s, 3).expand(2, -1)[..., None])[..., 0] for s in (1, 2))
    assert torch.equal(first, second) and set(first.flatten().tolist()) == {0.0, 0.5}
    assert not torch.equal(first[0], first[1])  # heads draw for themselves


# -- draws -------------------------------------------------------------------------------------------------------
def test_draws_are_uniform_and_hang_on_seed_layer_head_and_position():
    position = torch.arange(20_000)
    head = torch.zeros(1, dtype=torch.long)
    base = uniform(0, 0, head, position)
    assert base.min() >= 0 and base.max() < 1
    counts = torch.histc(base, bins=20, min=0, max=1)
    assert ((counts - 1000).square() / 1000).sum() < 50  # chi-squared, 19 degrees of freedom: 1 in 10,000
    assert torch.equal(base[777:800], uniform(0, 0, head, position[777:800]))
    others = [uniform(1, 0, head, position), uniform(2**32, 0, head, position), uniform(0, 1, head, position),
              uniform(0, 0, head + 1, position), uniform(0, 0, head, position + 1)]  # fmt: skip
    for other in others:
        assert torch.corrcoef(torch.stack([base, other]))[0, 1].abs() < 0.03


def test_draws_come_out_as_often_as_p_says():
    p = torch.full((1, 1, 20_000), 0.3)
    _, view = make_view(4, 1)
    view.positions = torch.arange(20_000)[None, None]
    drawn = options("cam", seed=3).draw(view, torch.arange(20_000)[None, None], p)
    assert set(drawn.unique().tolist()) == {0.0, 1.0} and abs(drawn.mean() - 0.3) < 0.015


# -- counts ------------------------------------------------------------------------------------------------------
def test_with_counts_every_token_that_merges_is_counted_and_values_stay_means():
    layer, view = make_view(mass=torch.ones(24), n=[1, 2, 3] * 8)
    n, v = view.cardinality.double()[0], view.values.clone()[0]
    out = planned(options("cam", merge_budget=4, count_bias=True, **ALL), layer, view)
    for head in range(2):
        count, value = out.rows("cardinality", head), out.rows("values", head)
        assert int(count.sum()) == 48
        assert_close("sum", (n[head, :, None] * v[head]).sum(0), (count[:, None] * value).sum(0), 1e-12)
        assert (value >= v[head].amin(0) - 1e-12).all() and (value <= v[head].amax(0) + 1e-12).all()


def test_with_counts_tokens_are_dealt_to_the_targets_in_turn():
    """Seven tokens to three rows: two each, and one more to the row that the position (1 mod 3) picks."""
    layer, view = make_view(5, 1, n=[1, 7, 1, 1, 1], mass=torch.ones(5))
    out = carried_out(options("cam", merge_budget=3, count_bias=True), layer, view, marked(view, 1))
    assert out.rows("cardinality", 0).tolist() == [1, 3, 4, 3]


def test_with_counts_rows_that_do_not_merge_are_dropped_with_their_tokens():
    mass = torch.ones(24)
    mass[2:12] = 0
    layer, view = make_view(mass=mass)
    out = planned(options("cam", count_bias=True, **ALL), layer, view)
    assert [int(out.rows("cardinality", h).sum()) for h in range(2)] == [14, 14]


# -- options -----------------------------------------------------------------------------------------------------
def test_selection():
    layer, view = make_view()
    oldest = planned(options("cam", select="streaming", **ALL), layer, view)
    assert oldest.rows("position", 0).tolist() == [0, 1, *range(12, 24)]
    layer, view = make_view()
    mass = view.statistics["mass"][0, 0, 2:21]
    heavy = planned(options("cam", **ALL), layer, view).rows("position", 0).tolist()
    assert heavy == [0, 1, *sorted((mass.argsort(descending=True)[:9] + 2).tolist()), 21, 22, 23]


@pytest.mark.parametrize(("settings", "message"), [
    ({"select": "knorm"}, "select='knorm'; allowed:.*streaming"),
    ({"merge_budget": 0}, "merge_budget must be an integer >= 1; found 0"),
    ({"seed": -1}, "seed must be an integer >= 0; found -1"),
    ({"deterministic": 1}, "deterministic must be True or False; found 1"),
    ({"count_bias": "yes"}, "count_bias must be True or False; found 'yes'"),
], ids=str)  # fmt: skip
def test_bad_options_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        options("cam", **settings)
