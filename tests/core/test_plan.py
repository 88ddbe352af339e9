"""CompactionPlan and its executor."""

import pytest
import torch
from tiny_models import assert_close, tiny_model

from asymkv.layer import CompressedLayer
from asymkv.plan import CompactionPlan, contract_pairs, execute, keep_rows
from asymkv.rope import Rope


def make(rows=8, policy="original", dtype=torch.float64, heads=2):
    torch.manual_seed(0)
    rope = Rope(tiny_model().model.rotary_emb)
    layer = CompressedLayer(position_policy=policy)
    k = rope.rotate(torch.randn(1, heads, rows, 16, dtype=dtype), torch.arange(rows).expand(1, heads, -1)).to(dtype)
    layer.append(k, torch.randn(1, heads, rows, 16, dtype=dtype))
    return layer, rope


def run(layer, rope, plan):
    view = layer.view(rope, 0.25)
    layer.storage = execute(plan, view, layer.storage, layer.policy)
    return view, layer.storage


def pre_rope(rope, keys, positions):
    return rope.rotate(keys, -positions)


def test_runs_contract_without_losing_a_row():
    pairs = torch.tensor([[[1, 1, 0, 0, 1, 0, 0]]]).bool()
    assert contract_pairs(pairs).tolist() == [[[2, 2, 2, 3, 5, 5, 6, 7]]]
    layer, rope = make(heads=1)
    view, storage = run(layer, rope, CompactionPlan(contract_pairs(pairs)))
    assert storage.rows("cardinality", 0).tolist() == [3, 1, 2, 1, 1]
    assert storage.rows("position", 0).tolist() == [2, 3, 5, 6, 7]
    assert_close("value", view.values[0, 0, :3].mean(0), storage.rows("values", 0)[0], 1e-14)


def test_cardinality_weighted_value_sum_is_conserved():
    layer, rope = make()
    before = layer.dense("values").sum(2)
    for pairs in ([1, 1, 0, 0, 1, 0, 0], [1, 0, 1, 0], [0, 1]):
        chosen = torch.tensor(pairs).bool().expand(1, 2, -1)
        run(layer, rope, CompactionPlan(contract_pairs(chosen)))
    after = (layer.dense("values") * layer.dense("cardinality")[..., None]).sum(2)
    assert_close("sum", before, after, 1e-13)
    assert layer.dense("cardinality").sum(-1).tolist() == [[8, 8]]


def test_key_merges_in_pre_rope_coordinates_at_the_last_members_position():
    layer, rope = make()
    weight = torch.rand(1, 2, 8, 16, dtype=torch.float64)
    pairs = torch.tensor([0, 0, 1, 0, 0, 0, 0]).bool().expand(1, 2, -1)
    view, storage = run(layer, rope, CompactionPlan(contract_pairs(pairs), weight))
    members = pre_rope(rope, view.keys[0, 0, 2:4], torch.tensor([2, 3]))
    w = weight[0, 0, 2:4] / weight[0, 0, 2:4].sum(0)
    merged = pre_rope(rope, storage.rows("keys", 0)[2:3], torch.tensor([3]))[0]
    assert_close("key", (w * members).sum(0), merged, 1e-6)


def test_unmerged_rows_keep_their_bits():
    layer, rope = make(dtype=torch.bfloat16)
    keep = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1]).bool().expand(1, 2, -1)
    view, storage = run(layer, rope, keep_rows(keep))
    assert torch.equal(storage.rows("keys", 1), view.keys[0, 1, keep[0, 1]])
    assert torch.equal(storage.rows("values", 1), view.values[0, 1, keep[0, 1]])


def test_zero_weights_fall_back_to_cardinality():
    layer, rope = make()
    pairs = torch.tensor([1, 0, 0, 0, 0, 0, 0]).bool().expand(1, 2, -1)
    other, _ = make()
    run(layer, rope, CompactionPlan(contract_pairs(pairs), torch.zeros(1, 2, 8, 16)))
    run(other, rope, CompactionPlan(contract_pairs(pairs)))
    assert torch.equal(layer.dense("keys"), other.dense("keys"))


def test_tiny_weights_keep_their_ratio():
    layer, rope = make()
    weight = torch.full((1, 2, 8), 1e-33)
    weight[..., 1] = 3e-33
    pairs = torch.tensor([1, 0, 0, 0, 0, 0, 0]).bool().expand(1, 2, -1)
    view, storage = run(layer, rope, CompactionPlan(contract_pairs(pairs), weight))
    members = pre_rope(rope, view.keys[0, 0, :2], torch.tensor([0, 1]))
    merged = pre_rope(rope, storage.rows("keys", 0)[:1], torch.tensor([1]))[0]
    assert_close("key", 0.25 * members[0] + 0.75 * members[1], merged, 1e-6)


def test_dropping_a_row_drops_its_cardinality_and_heads_may_differ():
    layer, rope = make()
    keep = torch.tensor([[[1, 1, 1, 0, 0, 0, 0, 1], [1] * 7 + [0]]]).bool()
    _, storage = run(layer, rope, keep_rows(keep))
    assert storage.length == [4, 7]
    assert storage.rows("position", 0).tolist() == [0, 1, 2, 7]
    for length, capacity in zip(storage.length, storage.capacity, strict=True):
        assert capacity - length <= max(16, length // 8)


def test_destination_may_be_any_member():
    layer, rope = make(heads=1)
    destination = torch.tensor([[[0, 1, 0, 3, 1, -1, 6, 7]]])
    view, storage = run(layer, rope, CompactionPlan(destination))
    assert storage.rows("position", 0).tolist() == [2, 3, 4, 6, 7]
    assert storage.rows("cardinality", 0).tolist() == [2, 1, 2, 1, 1]
    assert_close("value", view.values[0, 0, [1, 4]].mean(0), storage.rows("values", 0)[2], 1e-14)


@pytest.mark.parametrize(("policy", "expected"), [("original", [0, 1, 6, 7]), ("compact", [0, 1, 2, 3]),
                                                  ("cardinality", [0, 1, 3, 4])])  # fmt: skip
def test_each_position_policy_matches_its_definition(policy, expected):
    layer, rope = make(policy=policy, heads=1)
    start = pre_rope(rope, layer.dense("keys")[0, 0], torch.arange(8))
    destination = torch.tensor([[[0, 1, -1, -1, -1, 6, 6, 7]]])
    _, storage = run(layer, rope, CompactionPlan(destination))
    got = pre_rope(rope, storage.rows("keys", 0), torch.tensor(expected))
    assert_close("kept keys", start[[0, 1, 7]], got[[0, 1, 3]], 1e-6)
    assert storage.rows("position", 0).tolist() == [0, 1, 6, 7]
    if policy != "original":  # there, positions follow the tokens seen
        assert layer.next_rotary().tolist() == [[expected[-1] + 1]]


@pytest.mark.parametrize(("destination", "message"), [([[[0, 1, 9]]], r"\[-1, 3\)"), ([[[1, 2, 2]]], "its own"),
                                                      ([[[0, 0]]], "must be")])  # fmt: skip
def test_bad_plans_are_refused(destination, message):
    layer, rope = make(rows=3, heads=1)
    with pytest.raises(ValueError, match=message):
        run(layer, rope, CompactionPlan(torch.tensor(destination)))
