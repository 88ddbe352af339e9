"""D2O: weights of both modes, the moving threshold, the gate over heads."""

import math

import pytest
import torch
from merging_views import carried_out, directions, make_view, marked, options, planned, scalars
from tiny_models import assert_close

ALL = {"sink": 2, "window": 3}


def folded(mode, kept, leaving, similarity, **settings):
    """The kept row's value after the leaving ones joined it."""
    layer, view = make_view(1 + len(leaving), 1, values=scalars(kept, *leaving), n=settings.pop("n", None))
    index = torch.arange(1, 1 + len(leaving))[None, None]
    u = torch.tensor(similarity, dtype=torch.float64)[None, None]
    fold = options("d2o", mode=mode, **settings).fold(view, index, torch.zeros_like(index), u, u > -1)
    return fold.apply(view.values)[0, 0, 0, 0].item()


# -- weights -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("mode", "leaving", "similarity", "expected"), [
    ("code", [1], [0.9], 2.45), ("paper", [1], [0.9], 2.5749),
    ("code", [1, 2], [0.9, 0.5], 1.9667), ("paper", [1, 2], [0.9, 0.5], 2.4361),
], ids=str)  # fmt: skip
def test_worked_examples_of_the_weights(mode, leaving, similarity, expected):
    assert folded(mode, 4, leaving, similarity) == pytest.approx(expected, abs=5e-5)


def test_with_counts_rows_weigh_by_their_tokens():
    e, u = math.e, math.exp(0.9)
    paper = folded("paper", 4, [1], [0.9], n=[3, 2], count_bias=True)
    assert paper == pytest.approx((3 * e * 4 + 2 * u) / (3 * e + 2 * u))
    assert folded("code", 4, [1], [0.9], n=[3, 2], count_bias=True) == pytest.approx((3 * 4 + 2 * 0.9) / 5)


@pytest.mark.parametrize(("mode", "expected"), [("code", 2.45), ("paper", 2.5749)])
def test_a_row_joins_the_most_similar_kept_row(mode, expected):
    """Keys 0 (kept), 1 (leaves, cosine 0.9 to it), 2 and 3 (kept, further): values 4 and 1 merge, the rest stays."""
    keys = directions(0.9, 0.3, -0.2)
    layer, view = make_view(4, 1, keys=keys, values=scalars(4, 1, 7, 9))
    out = carried_out(options("d2o", mode=mode), layer, view, marked(view, 1))
    assert out.rows("values", 0)[:, 0].tolist() == pytest.approx([expected, 7, 9], abs=5e-5)
    weight = {"paper": (math.e, math.exp(0.9)), "code": (1, 0.9)}[mode]
    merged = (weight[0] * keys[0, 0, 0] + weight[1] * keys[0, 0, 1]) / (2 if mode == "code" else sum(weight))
    assert_close("key", merged, out.rows("keys", 0)[0], 1e-12)
    assert torch.equal(out.rows("keys", 0)[1:], keys[0, 0, 2:])


@pytest.mark.parametrize("mode", ["code", "paper"])
def test_equal_keys_stay_as_they_are(mode):
    layer, view = make_view(5, 1, keys=directions(1, 0.1, 0.2, 0.3), values=scalars(4, 1, 7, 9, 2))
    out = carried_out(options("d2o", mode=mode), layer, view, marked(view, 1))
    assert_close("key", view.keys[0, 0, 0], out.rows("keys", 0)[0], 1e-12)
    assert out.rows("values", 0)[0, 0] == 2.5  # the mean, in both


def test_paper_mode_stays_in_the_hull_and_code_mode_shrinks():
    for mode, inside in (("paper", True), ("code", False)):
        layer, view = make_view(keys=torch.rand(1, 2, 24, 16) + 1, values=5 + 0.01 * torch.rand(1, 2, 24, 16))
        low, high = view.values.amin(2), view.values.amax(2)
        out = planned(options("d2o", mode=mode, **ALL), layer, view)
        values = out.dense("values")
        assert bool(((values >= low[0, :, None]) & (values <= high[0, :, None])).all()) == inside
        assert (values < high[0, :, None] + 1e-12).all()


# -- threshold ---------------------------------------------------------------------------------------------------
def leave(view, cosine):
    """Gives up row 1, whose key has this cosine to row 0's; returns the threshold and whether it merged."""
    _, fresh = make_view(3, 1, keys=directions(cosine, -0.5), values=scalars(4, 1, 7))
    fresh.memory = view.memory
    options("d2o").carry_out(fresh, marked(fresh, 1))
    return fresh.memory["threshold"].item(), fresh.values[0, 0, 0, 0].item() != 4


def test_threshold_starts_at_the_mean_and_follows_by_an_average():
    """0.9; then (0.9 + 0.5) / 2 = 0.7 turns 0.5 away; then (0.7 + 0.8) / 2 = 0.75 lets 0.8 in."""
    _, view = make_view(3, 1)
    for cosine, threshold, merges in [(0.9, 0.9, True), (0.5, 0.7, False), (0.8, 0.75, True)]:
        found, merged = leave(view, cosine)
        assert found == pytest.approx(threshold) and merged == merges


