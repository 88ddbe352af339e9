"""DuoAttention: retrieval heads whole, streaming heads with sinks and the newest rows."""

import pytest
import torch
from tiny_models import HEAD_SCORES, assert_close, prompt, tiny_model

import asymkv
from asymkv import CompressionConfig, head_scores


def read(length=200, **settings):
    settings = {"head_scores": HEAD_SCORES, "window_size": 8, "chunk_size": 64, **settings}
    model = tiny_model()
    with asymkv.replace("llama", method="duo_attention", **settings):
        return model(prompt(length))


def test_every_head_whole_is_the_full_cache():
    ref = tiny_model()(prompt(200)).logits
    assert_close("logits", ref, read(sparsity=0.0, recent_size=8).logits, 1e-5)


@pytest.mark.parametrize(("sparsity", "whole"), [(0.25, 3), (0.5, 2), (0.75, 1), (1.0, 0)])
def test_sparsity_is_the_share_of_streaming_heads(sparsity, whole):
    cache = read(sparsity=sparsity, sink_size=6, recent_size=20).past_key_values
    held = [n for i in range(2) for n in cache.num_rows(i)[0].tolist()]
    assert sorted(held) == [26] * (4 - whole) + [200] * whole
    assert cache.positions(0)[0][0].tolist() == [*range(6), *range(180, 200)]


def test_rows_follow_the_budget():
    cache = read(ratio=0.4).past_key_values
    assert [cache.num_rows(i)[0].tolist() for i in range(2)] == [[40, 40], [200, 40]]


def test_pattern_folder(tmp_path):
    head_scores.write_pattern(tmp_path, torch.tensor([[1.0, 0.0], [0.1, 0.2]]), sink_size=64, recent_size=256)
    cache = read(head_scores=str(tmp_path), ratio=0.4).past_key_values
    assert [cache.num_rows(i)[0].tolist() for i in range(2)] == [[200, 40], [40, 40]]


def test_bad_options():
    with pytest.raises(ValueError, match="sparsity must be a number from 0 to 1; found 2"):
        CompressionConfig("duo_attention", sparsity=2)
    with pytest.raises(ValueError, match="recent .*needs share"):
        CompressionConfig("duo_attention", recent_size=256)
