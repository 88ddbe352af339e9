"""CompressedCache: introspection, bytes, history, batch."""

import copy

import pytest
import torch
from tiny_models import assert_close, assert_same_rows, prompt, tiny_model

import asymkv

SMALL = {"budget": 48, "chunk_size": 32, "decode_interval": 8}


@pytest.fixture
def model():
    return tiny_model()


def run(model, length=150, batch=1, **settings):
    with asymkv.replace("llama", model=model, **{**SMALL, **settings}):
        return model(prompt(length, batch)).past_key_values


def step(model, cache, tokens):
    with asymkv.replace("llama", model=model, **SMALL):
        return model(tokens, past_key_values=cache).logits


def test_nbytes_counts_every_storage_it_owns(model):
    cache = run(model, method="h2o", batch=2)
    step(model, cache, prompt(1, 2))
    owned = {(cache.tail.untyped_storage().data_ptr(), cache.tail.untyped_storage().nbytes())}
    for layer in cache.layers:
        tensors = [*layer.storage.columns.values(), *layer.storage._tables.values()]
        tensors += [layer.ring.queries, layer.ring.positions]
        owned |= {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors}
    assert cache.nbytes == sum(size for _, size in owned) == cache.stats()["nbytes"]
    assert cache.peak_nbytes >= cache.nbytes
    assert cache.fork().nbytes == copy.deepcopy(cache).nbytes == cache.nbytes


@pytest.mark.parametrize("budget", [48, 200, 1000])
def test_slack_after_a_compaction(model, budget):
    cache = run(model, length=1200, budget=budget, chunk_size=300)
    for layer in cache.layers:
        for n, capacity in zip(layer.storage.length, layer.storage.capacity, strict=True):
            assert n == budget and capacity - n <= max(16, 0.125 * n)


def test_decode_appends_in_place(model):
    cache = run(model)
    before = cache.layers[0].storage.columns["keys"].data_ptr()
    for i in range(7):
        step(model, cache, prompt(1, seed=i))
    assert cache.layers[0].storage.columns["keys"].data_ptr() == before and cache.num_rows(0).tolist() == [[55, 55]]


def test_decode_interval_zero_never_compacts(model):
    cache = run(model, decode_interval=0)
    compactions = cache.compactions
    for i in range(30):
        step(model, cache, prompt(1, seed=i))
    assert cache.num_rows(0).tolist() == [[78, 78]] and cache.compactions == compactions


def test_rows_are_introspected_by_ascending_position(model):
    cache = run(model, batch=2)
    for layer in range(2):
        rows = cache.num_rows(layer)
        for b in range(2):
            for h in range(2):
                position, n = cache.positions(layer)[b][h], cache.cardinality(layer)[b][h]
                assert position.dtype == n.dtype == torch.int64 and (position.diff() > 0).all()
                assert torch.equal(position, n.cumsum(0) - 1)  # asymkv: every token stands in some row
                shape = (int(rows[b, h]), 16)
                assert cache.keys(layer)[b][h].shape == cache.values(layer)[b][h].shape == shape


def test_full_method_stores_every_token_as_it_is(model):
    cache = run(model, method="full", chunk_size=None)
    stock = model(prompt(150)).past_key_values
    for layer in range(2):
        assert_close("keys", stock.layers[layer].keys[0], torch.stack(cache.keys(layer)[0]), 1e-6)
    assert cache.is_croppable and cache.stats()["kept_ratio"] == 1.0


def test_crop_takes_back_what_decode_appended(model):
    cache = run(model)
    fork = cache.fork()
    first = step(model, cache, torch.tensor([[7]]))
    for i in range(4):
        step(model, cache, prompt(1, seed=i))
    cache.crop(-5)
    assert cache.get_seq_length() == 150 and cache.tokens_seen.tolist() == [150]
    assert_same_rows(cache, fork)
    assert_close("logits", first, step(model, cache, torch.tensor([[7]])), 1e-6)


