"""AAGC's optional parts: centroids that are given up, and values by importance; worked examples and a restatement."""

import pytest
import torch
from aagc_rows import axis, bank_view, folded
from merging_views import DIM, carried_out, options
from tiny_models import assert_close

from asymkv.methods.clustering import FOLDED, WORTH

EMA = {"kmeans_update": "ema"}


@pytest.mark.parametrize(("settings", "worth", "mass", "expected"), [
    ({}, 3.0, (1, 2), (3 * 0 + 1 * 2 + 2 * 4) / 6),
    ({}, 3.0, (0, 0), 0.0),  # the centroid's own is all there is
    ({}, 0.0, (0, 0), 2.0),  # there is none: tokens decide
    (EMA, None, (1, 2), (1 - 0.99**2) * 10 / 3),
    (EMA, None, (0, 0), (1 - 0.99**2) * 3),
    ({**EMA, "kmeans_learning_rate": 1.0}, None, (3, 1), 2.5),
], ids=str)  # fmt: skip
def test_worked_examples_of_values_by_importance(settings, worth, mass, expected):
    """A centroid at 0 into which ``worth`` was folded takes 2 and 4; its key and count do not ask for importance, nor
    does its value for the importance that it has now."""
    rows = axis(0, 2, 4, 9, 5)
    column = None if worth is None else [worth, 0, 0, 0, 0]
    out = folded(rows, rows, 3, bank=[0], worth=column, mass=[9, *mass, 0, 0], importance=True, **settings)
    plain = folded(rows, rows, 3, bank=[0], **settings)
    for name in ("keys", "cardinality", "position", FOLDED):
        assert torch.equal(out.columns[name], plain.columns[name]), name
    assert out.rows("values", 0)[:, 0].tolist() == pytest.approx([expected, 5])
    assert (WORTH in out.columns) == (worth is not None)
    if worth is not None:
        assert out.rows(WORTH, 0).tolist() == [worth + sum(mass), 0]


def test_importance_that_fp32_can_hardly_hold_weighs_as_exactly():
    """Shares of a centroid are formed before products: values 0.3 and 0.6 by importances 1 : 3, around 1e-44."""
    tiny = 2.0**-149  # the least positive fp32
    out = folded(axis(0, 0, 9, 5), axis(0.3, 0.6, 9, 5), 2, mass=[tiny, 3 * tiny, 0, 0], importance=True,
                 dtype=torch.float32)  # fmt: skip
    assert out.rows("values", 0)[0, 0].item() == pytest.approx(0.525)


@pytest.mark.parametrize(("evict", "keys", "counts"), [
    (False, [10.5, 0.6, 5], [2, 5, 1]), (True, [10.5, 3, 5], [2, 1, 1]),
], ids=["kept", "evicted"])  # fmt: skip
def test_a_centroid_that_is_worth_less_than_every_kept_row_makes_room(evict, keys, counts):
    """Two centroids: 4 tokens at 0 with 2 of importance, 1 at 10 with exactly the least kept row's 0.75.

    The first has 0.5 per token and goes, its tokens with it; of the rows at 11 and 3, the farther from 10 follows it.
    The dropped row's 0.1 and the recent row's 0.2 set no bar.
    """
    rows = axis(0, 10, 11, 3, 9, 5)
    out = folded(rows, rows, 4, bank=[0, 1], n=[4, 1, 1, 1, 1, 1], mass=[2, 0.75, 0.75, 3, 0.1, 0.2], num_clusters=2,
                 evict_centroids=evict)  # fmt: skip
    assert out.rows("keys", 0)[:, 0].tolist() == pytest.approx(keys) and out.rows("position", 0).tolist() == [2, 3, 5]
    assert out.rows("cardinality", 0).tolist() == counts and out.rows(FOLDED, 0)[:, 0].tolist() == [*counts[:2], 0]


