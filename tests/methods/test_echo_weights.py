"""Echo's weights of merged keys: shares, output curvature and the loss' Fisher diagonal, against plain restatements."""

import pytest
import torch
from tiny_models import OPTIONS, assert_close, assert_same_rows, prompt, tiny_model
from transformers import DynamicCache

import asymkv
from asymkv import reconstruction
from asymkv.plan import contract_pairs
from asymkv.replay_scores import CURVATURE, MERGED_WEIGHTS, PAIR, SHARE, Displacement

REQUEST = OPTIONS["echo"]
CAUGHT = []


class Caught(Displacement):
    """Keeps what it was shown."""

    def score(self, layer, seen, begin, end):
        super().score(layer, seen, begin, end)
        CAUGHT.append((seen, {n: layer.dense(n)[0].clone() for n in layer.storage.columns}))


def judged(monkeypatch, **options):
    """A prompt of 40 tokens of which nothing is lost, and what each layer's replay was shown."""
    monkeypatch.setattr("asymkv.methods.echo.Displacement", Caught)
    CAUGHT.clear()
    model = tiny_model(dtype=torch.float64)
    settings = {"action": "merge", "chunk_size": 40, "budget": 64, "window_size": 0, **options, **REQUEST}
    with asymkv.replace("llama", method="echo", **settings), torch.no_grad():
        cache = model(prompt(40)).past_key_values
    return model, cache


def moves(model, seen, rows, index):
    """Per query head: logits ``[t, T]`` and ``p (v - o)`` through the output projection, ``[t, T, hidden]``."""
    weight = model.model.layers[index].self_attn.o_proj.weight
    lse = torch.logaddexp(seen.past_lse, seen.own_lse)[0]
    for head in range(seen.q.shape[1]):
        kv = head // (seen.q.shape[1] // len(rows["keys"]))
        logits = seen.q[0, head] @ rows["keys"][kv].T * seen.scale
        p = (logits - lse[head][:, None]).exp() * rows["cardinality"][kv]
        apart = rows["values"][kv] - seen.out[0, head][:, None]
        yield head, kv, logits, p[..., None] * (apart @ weight[:, head * 16 : head * 16 + 16].T)


def test_a_pairs_share_moves_the_output_least(monkeypatch):
    model, _ = judged(monkeypatch, merged_weights="output_error")
    for index, (seen, rows) in enumerate(CAUGHT):
        grid = torch.linspace(0.02, 0.98, 97, dtype=torch.double)
        error = torch.zeros(2, 39, len(grid), dtype=torch.double)
        for _, kv, logits, u in moves(model, seen, rows, index):
            step = (logits[:, 1:] - logits[:, :-1])[..., None]
            for i, w in enumerate(grid):
                error[kv, :, i] += ((1 - w) * step * u[:, :-1] - w * step * u[:, 1:]).square().sum((0, 2))
        best = grid[error.argmin(-1)]
        assert (rows[SHARE][:, :-1].double() - best).abs().max() < 0.006, "half a step of the grid"
        assert best.std() > 0.05, "the same everywhere tells nothing"
    assert len(CAUGHT) == 2


def test_the_cost_of_a_pair_is_that_of_its_share(monkeypatch):
    """By attention: each token of the merged row has the logit w s + (1 - w) s'."""
    model, _ = judged(monkeypatch, merged_weights="output_error")
    for index, (seen, rows) in enumerate(CAUGHT):
        cost = torch.zeros(2, 39, dtype=torch.double)
        lse = torch.logaddexp(seen.past_lse, seen.own_lse)[0]
        for head, kv, logits, _ in moves(model, seen, rows, index):
            s, w = logits - lse[head][:, None], rows[SHARE][kv, :-1].double()
            merged = (w * s[:, :-1] + (1 - w) * s[:, 1:]).exp()
            a, b = merged - s[:, :-1].exp(), merged - s[:, 1:].exp()
            cost[kv] = cost[kv].maximum(a.abs().maximum(b.abs()).maximum((a + b).abs()).amax(0))
        assert_close("pair", cost, rows[PAIR][:, :-1].double(), 1e-6)


