"""Echo: what an action displaces is what a plain restatement finds; chunks are judged by their own replay."""

import pytest
import torch
from tiny_models import OPTIONS, assert_close, prompt, tiny_model
from torch.nn.functional import pad

import asymkv
from asymkv import replay_scores
from asymkv.replay_scores import PAIR, SCORE, Displacement, ReplayQueries

REQUEST = OPTIONS["echo"]


class Caught(Displacement):
    """Keeps what it was shown."""

    def score(self, layer, seen, begin, end):
        super().score(layer, seen, begin, end)
        heads = layer.storage.heads
        columns = {n: torch.stack([layer.storage.rows(n, h) for h in range(heads)]) for n in layer.storage.columns}
        CAUGHT.append((seen, columns, layer.output_weight))


CAUGHT: list[tuple[ReplayQueries, dict[str, torch.Tensor], torch.Tensor]] = []


def restated(seen, rows, weight, currency):
    """Costs of dropping ``[N, T]`` and of merging with the next ``[N, T - 1]``: the changed softmax, head by head."""
    keys, values, n = rows["keys"], rows["values"], rows["cardinality"].double()
    heads, group = keys.shape[0], seen.q.shape[1] // keys.shape[0]
    drop, pair = torch.zeros(keys.shape[:2]).double(), torch.zeros(heads, keys.shape[1] - 1).double()
    lse = torch.logaddexp(seen.past_lse, seen.own_lse)[0]
    for head in range(heads * group):
        kv, out = head // group, seen.out[0, head]
        logits = seen.q[0, head] @ keys[kv].T * seen.scale - lse[head][:, None]
        p = logits.exp() * n[kv]
        through = weight[:, head * 16 : head * 16 + 16]

        def cost(change, at, kv=kv, out=out, through=through):
            """Of changing the probabilities of the rows ``at`` by ``change [t, len(at)]``."""
            if currency == "attention":
                return change.clamp(min=0).sum(1).maximum(-change.clamp(max=0).sum(1)).max()
            left = 1 + change.sum(1, keepdim=True)
            after = (out + change @ values[kv, at]) / left.clamp(min=1e-3)
            return ((after - out) @ through.T).norm(dim=-1)[left[:, 0] > 1e-3].max()

        for j in range(keys.shape[1]):
            drop[kv, j] = max(drop[kv, j], cost(-p[:, [j]], [j]))
            if j + 1 < keys.shape[1]:
                both = n[kv, j : j + 2]
                merged = ((logits[:, j : j + 2] * both).sum(1) / both.sum()).exp()[:, None] * both
                pair[kv, j] = max(pair[kv, j], cost(merged - p[:, j : j + 2], [j, j + 1]))
    return drop, pair


@pytest.mark.parametrize("currency", replay_scores.CURRENCIES)
@torch.no_grad()
def test_costs_are_what_an_action_changes(currency, monkeypatch):
    monkeypatch.setattr("asymkv.methods.echo.Displacement", Caught)
    CAUGHT.clear()
    model = tiny_model(dtype=torch.float64)
    options = {"currency": currency, "action": "both", "chunk_size": 40, "budget": 64, "window_size": 0, **REQUEST}
    with asymkv.replace("llama", method="echo", **options):
        model(prompt(40))
    for layer, (seen, rows, _) in enumerate(CAUGHT):
        weight = model.model.layers[layer].self_attn.o_proj.weight
        drop, pair = restated(seen, rows, weight, currency)
        assert_close("drop", drop, rows[SCORE].double(), 1e-6)
        assert_close("merge", pair, rows[PAIR][:, :-1].double(), 1e-6)
        assert rows[PAIR][:, -1].isinf().all()
    assert len(CAUGHT) == 2


@torch.no_grad()
def test_twins_cost_nothing_to_merge_and_much_to_drop():
    """A repeated token's key differs by its position only; where positions do not turn keys, twins are equal."""
    model = tiny_model(dtype=torch.float64)
    model.model.rotary_emb.inv_freq.zero_()
    ids = prompt(40)
    ids[0, 21] = ids[0, 20]
    options = {"action": "both", "chunk_size": 40, "budget": 39, "window_size": 0, "level": "pair_uniform", **REQUEST}
    with asymkv.replace("llama", method="echo", **options):
        cache = model(ids).past_key_values
    assert all(found.tolist() == [*range(20), *range(21, 40)] for found in cache.positions(0)[0])
    assert all(n.tolist() == [1] * 20 + [2] + [1] * 18 for n in cache.cardinality(0)[0])


@torch.no_grad()
def test_chunks_are_judged_by_their_own_replay_and_keep_their_scores():
    model = tiny_model(dtype=torch.float64)
    options = {"chunk_size": 30, "sink_size": 2, "window_size": 0, "level": "pair_uniform", **REQUEST}
    ids = prompt(60)
    with asymkv.replace("llama", method="echo", budget=64, **options):
        whole = model(ids).past_key_values
    with asymkv.replace("llama", method="echo", budget=20, **options):
        cache = model(ids[:, :30]).past_key_values
        first = [layer.dense(SCORE)[0] for layer in cache.layers]
        at = [layer.dense("position")[0] for layer in cache.layers]
        model(ids[:, 30:], past_key_values=cache)
    for index, layer in enumerate(cache.layers):
        scores = whole.layers[index].dense(SCORE)[0][:, :30]
        kept = scores[:, 2:].argsort(descending=True)[:, :18].sort().values + 2
        assert torch.equal(at[index][:, 2:].long(), kept)
        for head in range(2):
            old = layer.dense("position")[0, head]
            known = dict(zip(at[index][head].tolist(), first[index][head].tolist(), strict=True))
            found = zip(old.tolist(), layer.dense(SCORE)[0, head].tolist(), strict=True)
            assert all(known[p] == s for p, s in found if p < 30)
    assert cache.stats()["peak_rows"] == 20 + 30


