"""upstream_compact on hand-made cases, and the same rule inside a run."""

import math

import pytest
import torch
from tiny_models import assert_close, prompt, tiny_model

import asymkv
from asymkv.methods.asymkv import upstream_compact

GAMMA = 4096 / math.log(512)


def make(rows=6, heads=1, group=1, dim=2):
    torch.manual_seed(0)
    keys, sums = torch.randn(heads, rows, dim).double(), torch.randn(heads, rows, dim).double()
    return keys, sums, torch.ones(heads, rows, dtype=torch.long), torch.ones(heads * group, rows).double()


def test_below_the_budget_nothing_happens():
    keys, sums, n, a = make()
    index, *rest = upstream_compact(keys, sums, n, a, None, sink_size=1, budget=6)
    assert index.numel() == 0 and all(x is y for x, y in zip(rest, (keys, sums, n), strict=True))


def test_one_pair_merges_by_squared_gradients():
    keys, sums, n, a = make()
    a[0, 3:5] = 0.01
    g = torch.randn(1, 6, 2).double()
    index, k, v, c = upstream_compact(keys, sums, n, a, g, sink_size=1, budget=5)
    w = g[0].square()
    assert index.tolist() == [2]  # entries 3 and 4, counted behind one sink
    expected = (w[3] * keys[0, 3] + w[4] * keys[0, 4]) / (w[3] + w[4])
    assert_close("key", expected, k[0, 3], 1e-12)
    assert torch.equal(v[0, 3], sums[0, 3] + sums[0, 4]) and c.tolist() == [[1, 1, 1, 2, 1]]


def test_overlapping_pairs_drop_a_token():
    """Pairs {1, 2} and {2, 3}: entry 1 becomes merge(1, 2) of the originals, 2 and 3 are deleted."""
    keys, sums, n, a = make()
    a[0, 1:4] = 0.01
    index, k, v, c = upstream_compact(keys, sums, n, a, torch.ones_like(keys), sink_size=0, budget=4)
    assert index.tolist() == [1, 2] and c.tolist() == [[1, 2, 1, 1]]
    assert_close("key", (keys[0, 1] + keys[0, 2]) / 2, k[0, 1], 1e-12)
    assert torch.equal(v[0], torch.stack([sums[0, 0], sums[0, 1] + sums[0, 2], sums[0, 4], sums[0, 5]]))


def test_cardinality_is_capped_but_values_are_not():
    keys, sums, n, a = make()
    n[0, 1:3] = 4
    a[0, 1:3] = 1e-4
    _, _, v, c = upstream_compact(keys, sums, n, a, torch.ones_like(keys), sink_size=0, budget=5)
    assert c.tolist() == [[1, 5, 1, 1, 1]] and torch.equal(v[0, 1], sums[0, 1] + sums[0, 2])


def test_zero_gradients_collapse_the_key_to_zero():
    keys, sums, n, a = make()
    _, k, _, _ = upstream_compact(keys, sums, n, a, torch.zeros_like(keys), sink_size=0, budget=5)
    merged = [i for i in range(5) if (k[0, i] == 0).all()]
    assert len(merged) == 1


def test_without_gradients_keys_and_values_are_averaged():
    keys, sums, n, a = make()
    a[0, 0:2] = 0.01
    _, k, v, c = upstream_compact(keys, sums, n, a, None, sink_size=0, budget=5)
    assert_close("key", keys[0, :2].mean(0), k[0, 0], 1e-12)
    assert_close("value", sums[0, :2].mean(0), v[0, 0], 1e-12)
    assert c[0, 0] == 2


def test_score_is_mass_times_recency_times_tokens_summed_over_heads():
    keys, sums, n, a = make(rows=40, heads=2, group=2)
    a = torch.rand(4, 40).double()
    n = torch.randint(1, 5, (1, 40)).expand(2, -1)
    sink = 3
    mass = (a * n[0]).sum(0)[sink:]
    counts = n[0, sink:].double()
    i = torch.arange(36)
    score = (mass[:-1] + mass[1:]) * torch.exp(-(i + 1) / GAMMA) * 2 * (counts[:-1] + counts[1:])
    index, k, *_ = upstream_compact(keys, sums, n, a, torch.ones_like(keys), sink_size=sink, budget=33)
    assert index.tolist() == sorted(score.argsort()[:7].tolist())
    assert k.shape == (2, 33, 2)


