"""Flattened storage: in-place append, growth, slack, selection."""

import pytest
import torch

from asymkv.layer import CompressedLayer
from asymkv.storage import RaggedStorage


def make(head_lens, dim=8, seed=0):
    """Storage with given lengths, and the rows that each head should hold."""
    columns = {"keys": ((dim,), torch.float32, 0), "position": ((), torch.int32, 0), "log_n": ((), torch.float32, 0)}
    storage = RaggedStorage([n + 2 for n in head_lens], columns, torch.device("cpu"))
    width = max(head_lens)
    g = torch.Generator().manual_seed(seed)
    new = torch.randn(len(head_lens), width, dim, generator=g)
    storage.append({"keys": new, "position": torch.arange(width).expand(len(head_lens), -1)}, head_lens)
    return storage, [new[h, :n] for h, n in enumerate(head_lens)]


@pytest.mark.parametrize("head_lens", [[1], [0, 3], [5, 1, 130, 7], [4, 4]], ids=str)
@pytest.mark.parametrize("t", [1, 3])
def test_append_equals_concatenation(head_lens, t):
    storage, rows = make(head_lens)
    for step in range(12):  # far enough to outgrow the capacity
        new = torch.randn(len(head_lens), t, 8)
        counts = [t if (h + step) % 3 else t - 1 for h in range(len(head_lens))]
        storage.append({"keys": new, "position": torch.zeros(len(head_lens), t)}, counts)
        rows = [torch.cat([old, new[h, : counts[h]]]) for h, old in enumerate(rows)]
    for head, expected in enumerate(rows):
        assert torch.equal(storage.rows("keys", head), expected)


def test_append_within_capacity_moves_nothing():
    storage, _ = make([4, 9])
    before = storage.columns["keys"].data_ptr()
    storage.append({"keys": torch.ones(2, 1, 8), "position": torch.zeros(2, 1)}, [1, 1])
    assert storage.columns["keys"].data_ptr() == before


@pytest.mark.parametrize("head_lens", [[0, 3], [5, 1, 130, 7], [4, 4]], ids=str)
def test_dense_shows_each_head_left_aligned(head_lens):
    storage, rows = make(head_lens)
    dense, valid = storage.dense("keys"), storage.valid()
    for head, expected in enumerate(rows):
        assert torch.equal(dense[head, : len(expected)], expected)
        assert valid is None or valid[head].sum() == len(expected)


def test_equal_capacities_give_a_view_not_a_copy():
    storage, _ = make([4, 4])
    assert storage.dense("keys").data_ptr() == storage.columns["keys"].data_ptr()


@pytest.mark.parametrize("head_lens", [[5, 1, 130, 7], [4, 4]], ids=str)
def test_write_reaches_only_present_rows(head_lens):
    storage, _ = make(head_lens)
    untouched = storage.columns["log_n"].clone()
    storage.write("log_n", torch.full((len(head_lens), max(head_lens)), 7.0))
    assert all((storage.rows("log_n", h) == 7).all() for h in range(len(head_lens)))
    assert (storage.columns["log_n"] != untouched).sum() == sum(head_lens)


def test_select_and_truncate():
    storage, rows = make([5, 1, 30, 7])
    picked = storage.select([2, 2, 0])
    assert [len(picked.rows("keys", h)) for h in range(3)] == [30, 30, 5]
    assert torch.equal(picked.rows("keys", 1), rows[2])
    storage.truncate([2, 0, 10, 7])
    assert torch.equal(storage.rows("keys", 2), rows[2][:20]) and storage.length == [3, 1, 20, 0]
    with pytest.raises(ValueError, match="cannot remove"):
        storage.truncate([9, 0, 0, 0])


def test_spare_rows_hold_their_fill_after_truncate():
    layer = CompressedLayer()
    layer.append(torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4))
    layer.storage.columns["cardinality"].fill_(9)
    layer.storage.truncate([2, 2])
    layer.append(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4), positions=torch.tensor([[4]]))
    assert layer.storage.rows("cardinality", 1).tolist() == [9, 9, 9, 9, 1]


@pytest.mark.parametrize("left", [True, False])
def test_layer_never_stores_padding(left):
    layer = CompressedLayer()
    k, v = torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    valid = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1] if left else [1, 0, 1, 0, 1]]).bool()
    layer.append(k, v, valid=valid)
    assert layer.storage.length == [5, 5, 3, 3] and layer.tokens == [5, 3] and layer.get_seq_length() == 5
    assert torch.equal(layer.storage.rows("keys", 3), k[1, 1, valid[1]])
    assert layer.storage.rows("position", 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_integer_and_fp8_caches_are_refused(dtype):
    rows = torch.zeros(1, 1, 2, 4).to(dtype)
    with pytest.raises(ValueError, match="allowed, equal for both: .*bfloat16"):
        CompressedLayer().append(rows, rows)


def test_rows_sorted_by_cardinality_are_still_handed_out_by_position():
    storage, _ = make([5, 1, 30, 7])
    storage.add_column("cardinality", (), torch.int32)
    storage.write("position", torch.arange(30).expand(4, -1))
    storage.write("cardinality", torch.randint(1, 4, (4, 30)))
    storage.merged = True
    before = [[storage.rows(name, h).clone() for h in range(4)] for name in ("keys", "cardinality", "position")]
    segments = storage.segments()
    assert storage.by_class and int(segments.used.sum()) == 43
    last = storage.run("cardinality", 2).tolist()
    assert sorted(last, key=lambda n: (n == 1, n)) == last
    storage.write("log_n", storage.ordered("position").float())
    for name, rows in zip(("keys", "cardinality", "position"), before, strict=True):
        assert all(torch.equal(storage.rows(name, h), rows[h]) for h in range(4))
    assert all(torch.equal(storage.rows("log_n", h), storage.rows("position", h).float()) for h in range(4))
    storage.append({"keys": torch.ones(4, 1, 8), "position": torch.full((4, 1), 30)}, [1, 1, 1, 1])
    assert int(segments.used.sum()) == 47 and (storage.rows("keys", 3)[-1] == 1).all()