def test_curvature_of_the_output_is_its_squared_derivative(monkeypatch):
    model, cache = judged(monkeypatch, merged_weights="output")
    for index, (seen, rows) in enumerate(CAUGHT):
        found = torch.zeros(2, 40, 16, dtype=torch.double)
        for head, kv, _, u in moves(model, seen, rows, index):
            for j in range(40):
                back = cache.rope.rotate(seen.q[0, head], torch.full((seen.q.shape[2],), -j)) * seen.scale
                found[kv, j] += u[:, j].square().sum(-1) @ back.square()
        assert_close("curvature", found, rows[CURVATURE], 1e-9)


def test_fisher_is_the_squared_gradient_of_the_stock_models_loss(monkeypatch):
    """The stock model repeats the prompt on a stock cache whose keys are leaves."""
    inputs = []
    real = reconstruction.replay

    def seen(adapter, lm, cache, ids, ranges, scorer):
        inputs.append((ids[0], ranges[0]))
        return real(adapter, lm, cache, ids, ranges, scorer)

    monkeypatch.setattr(reconstruction, "replay", seen)
    model, cache = judged(monkeypatch, merged_weights="loss")
    (ids, (begin, end)), stock = inputs[0], DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(40), past_key_values=stock)
    leaves = [layer.keys.detach().clone().requires_grad_() for layer in stock.layers]
    for layer, leaf in zip(stock.layers, leaves, strict=True):
        layer.keys = leaf
    logits = model(ids[None], past_key_values=stock).logits[0]
    answers = end - begin
    loss = torch.nn.functional.cross_entropy(logits[-answers - 1 : -1].float(), ids[-answers:], reduction="sum")
    for index, gradient in enumerate(torch.autograd.grad(loss, leaves)):
        square = cache.rope.rotate(gradient[0], -torch.arange(40).expand(2, -1)).square()
        assert square.amax() > 0
        assert_close("fisher", square, cache.layers[index].dense(CURVATURE)[0], 1e-5)
    assert model.model.embed_tokens.weight.requires_grad, "what was frozen for the pass is as it was"


@pytest.mark.parametrize("weights", ["output_error", "output", "loss"])
@pytest.mark.parametrize("position", ["last", "mean"])
def test_keys_merge_by_their_weights(weights, position, monkeypatch):
    """By the executor and in place alike; values by cardinality."""
    model, whole = judged(monkeypatch, merged_weights=weights)
    options = {"merged_weights": weights, "merged_position": position, "action": "merge", "level": "pair_uniform"}
    settings = {"chunk_size": 40, "budget": 24, "window_size": 0, **options, **REQUEST}
    with asymkv.replace("llama", method="echo", **settings, model=model), torch.no_grad():
        cache = model(prompt(40)).past_key_values
    for index, layer in enumerate(whole.layers):
        rows = {n: layer.dense(n)[0] for n in layer.storage.columns}
        for head in range(2):
            counts = cache.cardinality(index)[0][head].long()
            ends = counts.cumsum(0) - 1
            target = ends.repeat_interleave(counts)
            assert counts.max() > 1 and torch.equal(target, contract_pairs((target[1:] == target[:-1])[None])[0])
            keys = whole.rope.rotate(rows["keys"][head], -torch.arange(40))
            for new, (end, n) in enumerate(zip(ends.tolist(), counts.tolist(), strict=True)):
                if n == 1:
                    continue
                run = slice(end - n + 1, end + 1)
                share = run_shares(weights, rows, head, run, n)
                at = cache.positions(index)[0][head][new]
                expected = whole.rope.rotate((share * keys[run]).sum(0), at)
                # A curvature is mixed with a little cardinality, for dimensions that have none.
                tolerance = 1e-6 if weights == "output_error" else 1e-3
                assert_close("key", expected, cache.keys(index)[0][head][new], tolerance)
                assert_close("value", rows["values"][head, run].mean(0), cache.values(index)[0][head][new], 1e-9)


def run_shares(weights, rows, head, run, n):
    """Shares of the members of a run, ``[n, 1 or D]``."""
    if weights != "output_error":
        h = rows[CURVATURE][head, run]
        return h / h.sum(0)
    share = rows[SHARE][head, run].double()
    chain = [1.0]
    for w in share[: n - 1].tolist():
        chain.append(chain[-1] * (1 - w) / w)
    return torch.tensor(chain, dtype=torch.double)[:, None] / sum(chain)