def test_late_pairs_are_preferred_among_equals():
    keys, sums, n, a = make(rows=20)
    index, *_ = upstream_compact(keys, sums, n, a, torch.ones_like(keys), sink_size=2, budget=18)
    assert index.tolist() == [15, 16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_keep_the_dtype_of_the_inputs(dtype):
    keys, sums, n, a = make()
    _, k, v, _ = upstream_compact(keys.to(dtype), sums.to(dtype), n, a.to(dtype), keys.to(dtype), sink_size=0, budget=4)
    assert k.dtype == v.dtype == dtype


def test_defaults_are_the_released_codes():
    config = asymkv.CompressionConfig(upstream_compat=True)
    found = (config.sink_size, config.budget, config.chunk, config.decode_interval, config.positions)
    assert found == (32, 2080, 512, 0, "cardinality")
    with pytest.raises(ValueError, match="decode_interval must be 0"):
        asymkv.CompressionConfig(upstream_compat=True, decode_interval=7)
    with pytest.raises(ValueError, match="window_size must be 0, found 32"):
        asymkv.CompressionConfig(upstream_compat=True, window_size=32)
    assert asymkv.CompressionConfig.load("asymkv_upstream", ratio=0.5).budget is None


def test_whole_run_follows_the_released_loop():
    """Rewritten plainly: replay the chunk on the past for attention and gradients, compress, run the chunk."""
    sink, budget, chunk = 4, 40, 24
    ids = prompt(96)
    model = tiny_model(dtype=torch.float64)
    with asymkv.replace("llama", upstream_compat=True, sink_size=sink, budget=budget, chunk_size=chunk):
        out = model(ids)
        cache = out.past_key_values
        expected = plain_upstream(model, ids, sink, budget, chunk)
    assert cache.num_rows(0).tolist() == [[budget + chunk] * 2]
    for layer in range(2):
        keys, sums, n = expected["layers"][layer]
        for head in range(2):
            assert torch.equal(cache.cardinality(layer)[0][head], n[head])
            pre = cache.rope.rotate(cache.keys(layer)[0][head], -(n[head].cumsum(0) - 1))
            assert_close("keys", keys[head], pre, 1e-5)
            assert_close("values", sums[head] / n[head][:, None], cache.values(layer)[0][head], 1e-5)
    assert_close("logits", expected["logits"], out.logits[:, -chunk:], 1e-5)


def plain_upstream(model, ids, sink, budget, chunk):
    """The released loop with dense tensors: keys before RoPE, value sums, capped counts."""
    past, scale = None, 0.25
    rotary = asymkv.rope.Rope(model.model.rotary_emb)

    def forward(x, past, leaves):
        hidden, new, masses = model.model.embed_tokens(x), [], []
        for i, layer in enumerate(model.model.layers):
            attn, states = layer.self_attn, layer.input_layernorm(hidden)
            q, k, v = (p(states).view(1, x.shape[1], -1, 16).transpose(1, 2)[0] for p in
                       (attn.q_proj, attn.k_proj, attn.v_proj))  # fmt: skip
            keys, sums, n = (leaves[i] if leaves else past[i]) if past else (k[:, :0], v[:, :0], None)
            count = torch.cat([n if n is not None else torch.ones(2, 0).long(), torch.ones(2, x.shape[1]).long()], 1)
            position = count.cumsum(1) - 1
            all_k = rotary.rotate(torch.cat([keys, k], 1), position)
            query = rotary.rotate(q, position[:1, -x.shape[1] :].expand(4, -1))
            logits = scale * query @ all_k.repeat_interleave(2, 0).transpose(1, 2)
            later = position[0][None] > position[0, -x.shape[1] :][:, None]
            e = torch.exp(logits.masked_fill(later, -torch.inf))
            a = e / (e * count.repeat_interleave(2, 0)[:, None]).sum(-1, keepdim=True)
            o = a @ torch.cat([sums, v], 1).repeat_interleave(2, 0)
            hidden = hidden + attn.o_proj(o.transpose(0, 1).reshape(1, x.shape[1], -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            masses.append(a.sum(1)[:, : keys.shape[1]].detach())
            new.append((torch.cat([keys, k], 1).detach(), torch.cat([sums, v], 1).detach(), count))
        return model.lm_head(model.model.norm(hidden)), new, masses

    for begin in range(0, ids.shape[1], chunk):
        x = ids[:, begin : begin + chunk]
        if past is not None and past[0][0].shape[1] > budget:
            leaves = [(k.clone().requires_grad_(), v, n) for k, v, n in past]
            logits, _, masses = forward(x, past, leaves)
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], x[0, 1:])
            grads = torch.autograd.grad(loss, [k for k, _, _ in leaves])
            past = [upstream_compact(k, v, n, m, g, sink_size=sink, budget=budget)[1:] for (k, v, n), m, g in
                    zip(past, masses, grads, strict=True)]  # fmt: skip
        with torch.no_grad():
            logits, past, _ = forward(x, past, None)
    return {"layers": past, "logits": logits}