def test_threshold_has_the_closed_form_of_the_average():
    alpha, beta, means = 0.7, 0.3, [0.9, 0.2, 0.6, 0.4]
    memory = {}
    for cosine in means:
        _, view = make_view(3, 1, keys=directions(cosine, -0.9))
        view.memory = memory
        options("d2o", alpha=alpha, beta=beta).carry_out(view, marked(view, 1))
    closed = alpha**3 * means[0] + sum(beta * alpha ** (3 - i) * means[i] for i in (1, 2, 3))
    assert memory["threshold"].item() == pytest.approx(closed)


def test_first_threshold_is_the_mean_over_all_rows_and_heads():
    """Similarities 0.9 and 0.1: the mean of 0.5 lets the first in and drops the second."""
    keys = directions(0.9, 0.1, -0.5)
    layer, view = make_view(4, 1, keys=keys, values=scalars(4, 1, 100, 7))
    out = carried_out(options("d2o", mode="code"), layer, view, marked(view, 1, 2))
    assert view.memory["threshold"].tolist() == pytest.approx([0.5])
    assert out.rows("values", 0)[:, 0].tolist() == pytest.approx([2.45, 7])


def test_the_gate_asks_the_mean_over_heads():
    """Heads with similarities (0.9, 0.2) and (0.1, 0.0): the first rows' mean of 0.5 passes 0.3 in both heads."""
    keys = torch.cat([directions(0.9, 0.2, -0.5), directions(0.1, 0.0, -0.5)], dim=1)
    values = scalars(4, 1, 100, 7).expand(1, 2, -1, -1)
    layer, view = make_view(4, 2, keys=keys, values=values)
    out = carried_out(options("d2o", mode="code"), layer, view, marked(view, 1, 2))
    assert out.rows("values", 0)[0, 0].item() == pytest.approx(2.45)
    assert out.rows("values", 1)[0, 0].item() == pytest.approx((4 + 0.1) / 2)


def test_one_similar_head_does_not_open_the_gate_for_the_others():
    """Heads with similarities (0.9, 0.8) and (0.9, 0): threshold 0.65; the second rows' mean of 0.4 fails in both."""
    keys = torch.cat([directions(0.9, 0.8, -0.5), directions(0.9, 0.0, -0.5)], dim=1)
    layer, view = make_view(4, 2, keys=keys, values=scalars(4, 1, 100, 7).expand(1, 2, -1, -1))
    out = carried_out(options("d2o", mode="code"), layer, view, marked(view, 1, 2))
    assert view.memory["threshold"].tolist() == pytest.approx([0.65])
    assert [out.rows("values", h)[0, 0].item() for h in range(2)] == pytest.approx([2.45, 2.45])


def test_rows_of_the_batch_that_lose_nothing_keep_their_threshold():
    _, view = make_view(6, 1, batch=3)
    view.memory["threshold"] = torch.tensor([0.25, 0.25, torch.nan], dtype=torch.float64)
    chosen = marked(view, 2)
    chosen[1:] = False
    options("d2o").carry_out(view, chosen)
    after = view.memory["threshold"]
    assert after[0] != 0.25 and after[1] == 0.25 and after[2].isnan()


# -- partners ----------------------------------------------------------------------------------------------------
def test_sinks_are_never_merged_into():
    layer, view = make_view(5, 1, keys=directions(0.0, 1.0, 0.5, 0.4), values=scalars(1, 2, 3, 4, 5))
    out = carried_out(options("d2o", sink=2), layer, view, marked(view, 2))  # row 2 equals the sink 0
    assert out.rows("values", 0)[:2, 0].tolist() == [1, 2] and out.rows("values", 0)[2, 0] < 4


def test_without_a_row_to_merge_into_the_row_is_dropped():
    layer, view = make_view(3, 1, values=scalars(1, 2, 3))
    out = carried_out(options("d2o", sink=2, window=0), layer, view, marked(view, 2))
    assert out.rows("values", 0)[:, 0].tolist() == [1, 2]
    assert view.memory["threshold"].isnan().all()  # nothing was ever similar: the next one sets it


def test_counts_are_of_what_merged():
    """Rows that passed bring their tokens; those that did not take them along."""
    layer, view = make_view(4, 1, keys=directions(0.9, 0.1, -0.5), n=[2, 3, 4, 1])
    out = carried_out(options("d2o", count_bias=True), layer, view, marked(view, 1, 2))
    assert out.rows("cardinality", 0).tolist() == [5, 1]


@pytest.mark.parametrize(("settings", "message"), [
    ({"mode": "mean"}, "mode='mean'; allowed:.*paper.*code"),
    ({"alpha": 1.5}, "alpha must be a number from 0 to 1; found 1.5"),
    ({"beta": "x"}, "beta must be a number from 0 to 1; found 'x'"),
    ({"count_bias": 1}, "count_bias must be True or False; found 1"),
], ids=str)  # fmt: skip
def test_bad_options_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        options("d2o", **settings)
