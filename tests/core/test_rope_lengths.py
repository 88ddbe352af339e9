"""Rotary embeddings whose frequencies follow the length: per row of the batch, and without a trace on the model."""

import pytest
import torch
from tiny_models import HEAD_SCORES, OPTIONS, assert_close, assert_same_rows, left_padded, prompt, tiny_model

import asymkv
from asymkv import CompressedCache
from asymkv.branches import prefill_many

ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    "longrope": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 8,
                 "long_factor": [2.0] * 8, "original_max_position_embeddings": 64},
}  # fmt: skip
TURNING = {
    "compact positions": {"method": "full", "position_policy": "compact"},
    "streaming_llm": {"method": "streaming_llm"},
    "asymkv": {"method": "asymkv"},
    "expected_attention": {"method": "expected_attention"},
    "kvmerger": {"method": "kvmerger"},
    "razor": {"method": "razor", "head_scores": HEAD_SCORES, "mean_after_rope": False},
}


def fresh(rope: str) -> torch.nn.Module:
    return tiny_model(dtype=torch.float64, rope_parameters=ROPES[rope], max_position_embeddings=64)


def test_a_long_prompt_leaves_no_trace_on_the_stock_path():
    """transformers overwrites longrope's frequencies in place."""
    model, short = fresh("longrope"), prompt(40)
    before = model(short, use_cache=False).logits
    with asymkv.replace("llama", model=model, method="full"):
        model(prompt(130))
        assert torch.equal(model(short).logits, before)
        assert torch.equal(model(short, use_cache=False).logits, before)
    assert torch.equal(model(short, use_cache=False).logits, before)


@pytest.mark.parametrize("method", TURNING)
@pytest.mark.parametrize("rope", ROPES)
def test_a_row_turns_by_its_own_length(rope, method):
    """Prompts on both sides of the trained window, and compactions in decode, which turn stored rows."""
    settings = dict(TURNING[method])
    if settings["method"] != "full":
        settings |= {"budget": 16, "sink_size": 2, "window_size": 4, "decode_interval": 4}
    ids, mask, alone = left_padded([30, 100])
    more = prompt(9, batch=2, seed=7)

    def run(ids, mask, more):
        model = fresh(rope)
        with asymkv.replace("llama", model=model, **settings), torch.no_grad():
            out = model(ids, attention_mask=mask)
            for t in range(more.shape[1]):
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                out = model(more[:, t : t + 1], attention_mask=mask, past_key_values=out.past_key_values)
        return out.logits[:, -1], out.past_key_values

    together, cache = run(ids, mask, more)
    for row, own in enumerate(alone):
        logits, single = run(own, torch.ones_like(own), more[row : row + 1])
        assert_close("logits", logits[0], together[row], 1e-12)
        for layer in range(2):
            for a, b in zip(single.keys(layer)[0], cache.keys(layer)[row], strict=True):
                assert_close("keys", a, b, 1e-12)


@pytest.mark.parametrize("rope", ROPES)
def test_a_replay_leaves_the_rows_their_own_frequencies(rope):
    """Stored keys turn to compact positions by the frequencies that they were made with, not the replay's."""
    settings = {"position_policy": "compact", "budget": 40, "window_size": 4, **OPTIONS["kvzip"], "replay_chunk": 40}
    ids, mask, alone = left_padded([100, 190])
    model = fresh(rope)
    with asymkv.replace("llama", model=model, method="kvzip", **settings):
        together = model(ids, attention_mask=mask).past_key_values
        single = [model(own).past_key_values for own in alone]
    for row, own in enumerate(alone):
        with asymkv.replace("llama", model=model, method="full"):
            whole = model(own).past_key_values
        for cache, at in ((together, row), (single[row], 0)):
            for positions, keys, every in zip(
                cache.positions(0)[at], cache.keys(0)[at], whole.keys(0)[0], strict=True
            ):
                moved = torch.arange(len(positions)) - positions
                assert_close("keys", whole.rope.rotate(every[positions][None], moved[None])[0], keys, 1e-6)


@pytest.mark.parametrize("rope", ROPES)
def test_frequencies_belong_to_one_cache_and_follow_its_rows(rope, tmp_path):
    settings = {"position_policy": "compact", "ratio": 1.0, "retain": True, **OPTIONS["kvzip"]}
    ids, mask, _ = left_padded([30, 100, 190])
    model = fresh(rope)
    with asymkv.replace("llama", model=model, method="kvzip", **settings):
        cache = model(ids, attention_mask=mask).past_key_values
        ref = cache.prune(ratio=0.5)
        for rows in ([2, 0, 1], [1], [0, 0, 2, 1]):
            fork = cache.fork()
            fork.batch_select_indices(torch.tensor(rows))
            pruned = fork.prune(ratio=0.5)
            for row, source in enumerate(rows):
                assert_same_rows(ref, pruned, row_a=source, row_b=row)
        further = cache.fork()
        model(prompt(200, batch=3), past_key_values=further)  # a fork goes on, past other lengths
        assert_same_rows(ref, cache.prune(ratio=0.5), row_a=1, row_b=1)
        further.crop(-200)
        assert_same_rows(ref, further.prune(ratio=0.5), row_a=1, row_b=1)
        cache.save(tmp_path / "cache")
        assert_same_rows(ref, CompressedCache.load(tmp_path / "cache", fresh(rope)).prune(ratio=0.5), row_a=1, row_b=1)


@pytest.mark.parametrize("rope", ROPES)
def test_settings_that_share_a_prefill_turn_alike(rope):
    """Branches of one prefill merge keys as a prefill of their own would."""
    configs = [asymkv.CompressionConfig("asymkv", chunk_size="prompt", budget=n) for n in (60, 50)]
    model = fresh(rope)
    with asymkv.replace("llama", configs[0], model=model):
        caches, _ = prefill_many(model, configs, prompt(120))
    for config, cache in zip(configs, caches, strict=True):
        with asymkv.replace("llama", config, model=model):
            assert_same_rows(model(prompt(120)).past_key_values, cache)
