"""Value merging and LOOK-M's merges: formulas, partners, what is dropped."""

import pytest
import torch
from merging_views import carried_out, directions, make_view, marked, options, planned, scalars
from tiny_models import assert_close

ALL = {"sink": 2, "window": 3}


def merged(cosine, values=(3, 1, 7), n=None, **settings):
    """Rows 0 (kept), 1 (leaves, with this cosine to row 0), 2 (kept, far): storage afterwards, and the view."""
    layer, view = make_view(3, 1, keys=directions(cosine, -0.9), values=scalars(*values), n=n)
    return carried_out(options("value_merge", **settings), layer, view, marked(view, 1)), view


# -- formulas ----------------------------------------------------------------------------------------------------
def test_value_mode_by_hand():
    """Lengths 4 * 3 and 4 * 1, cosine 0.6: w = 0.6 / 4 = 0.15, v = (3 + 0.15) / 1.15."""
    out, view = merged(0.6)
    assert out.rows("values", 0)[:, 0].tolist() == pytest.approx([3.15 / 1.15, 7], abs=1e-6)
    assert torch.equal(out.rows("keys", 0), view.keys[0, 0, [0, 2]])


@pytest.mark.parametrize(("mode", "expected"), [("pivot", 3.25), ("weighted", 4.9 / 1.9)])
def test_look_m_modes_by_hand(mode, expected):
    """x_c = 4, x_e = 1: the mean of 4 and 2.5; and weight (0.8 + 1) / 2 = 0.9."""
    out, view = merged(0.8, values=(4, 1, 7), mode=mode)
    assert out.rows("values", 0)[:, 0].tolist() == pytest.approx([expected, 7])
    share = (4 - expected) / 3  # of the leaving row, in keys as in values
    key = (1 - share) * directions(0.8)[0, 0, 0] + share * directions(0.8)[0, 0, 1]
    assert_close("key", key, out.rows("keys", 0)[0], 1e-12)


def test_several_rows_join_one():
    """Pivot: the mean of 4, (1 + 4) / 2 and (2 + 4) / 2."""
    layer, view = make_view(4, 1, keys=directions(0.9, 0.8, -0.9), values=scalars(4, 1, 2, 7))
    out = carried_out(options("value_merge", mode="pivot"), layer, view, marked(view, 1, 2))
    assert out.rows("values", 0)[:, 0].tolist() == pytest.approx([9.5 / 3, 7])


@pytest.mark.parametrize(("mode", "expected"), [
    ("value", (2 * 3 + 5 * 0.15) / (2 + 5 * 0.15)), ("pivot", (2 * 3 + 5 * 2) / 7), ("weighted", (6 + 4) / (2 + 4)),
])  # fmt: skip
def test_with_counts_rows_weigh_by_their_tokens(mode, expected):
    out, _ = merged(0.6, mode=mode, n=[2, 5, 1], count_bias=True)
    assert out.rows("values", 0)[0, 0].item() == pytest.approx(expected, abs=1e-6)
    assert out.rows("cardinality", 0).tolist() == [7, 1]


# -- who merges --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("mode", "merges"), [("value", False), ("pivot", True), ("weighted", True)])
def test_opposed_keys_merge_only_in_look_m(mode, merges):
    layer, view = make_view(2, 1, keys=directions(-0.5), values=scalars(3, 1))
    out = carried_out(options("value_merge", mode=mode, count_bias=True, window=0), layer, view, marked(view, 1))
    assert out.rows("cardinality", 0).tolist() == [1 + merges]
    assert (out.rows("values", 0)[0, 0].item() != 3) == merges


@pytest.mark.parametrize(("threshold", "merges"), [(0.59, True), (0.61, False), (-1.0, True)])
def test_threshold(threshold, merges):
    for mode in ("value", "pivot", "weighted"):
        out, _ = merged(0.6, mode=mode, threshold=threshold)
        assert (out.rows("values", 0)[0, 0].item() != 3) == merges


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.1, 1), (0.5, 2), (0.51, 3), (1.0, 4)])
def test_merge_fraction_takes_the_most_similar(fraction, count):
    layer, view = make_view(6, 1, keys=directions(0.5, 0.8, 0.6, 0.7, -0.9), n=[1, 2, 4, 8, 16, 1])
    out = carried_out(options("value_merge", merge_fraction=fraction, count_bias=True), layer, view,
                      marked(view, 1, 2, 3, 4))  # fmt: skip
    assert out.rows("cardinality", 0).tolist() == [1 + sum([4, 16, 8, 2][:count]), 1]


def test_sinks_are_never_merged_into():
    for mode in ("value", "pivot", "weighted"):
        layer, view = make_view(5, 1, keys=directions(0.0, 1.0, 0.5, 0.4), values=scalars(1, 2, 3, 4, 5))
        out = carried_out(options("value_merge", mode=mode, sink=2), layer, view, marked(view, 2))
        assert out.rows("values", 0)[:2, 0].tolist() == [1, 2] and out.rows("values", 0)[2, 0] < 4


def test_norm_selection_keeps_the_short_keys():
    layer, view = make_view()
    length = view.keys[0, 0, 2:21].norm(dim=-1)
    out = planned(options("value_merge", select="knorm", **ALL), layer, view)
    assert out.rows("position", 0).tolist() == [0, 1, *sorted((length.argsort()[:9] + 2).tolist()), 21, 22, 23]
    assert options("value_merge", select="knorm").needs == frozenset()


# -- invariants --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["value", "pivot", "weighted"])
def test_values_stay_in_the_hull(mode):
    layer, view = make_view()
    low, high = view.values.amin(2)[0, :, None], view.values.amax(2)[0, :, None]
    values = planned(options("value_merge", mode=mode, **ALL), layer, view).dense("values")
    assert ((values >= low) & (values <= high)).all()


@pytest.mark.parametrize("mode", ["pivot", "weighted"])
def test_look_m_with_counts_loses_no_token(mode):
    layer, view = make_view(n=[1, 2, 3] * 8)
    out = planned(options("value_merge", mode=mode, count_bias=True, **ALL), layer, view)
    assert [int(out.rows("cardinality", h).sum()) for h in range(2)] == [48, 48] and out.length == [14, 14]


@pytest.mark.parametrize(("settings", "message"), [
    ({"mode": "mean"}, "mode='mean'; allowed:.*value.*pivot.*weighted"),
    ({"select": "random"}, "select='random'; allowed:.*attention.*knorm"),
    ({"threshold": 2}, "threshold must be a number from -1 to 1; found 2"),
    ({"merge_fraction": -0.1}, "merge_fraction must be a number from 0 to 1; found -0.1"),
    ({"count_bias": None}, "count_bias must be True or False; found None"),
], ids=str)  # fmt: skip
def test_bad_options_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        options("value_merge", **settings)