def test_inference_mode_is_refused():
    with asymkv.replace("llama", method="echo", action="merge", merged_weights="loss", budget=64, **REQUEST):
        model = tiny_model()
        with torch.inference_mode(), pytest.raises(ValueError, match="merged_weights='loss'.*torch.no_grad"):
            model(prompt(20))


@pytest.mark.parametrize("weights", ["output", "loss"])
@pytest.mark.parametrize("position", ["last", "mean"])
def test_a_merged_row_has_the_curvature_of_its_members(weights, position, monkeypatch):
    """As it has their cardinality: later merges weigh it by both."""
    _, whole = judged(monkeypatch, merged_weights=weights)
    options = {"merged_weights": weights, "merged_position": position, "action": "merge", "level": "pair_uniform"}
    model = tiny_model(dtype=torch.float64)
    with asymkv.replace("llama", method="echo", chunk_size=40, budget=24, window_size=0, **options, **REQUEST):
        cache = model(prompt(40)).past_key_values
    for before, after in zip(whole.layers, cache.layers, strict=True):
        assert after.dense(CURVATURE).shape[2] == 24
        assert_close("sum", before.dense(CURVATURE).sum(2), after.dense(CURVATURE).sum(2), 1e-9)


@pytest.mark.parametrize("weights", MERGED_WEIGHTS)
def test_a_row_merges_in_a_batch_as_it_does_alone(weights):
    """The last row of a shorter prompt has no neighbour yet, however wide the batch is."""
    model, turns = tiny_model(dtype=torch.float64), [prompt(36, seed=9), prompt(40, seed=6)]
    options = {"action": "merge", "level": "pair_uniform", "merged_weights": weights, "chunk_size": 40, "budget": 41,
               "sink_size": 0, "window_size": 0}  # fmt: skip
    with asymkv.replace("llama", method="echo", model=model, **options, **REQUEST), torch.no_grad():
        alone = model(turns[0]).past_key_values
        model(turns[1], past_key_values=alone)
        ids, mask = torch.zeros(2, 40, dtype=torch.long), torch.ones(2, 40, dtype=torch.long)
        ids[0], ids[1, 4:], mask[1, :4] = prompt(40)[0], turns[0][0], 0
        both = model(ids, attention_mask=mask).past_key_values
        if weights == "output_error":
            assert all((layer.dense(SHARE)[1, :, 35] == 0).all() for layer in both.layers), "its neighbour is padding"
        model(torch.cat([prompt(40, seed=5), turns[1]]), past_key_values=both)
    assert_same_rows(alone, both, row_b=1, rtol=1e-6)
    assert alone.cardinality(0)[0][0].max() > 1


@pytest.mark.parametrize("weights", MERGED_WEIGHTS)
@pytest.mark.parametrize("currency", ["attention", "output_error"])
def test_autocast_judges_in_full_precision(weights, currency):
    model = tiny_model()
    options = {"action": "both", "merged_weights": weights, "currency": currency, "budget": 30, "chunk_size": 40}
    settings = {"method": "echo", "window_size": 0, "model": model, **options, **REQUEST}
    with asymkv.replace("llama", **settings), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = model(prompt(60)).past_key_values
    assert cache.stats()["rows"] == 30 * 4
    assert all(layer.dense(PAIR).dtype == torch.float32 for layer in cache.layers)


@pytest.mark.parametrize("weights", MERGED_WEIGHTS)
def test_the_peak_counts_what_a_replay_writes(weights, monkeypatch):
    """A prompt of one chunk holds most right before it is compacted."""
    held = []
    real = reconstruction.compact_scored

    def counted(cache, step):
        held.append(cache.nbytes)
        real(cache, step)

    monkeypatch.setattr("asymkv.prefill.compact_scored", counted)
    options = {"action": "merge", "merged_weights": weights, "budget": 24, "chunk_size": 40}
    with asymkv.replace("llama", method="echo", window_size=0, **options, **REQUEST), torch.no_grad():
        cache = tiny_model()(prompt(40)).past_key_values
    assert cache.stats()["peak_nbytes"] >= held[0] > 0