def test_a_bank_that_is_given_up_begins_anew_where_rows_were_kept():
    """Both centroids are worth nothing: kept rows form two of their own; a head that kept none keeps its bank."""
    rows = axis(0, 100, 2, 3, 20, 21, 7, 5).expand(1, 2, 8, DIM)
    gone = torch.zeros(1, 2, 8, dtype=torch.bool)
    gone[0, 0, 6], gone[0, 1, 2:7] = True, True
    layer, view = bank_view(rows, rows, bank=[0, 1], mass=[0, 0, 1, 2, 3, 4, 0, 0])
    method = options("aagc", budget=100, window=0, recent_size=1, num_clusters=2, evict_centroids=True)
    out = carried_out(method, layer, view, gone)
    assert [out.rows("keys", h)[:, 0].tolist() for h in (0, 1)] == [[2.5, 20.5, 5], [0, 100, 5]]
    assert [out.rows("cardinality", h).tolist() for h in (0, 1)] == [[2, 2, 1], [1, 1, 1]]


def restated(keys, values, n, worth, mass, bank, evict, by_importance, rate):
    """One head's fold, row by row, the last row but one dropped and the last kept: ``(position, key, value, n)`` of
    each row; ``rate`` None: running mean."""
    count, kept = len(bank), range(max(bank) + 1, len(keys) - 2)
    least = min(mass[i] for i in kept)
    bank = [j for j in bank if not evict or mass[j] / n[j] >= least]
    gap = {i: min(((keys[i] - keys[j]) ** 2).sum() for j in bank) for i in kept}
    seeds = sorted(kept, key=gap.__getitem__)[len(kept) - (count - len(bank)) :]
    members = {j: [j] for j in [*bank, *seeds]}
    for i in set(kept) - set(seeds):
        members[min(members, key=lambda j, i=i: ((keys[i] - keys[j]) ** 2).sum())].append(i)
    rows = [(len(keys) - 1, keys[-1], values[-1], 1)]
    for lead, group in members.items():
        new = [i for i in group if i not in bank]
        own = {i: (worth[i] if i in bank else mass[i]) if by_importance else n[i] for i in group}

        def mean(x, amount, lead=lead, new=new, group=group):
            if rate is None or lead not in bank:
                return sum(amount[i] * x[i] for i in group) / sum(amount[i] for i in group)
            if not new:
                return x[lead]
            target = sum(amount[i] * x[i] for i in new) / sum(amount[i] for i in new)
            return x[lead] + (1 - (1 - rate) ** len(new)) * (target - x[lead])

        rows.append((max(group), mean(keys, n), mean(values, own), sum(n[i] for i in group)))
    return sorted(rows, key=lambda row: row[0]), count - len(bank)


@pytest.mark.parametrize("rate", [None, 0.3])
@pytest.mark.parametrize("by_importance", [False, True])
@pytest.mark.parametrize("evict", [False, True])
def test_a_fold_is_its_plain_restatement(evict, by_importance, rate):
    """Random rows, two heads, five centroids of some tokens each."""
    torch.manual_seed(3)
    keys, values = torch.randn(2, 1, 2, 24, DIM, dtype=torch.float64)
    bank, n = list(range(5)), [3, 1, 7, 2, 5] + [1] * 19
    worth, mass = torch.rand(2, 24), torch.rand(2, 24) + 0.4
    update = {} if rate is None else {**EMA, "kmeans_learning_rate": rate}
    column = worth if by_importance and rate is None else None
    out = folded(keys, values, 22, bank=bank, n=n, worth=column, mass=mass, num_clusters=5, evict_centroids=evict,
                 importance=by_importance, **update)  # fmt: skip
    for head in range(2):
        found = (worth[head].double(), mass[head].double())
        rows, gone = restated(keys[0, head], values[0, head], n, *found, bank, evict, by_importance, rate)
        assert (0 < gone < 5) == evict
        at, key, value, count = zip(*rows, strict=True)
        assert out.rows("position", head).tolist() == list(at) and out.rows("cardinality", head).tolist() == list(count)
        assert_close("keys", torch.stack(key), out.rows("keys", head), 1e-9)
        assert_close("values", torch.stack(value), out.rows("values", head), 1e-9)
