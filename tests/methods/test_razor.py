"""RazorAttention: what the other heads drop stays as one row that counts as all of it."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import HEAD_SCORES, assert_close, left_padded, prompt, tiny_model

import asymkv
from asymkv import CompressionConfig, lma_attention
from asymkv.budgets import HeadBudgets
from asymkv.layer import CompressedLayer
from asymkv.methods.razor import tokens_of_rows
from asymkv.rope import Rope

STILL = Rope(SimpleNamespace(inv_freq=torch.zeros(1)))  # a rotary embedding that turns nothing


def method(budget, sink_size=0, window_size=0, **options):
    config = CompressionConfig("razor", budget=budget, sink_size=sink_size, window_size=window_size,
                               head_budgets="uniform", **options)  # fmt: skip
    return config.options


def one_head(keys, values):
    """A layer of one head of two dimensions, the second always 0."""
    layer = CompressedLayer()
    first = torch.tensor([1.0, 0.0], dtype=torch.float64)
    layer.append(*(torch.tensor(x)[None, None, :, None] * first for x in (keys, values)))
    return layer


def compact(layer, method, budget, rope=STILL):
    layer.compact(method, layer.view(rope, 1.0), [budget], HeadBudgets())


def attend(layer, query=1.0):
    q = torch.tensor([[[[query, 0.0]]]], dtype=torch.float64)
    n = layer.dense("cardinality")
    return lma_attention(q, layer.dense("keys"), layer.dense("values"), n, scale=1.0)[0][0, 0, 0, 0].item()


def test_worked_example():
    """Dropped keys 0 and 1 with values 1 and 3, kept key 2 with value 10."""
    def after(budget, **options):
        layer = one_head([0, 1, 2], [1, 3, 10])
        compact(layer, method(budget, **options), budget)
        return layer

    assert attend(one_head([0, 1, 2], [1, 3, 10])) == pytest.approx(7.4766, abs=5e-5)
    layer = after(2)
    assert attend(layer) == pytest.approx(7.5315, abs=5e-5)
    assert layer.dense("keys")[0, 0, :, 0].tolist() == [0.5, 2] and layer.dense("cardinality").tolist() == [[[2, 1]]]
    assert layer.dense("position").tolist() == [[[1, 2]]]
    assert attend(after(2, count_bias=False)) == pytest.approx(8.5406, abs=5e-5)
    assert attend(one_head([2], [10])) == pytest.approx(10)


def test_equal_dropped_keys_are_exact():
    keys, values = [3, 0.7, 0.7, 0.7, 0.7, -1, 2], [5, 1, 3, -2, 8, 4, 10]
    layer = one_head(keys, values)
    compact(layer, method(4, sink_size=1, window_size=2), 4)
    assert layer.dense("cardinality").tolist() == [[[1, 4, 1, 1]]]
    for query in (-2.0, 0.3, 4.0):
        assert attend(layer, query) == pytest.approx(attend(one_head(keys, values), query), rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"mean_after_rope": False}, {"count_bias": False}], ids=str)
def test_running_mean_is_the_mean_of_the_batch(options):
    rope = Rope(tiny_model().model.rotary_emb)
    chosen = method(9, sink_size=2, window_size=4, **options)
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 2, 60, 16, generator=generator, dtype=torch.float64)

    def run(sizes):
        layer = CompressedLayer()
        for keys, values in zip(k.split(sizes, 2), v.split(sizes, 2), strict=True):
            layer.append(keys, values)
            if layer.storage.width > 9:
                compact(layer, chosen, 9, rope)
        return layer

    once, often = run([60]), run([20, 1, 1, 7, 31])
    middle = slice(2, 54)
    for layer in (once, often):
        assert layer.dense("position").tolist() == [[[0, 1, 53, *range(54, 60)]] * 2]
        assert_close("values", v[:, :, middle].mean(2), layer.dense("values")[:, :, 2], 1e-12)
        assert torch.equal(layer.dense("values")[:, :, 3:], v[:, :, 54:])
        assert torch.equal(layer.dense("keys")[:, :, 3:], k[:, :, 54:])
        n = layer.dense("cardinality")[0, :, 2].tolist()
        assert n == ([1, 1] if options == {"count_bias": False} else [52, 52])
        assert tokens_of_rows(layer.view(rope, 1.0))[0, :, 2].tolist() == [52, 52]
    assert_close("keys", once.dense("keys"), often.dense("keys"), 1e-6 if "mean_after_rope" in options else 1e-12)
    if options != {"mean_after_rope": False}:
        assert_close("post-RoPE mean", k[:, :, middle].mean(2), once.dense("keys")[:, :, 2], 1e-12)
    else:
        at = torch.arange(60).expand(1, 2, -1)
        flat = rope.rotate(k, -at)[:, :, middle].mean(2)
        assert_close("pre-RoPE mean", rope.rotate(flat, at[..., 53]), once.dense("keys")[:, :, 2], 1e-12)


def test_the_storage_is_not_edited_by_a_plan():
    layer = one_head([0, 1, 2, 3], [1, 3, 10, 0])
    storage = layer.storage
    before = {name: column.clone() for name, column in storage.columns.items()}
    compact(layer, method(2), 2)
    assert layer.storage is not storage
    assert all(torch.equal(column, before[name]) for name, column in storage.columns.items())


def test_every_token_is_counted_through_a_conversation():
    model = tiny_model()
    ids, mask, _ = left_padded([170, 95])
    settings = {"method": "razor", "head_scores": HEAD_SCORES, "window_size": 8, "ratio": 0.4}
    with asymkv.replace("llama", chunk_size=50, decode_interval=5, **settings):
        cache = model(ids, attention_mask=mask).past_key_values
        kept = [cache.num_rows(i).sum(1).tolist() for i in range(2)]
        assert [sum(rows) for rows in zip(*kept, strict=True)] == [4 * 68, 4 * 38]
        assert cache.num_rows(1)[:, 0].tolist() == [170, 95]  # the best head is whole
        for i in range(12):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            model(torch.full((2, 1), i + 3), attention_mask=mask, past_key_values=cache)
        mask = torch.cat([mask, torch.ones(2, 30, dtype=torch.long)], 1)
        model(prompt(30, batch=2), attention_mask=mask, past_key_values=cache)
    for layer in range(2):
        for row, tokens in enumerate([212, 137]):
            for n, at in zip(cache.cardinality(layer)[row], cache.positions(layer)[row], strict=True):
                assert int(n.sum()) == tokens
                assert at[:4].tolist() == [0, 1, 2, 3] and at[-8:].tolist() == list(range(tokens - 8, tokens))
                assert (n > 1).sum() <= 1


def test_published_rows():
    """max(S0, N / C) newest rows, the sinks and one row more; the budget is not asked."""
    model = tiny_model()
    rule = {"head_scores": HEAD_SCORES, "retrieval_share": 0.25, "least_recent": 40, "recent_divisor": 5}
    with asymkv.replace("llama", method="razor", chunk_size=64, **rule):
        held = {n: [model(prompt(n)).past_key_values.num_rows(i)[0].tolist() for i in range(2)] for n in (44, 100, 400)}
    assert held == {44: [[44, 44]] * 2, 100: [[45, 45], [100, 45]], 400: [[85, 85], [400, 85]]}


def test_nothing_changes_while_the_recent_rows_hold_everything():
    model = tiny_model()
    ids = prompt(150)
    ref = model(ids).logits
    with asymkv.replace("llama", "razor_paper", head_scores=HEAD_SCORES):
        out = model(ids)
    assert_close("logits", ref, out.logits, 1e-5)
    assert out.past_key_values.compactions == 0


def test_echo_scores_choose_a_head_too():
    model = tiny_model()
    scores = {"induction": HEAD_SCORES, "echo": [[1.0, 0.0], [0.0, 0.0]]}
    with asymkv.replace("llama", method="razor", head_scores=scores, window_size=8, ratio=0.6, chunk_size=64):
        cache = model(prompt(200)).past_key_values
    assert [cache.num_rows(i)[0].tolist().index(200) for i in range(2)] == [0, 0]


@pytest.mark.parametrize(("options", "message"), [
    ({"count_bias": 1}, "count_bias must be True or False; found 1"),
    ({"least_recent": 4000}, "needs share"),
    ({"retrieval_share": 1.5}, "from 0 to 1; found 1.5"),
    ({"retrieval_share": 0.15, "recent_divisor": 5}, "needs recent"),
], ids=str)  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        CompressionConfig("razor", **options)