def test_a_cache_that_has_seen_nothing(model, tmp_path):
    """Nothing to reorder, and nothing to save."""
    cache = asymkv.CompressedCache.for_model(asymkv.CompressionConfig("h2o", budget=64), model)
    cache.reorder_cache(torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="nothing has been put into this cache"):
        cache.save(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_crop_never_reaches_behind_a_compaction(model):
    cache = run(model)
    for i in range(10):  # the eighth compacts
        step(model, cache, prompt(1, seed=i))
    with pytest.raises(ValueError, match="from 0 to the 2 columns"):
        cache.crop(-3)
    with pytest.raises(ValueError, match="found 3"):
        cache.crop(3)
    cache.crop(-2)
    assert not cache.is_croppable and cache.tokens_seen.tolist() == [158]


def test_fork_is_independent_and_equal(model):
    cache = run(model)
    fork = cache.fork()
    a, b = (step(model, c, torch.tensor([[9]])) for c in (cache, fork))
    assert torch.equal(a, b)
    step(model, fork, prompt(40))
    assert cache.tokens_seen.tolist() == [151] and fork.tokens_seen.tolist() == [191]


def test_reorder_select_and_repeat(model):
    cache = run(model, batch=3)
    alone = cache.fork()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    for row, source in enumerate([2, 0, 0]):
        assert_same_rows(alone, cache, row_a=source, row_b=row)
    for rows, message in (([0, 3], r"0 to 2; found \[0, 3\]"), ([True], r"\[3\], found \[1\]")):
        with pytest.raises(ValueError, match=message):
            cache.batch_select_indices(torch.tensor(rows))
    cache.batch_select_indices(torch.tensor([False, True, True]))
    cache.batch_repeat_interleave(2)
    assert cache.num_rows(0).shape == (4, 2)
    assert_same_rows(alone, cache, row_a=0, row_b=3)


def test_what_a_method_remembers_belongs_to_the_batch(model):
    """Counted, forked, reordered and forgotten with the rows; a view hands out the very same dict."""
    cache = run(model, batch=2)
    before = cache.nbytes
    for layer in cache.layers:
        layer.memory["x"] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert cache.nbytes == before + 16 * len(cache.layers)
    assert cache.layers[1].view(cache.rope, 1.0).memory is cache.layers[1].memory
    assert cache.layers[1].view(cache.rope, 1.0).layer == 1
    fork = cache.fork()
    fork.layers[0].memory["x"] += 10
    fork.layers[0].memory["y"] = torch.zeros(2)
    assert list(cache.layers[0].memory) == ["x"] and cache.layers[0].memory["x"].tolist() == [[1, 2], [3, 4]]
    fork.reorder_cache(torch.tensor([1, 0, 1]))
    assert fork.layers[0].memory["x"].tolist() == [[13, 14], [11, 12], [13, 14]]
    fork.batch_select_indices(torch.tensor([False, True, False]))
    assert fork.layers[0].memory["x"].tolist() == [[11, 12]]
    fork.batch_repeat_interleave(2)
    assert fork.layers[0].memory["y"].tolist() == [0, 0]
    cache.reset()
    assert all(layer.memory == {} for layer in cache.layers)


def test_reset_forgets_everything(model):
    cache = run(model)
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="no rows yet"):
        cache.keys(0)
    with asymkv.replace("llama", model=model, **SMALL):
        model(prompt(150), past_key_values=cache)
    assert_same_rows(run(model), cache)


def test_a_batch_of_another_size_is_refused(model):
    cache = run(model, batch=2)
    with pytest.raises(ValueError, match="holds a batch of 2; found one of 1"):
        step(model, cache, prompt(1))


