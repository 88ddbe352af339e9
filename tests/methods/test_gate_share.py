"""KVzip and Echo with a trained gate: rows are ranked by a mean of both logarithms."""

import pytest
import torch
from gate_files import GATES, random_gate
from tiny_models import OPTIONS, assert_same_rows, left_padded, prompt, tiny_model

import asymkv
from asymkv import CompressionConfig
from asymkv.replay_scores import SCORE

LENGTH, BUDGET = 120, 40
SHARED = {"gate_share": 0.4, "gate_file": GATES}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def read(model, ids, mask=None, method="kvzip", **settings):
    with asymkv.replace("llama", model=model, method=method, **{**OPTIONS["kvzip"], **settings}), torch.no_grad():
        return model(ids, attention_mask=mask).past_key_values


def both_scores(model, ids):
    """Logarithms of the replay's scores and of the gate's, ``[L, H_kv, t]``."""
    whole = read(model, ids, ratio=1.0, sink_size=2)
    keys = torch.stack([whole.rope.rotate(x.dense("keys"), -x.dense("position").long())[0] for x in whole.layers])
    gate = random_gate(model).score(keys, torch.stack([x.dense("values")[0] for x in whole.layers]), ids.shape[1])
    return torch.stack([x.dense(SCORE)[0] for x in whole.layers]).log(), gate


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_best_rows_by_the_mean_of_both_are_kept(model, share):
    ids = prompt(LENGTH)
    replay, gate = both_scores(model, ids)
    mean = (1 - share) * replay + share * gate
    cache = read(model, ids, budget=BUDGET, sink_size=2, **({**SHARED, "gate_share": share} if share else {}))
    mean[..., :2] = torch.inf
    wanted = torch.zeros(mean.numel(), dtype=torch.bool)
    wanted[mean.flatten().argsort(descending=True, stable=True)[: BUDGET * 4]] = True
    for layer, heads in enumerate(wanted.view_as(mean)):
        for head, rows in enumerate(heads):
            assert cache.positions(layer)[0][head].tolist() == rows.nonzero().flatten().tolist()
    by_one = [m.flatten().topk(BUDGET * 4).indices.sort().values for m in (replay, gate)]
    assert not torch.equal(*by_one), "the two must differ for this to say anything"


def test_shares_of_one_replay_are_what_each_would_be_alone(model):
    """The gate has its say once rows are scored, so that one prefill serves all shares and levels."""
    ids = prompt(LENGTH)
    settings = [{"budget": BUDGET}, {"budget": BUDGET, **SHARED}, {"budget": 24, **SHARED, "gate_share": 1.0},
                {"budget": BUDGET, **SHARED, "level": "pair_uniform"}]  # fmt: skip
    configs = [CompressionConfig("kvzip", **OPTIONS["kvzip"], **each) for each in settings]
    caches = asymkv.compress_many(model, None, ids, configs)
    for cache, each in zip(caches, settings, strict=True):
        assert_same_rows(read(model, ids, **each), cache)


def test_a_retained_cache_is_pruned_by_both(model, tmp_path):
    ids = prompt(LENGTH)
    retained = read(model, ids, ratio=1.0, retain=True, **SHARED)
    once = read(model, ids, ratio=0.3, **SHARED)
    assert_same_rows(once, retained.prune(ratio=0.3))
    retained.save(tmp_path / "cache")
    assert_same_rows(once, asymkv.CompressedCache.load(tmp_path / "cache", model).prune(ratio=0.3))


def test_echo_ranks_chunk_by_chunk(model):
    """Padded rows as alone, and other rows than without the gate."""
    settings = {"method": "echo", "chunk_size": 40, "budget": BUDGET}
    ids, mask, rows = left_padded([100, 73])
    cache, plain = read(model, ids, mask, **settings, **SHARED), read(model, ids, mask, **settings)
    kept = [[[p.tolist() for p in x.positions(layer)[0]] for layer in range(2)] for x in (cache, plain)]
    assert kept[0] != kept[1]
    for row, own in enumerate(rows):
        assert_same_rows(read(model, own, **settings, **SHARED), cache, row_b=row)


@pytest.mark.parametrize("method", ["kvzip", "echo"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_prefix_that_is_not_kept_goes_first_whatever_the_gate_says(model, method, share):
    ids, settings = prompt(LENGTH), {"prefix": 30, "keep_prefix": False, "ratio": 0.6, "sink_size": 2}
    cache = read(model, ids, method=method, window_size=0, layer_budgets="global", **settings,
                 **{**SHARED, "gate_share": share})  # fmt: skip
    kept = [p.tolist() for layer in range(2) for p in cache.positions(layer)[0]]
    assert not [p for rows in kept for p in rows if 2 <= p < 30]


@pytest.mark.parametrize(("settings", "message"), [
    ({"gate_share": 1.5}, "gate_share must be a number from 0 to 1; found 1.5"),
    ({"gate_share": True}, "gate_share must be a number from 0 to 1; found True"),
    ({"gate_file": GATES}, "says nothing with gate_share=0"),
    ({"gate_share": 0.5, "gate_file": 3}, "gate_file must be the path of a gate or None; found 3"),
    ({"gate_share": 0.5, "dimensions": {"kind": "zack", "ratio": 0.5}}, "dimensions must be None"),
    ({"method": "echo", "gate_share": 0.5, "action": "both"}, "dropped by attention; found .*action='both'"),
    ({"method": "echo", "gate_share": 0.5, "currency": "output_error"}, "currency='output_error'"),
])  # fmt: skip
def test_bad_settings_say_what_to_change(settings, message):
    with pytest.raises(ValueError, match=message):
        CompressionConfig(**{"method": "kvzip", **OPTIONS["kvzip"], **settings})


def test_a_missing_gate_is_named_before_anything_is_stored(model, tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.safetensors does not exist"):
        read(model, prompt(60), ratio=0.5, gate_share=0.5, gate_file=tmp_path / "nothing.safetensors")
