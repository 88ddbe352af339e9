"""Rotary embeddings whose frequencies follow the length: per row of the batch, and without a trace on the model."""

import pytest
import torch
from tiny_models import HEAD_SCORES, assert_close, left_padded, prompt, tiny_model

import asymkv

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