@pytest.mark.parametrize(("settings", "message"), [
    ({"action": "keep"}, "action='keep'.*drop"),
    ({"currency": "nats"}, "currency='nats'.*output_error"),
    ({"over": "range", "action": "both"}, "over='range' is KVzip's score.*action='both'"),
    ({"plus": True}, "plus=True is a form of KVzip's score.*over='range'"),
    ({"merged_keys": "post_rope", "action": "merge", "position_policy": "compact"}, "position_policy='original'"),
    ({"level": "head", "action": "both"}, "action must be 'drop', found 'both'"),
    ({"merged_keys": "post_rope"}, "action='drop' merges none; found merged_keys='post_rope'"),
    ({"merged_position": "mean"}, "action='drop' merges none; found .*merged_position='mean'"),
    ({"merged_weights": "loss"}, "action='drop' merges none; found .*merged_weights='loss'"),
    ({"merged_weights": "fisher", "action": "merge"}, "merged_weights='fisher'.*cardinality"),
    ({"merged_weights": "output", "action": "merge", "merged_keys": "post_rope"}, "merged_keys must be 'pre_rope'"),
    ({"merged_weights": "output", "action": "merge", "position_policy": "compact"}, "position_policy='original'"),
    ({"merged_weights": "loss", "action": "merge", "dimensions": "zack"}, "dimensions must be None, found 'zack'"),
], ids=str)  # fmt: skip
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        asymkv.CompressionConfig("echo", budget=64, **settings)


@torch.no_grad()
def test_a_prefix_and_a_window_must_leave_room():
    """Both always stay: a budget that holds nothing else would be exceeded."""
    model, ids = tiny_model(), prompt(100)
    settings = {"method": "echo", "window_size": 8, "chunk_size": 32, "budget": 40, **REQUEST}
    with asymkv.replace("llama", model=model, prefix=31, **settings):
        cache = model(ids).past_key_values
        assert cache.stats()["rows"] == 40 * 4 and not cache.stats()["peak_rows"] > 40 + 32
        assert model(ids[:, :40]).past_key_values.stats()["rows"] == 40 * 4
    with asymkv.replace("llama", model=model, prefix=32, **settings):
        with pytest.raises(ValueError, match="prefix=32 and window_size=8 rows are always kept, and 40 rows"):
            model(ids)
        assert model(ids[:, :40]).past_key_values.stats()["rows"] == 40 * 4
    with asymkv.replace("llama", model=model, prefix=32, keep_prefix=False, **settings):
        assert model(ids).past_key_values.stats()["rows"] == 40 * 4
    settings.update(budget=None, ratio=0.03, window_size=0)
    with asymkv.replace("llama", model=model, prefix=4, **settings):
        assert model(ids).past_key_values.stats()["budget"] == [5], "a share of 3 rows is raised, and holds the prefix"


def test_pairs_end_where_a_neighbour_goes():
    """A stored merge cost is that of two neighbours: after one of them went or merged there is no such pair."""
    model = tiny_model()
    options = {"action": "both", "chunk_size": 60, "budget": 30, "window_size": 0, **REQUEST}
    with asymkv.replace("llama", method="echo", **options), torch.no_grad():
        cache = model(prompt(60)).past_key_values
    for layer in range(2):
        positions, counts = cache.positions(layer)[0], cache.cardinality(layer)[0]
        for head in range(2):
            pair = cache.layers[layer].storage.rows(PAIR, head)
            alone = counts[head] == 1
            neighbours = (positions[head].diff() == 1) & alone[1:] & alone[:-1]
            assert torch.equal(pair.isfinite(), pad(neighbours, (0, 1)))


@torch.no_grad()
@pytest.mark.parametrize("action", ["drop", "merge", "both"])
@pytest.mark.parametrize("chunk", [30, 200], ids=["first chunk", "prompt"])
def test_a_chunk_that_is_all_prefix_is_not_repeated_and_goes_first(action, chunk):
    """Where the prefix may go, its rows are judged before any replay has told what a merge costs."""
    model, ids = tiny_model(), prompt(90)
    settings = {"method": "echo", "budget": 22, "window_size": 1, "prefix": 40, "keep_prefix": False, **REQUEST}
    with asymkv.replace("llama", model=model, action=action, chunk_size=chunk, **settings):
        cache = model(ids[:, :35]).past_key_values
        assert cache.stats()["rows"] <= 22 * 4
        for t in range(35, 50):
            assert model(ids[:, t : t + 1], past_key_values=cache).logits.isfinite().all()
        model(ids[:, 50:], past_key_values=cache)
    assert cache.tokens_seen.tolist() == [90]