@pytest.mark.parametrize("size", ["40KB", "64KiB"])
@pytest.mark.parametrize("settings", [
    {"method": "asymkv"},
    {"method": "h2o"},
    {"method": "asymkv", "head_budgets": "adaptive"},
    {"method": "keydiff", "layer_budgets": {"kind": "pyramid", "beta": 20}},
    {"method": "h2o", "layer_budgets": "global"},
    {"method": "d2o"},
], ids=lambda s: "-".join(map(str, s.values())))  # fmt: skip
def test_byte_budget_is_kept_and_used(model, size, settings):
    total = 40_000 if size == "40KB" else 65_536
    with asymkv.replace("llama", model=model, budget=size, chunk_size=100, sink_size=2, window_size=4,
                        decode_interval=0, **settings):  # fmt: skip
        cache = model(prompt(600)).past_key_values
        for token in range(3):  # decode queries are remembered
            model(torch.tensor([[token]]), past_key_values=cache)
    assert 0.7 * total < cache.nbytes <= total


def test_ratio_counts_own_tokens_and_reports_a_raise(model, caplog):
    ids = prompt(100, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :60] = 0
    with asymkv.replace("llama", model=model, ratio=0.29, sink_size=4, window_size=8):
        cache = model(ids, attention_mask=mask).past_key_values
    assert cache.num_rows(0).tolist() == [[29, 29], [13, 13]]
    assert cache.stats()["budget"] == [29, 13] and cache.stats()["budget_raised"] == [False, True]
    assert "raised" in caplog.text


@pytest.mark.parametrize("method", ["h2o", "tova", "asymkv", "full"])
def test_peak_bytes_are_never_below_the_bytes(model, method):
    """Remembered queries come with the first generated token, and repeated rows with no append at all."""
    cache = run(model, length=20, method=method)
    for i in range(3):
        step(model, cache, prompt(1, seed=i))
        assert cache.peak_nbytes >= cache.nbytes
    cache.batch_repeat_interleave(4)
    assert cache.peak_nbytes >= cache.nbytes
    most = cache.peak_nbytes
    cache.batch_select_indices(torch.tensor([0]))
    step(model, cache, prompt(1))
    assert cache.peak_nbytes == most >= 3 * cache.nbytes


@pytest.mark.parametrize("copied", [asymkv.CompressedCache.fork, copy.deepcopy], ids=["fork", "deepcopy"])
@pytest.mark.parametrize("method", ["h2o", "d2o", "full"])
def test_a_copy_made_under_inference_mode_goes_on_outside(model, method, copied):
    with torch.inference_mode():
        cache = run(model, method=method)
        step(model, cache, prompt(1, seed=5))
        cache = copied(cache)
    with torch.no_grad():
        for i in range(9):  # past a compaction
            step(model, cache, prompt(1, seed=i))
        cache.crop(-1)
    assert cache.tokens_seen.tolist() == [159]


@pytest.mark.parametrize("method", ["asymkv", "tova", "h2o", "cam"])
def test_a_turn_after_a_crop_finds_room(model, method):
    """Queries of the tokens that stay still judge: without them rows would exceed budget + chunk."""
    cache = run(model, method=method)
    never = cache.fork()
    for i in range(5):
        step(model, cache, prompt(1, seed=i))
        if i < 3:
            step(model, never, prompt(1, seed=i))
    cache.crop(-2)
    for each in (cache, never):
        each.peak_rows = 0
        step(model, each, prompt(40))
    assert_same_rows(cache, never)
    assert cache.peak_rows == never.peak_rows <= SMALL["budget"] + SMALL["chunk_size"]


def test_a_crop_turns_back_the_clock_of_decode(model):
    """An interval that passed with nothing to compact began anew; back before its end it is still running."""
    cache = run(model, length=38, budget=46)
    never = cache.fork()
    for i in range(8):
        step(model, cache, prompt(1, seed=i))
        if i < 5:
            step(model, never, prompt(1, seed=i))
    cache.crop(-3)
    for i in range(12):
        for each in (cache, never):
            step(model, each, prompt(1, seed=20 + i))
        assert cache.pending == never.pending
        assert_same_rows(cache, never)
    assert cache.compactions == never.compactions > 0


def test_nothing_is_kept_of_what_is_forgotten(model):
    cache = run(model, batch=2)
    assert not cache.tail.untyped_storage().nbytes()  # not even of the columns that may be cropped
    cache.reset()
    assert cache.nbytes == 0 and not any(hasattr(layer, "storage") for layer in cache.layers)
