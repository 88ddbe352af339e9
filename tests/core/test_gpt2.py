"""GPT-2: learned positions end, and rows merge where they are."""

import pytest
import torch
from tiny_models import assert_close, left_padded, prompt, tiny_model

import asymkv
from asymkv.models import get_adapter


def test_rotation_turns_nothing():
    rope = asymkv.CompressedCache.for_model(asymkv.CompressionConfig(), tiny_model("gpt2")).rope
    x = torch.randn(1, 2, 5, 32)
    assert torch.equal(rope.rotate(x, torch.arange(5).expand(1, 2, -1) * 999), x)
    cos, sin = rope.tables(torch.arange(5)[None], torch.float32)
    assert (cos == 1).all() and (sin == 0).all() and cos.shape == (1, 5, 32)


def test_both_rope_modes_coincide():
    model, ids = tiny_model("gpt2"), prompt(120)
    logits = []
    for mode in ("post", "derotate"):
        settings = {"budget": 40, "pruning_interval": 16, "lookback_window": 8, "window_size": 4, "rope_mode": mode}
        with asymkv.replace("gpt2", model=model, method="aagc", **settings):
            logits.append(model(ids).logits)
    assert torch.equal(*logits)


def test_tokens_behind_the_last_position_are_named():
    """Ragged rows may not, padding may: columns past a row's own tokens have no position."""
    model = tiny_model("gpt2", max_position_embeddings=100)
    ids, mask, alone = left_padded([90, 20])
    with asymkv.replace("gpt2", model=model, method="h2o", budget=40, chunk_size=30, window_size=8):
        cache = model(ids, attention_mask=mask).past_key_values
        follow = torch.cat([mask, torch.tensor([[0] * 29 + [1], [1] * 30])], 1)
        model(prompt(30, batch=2), attention_mask=follow, past_key_values=cache)
        with pytest.raises(ValueError, match="100 learned positions; found a token at position 109"):
            model(prompt(110))


@pytest.mark.parametrize(("name", "value"), [("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False)])
def test_scales_of_the_config(name, value):
    model, ids = tiny_model("gpt2", **{name: value}), prompt(50)
    model.set_attn_implementation("eager")  # the fused one of transformers 5.0 does not ask the config
    with asymkv.replace("gpt2", model=model, method="full", chunk_size=20):
        patched = model(ids).logits
    assert_close("logits", model(ids).logits, patched, 1e-5)


def test_weights_are_shaped_as_in_other_families():
    model = tiny_model("gpt2")
    adapter, attention = get_adapter("gpt2"), model.transformer.h[1].attn
    x = torch.randn(3, 64)
    assert_close("output", adapter.output(attention, x), x @ adapter.output_weight(attention).T + attention.c_proj.bias,
                 1e-6)  # fmt: skip
    q, k, v = adapter.project(attention, x[None])
    mine = (x @ attention.c_attn.weight[:, 64:128] + attention.c_attn.bias[64:128]).view(3, 2, 32).transpose(0, 1)
    assert_close("keys", k[0], mine, 1e-6)


def test_a_decoder_with_an_encoder_is_named():
    with pytest.raises(ValueError, match="add_cross_attention=True cannot run"):
        get_adapter("gpt2").check(tiny_model("gpt2", add_cross_attention=True).config)
