"""Scores that are made over heads or chunks: rows are matched by position, and budgets are met in every turn."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import assert_same_rows, left_padded, prompt, tiny_model
from torch import Tensor

import asymkv
from asymkv.methods.expected_attention import ExpectedAttention
from asymkv.methods.tova import mean_over_heads


def test_whole_chunks_take_the_ratio_of_the_prompt_once():
    """A second turn is brought to the ratio of both turns' tokens, not to the ratio of what the first had left."""
    model = tiny_model()
    settings = {"ratio": 0.5, "window_size": 8, "chunk_length": 10, "whole_chunks": True}
    with asymkv.replace("llama", model=model, method="chunkkv", **settings):
        cache = model(prompt(200)).past_key_values
        assert cache.num_rows(0).tolist() == [[100, 100]]
        model(prompt(60, seed=2), past_key_values=cache)
    assert cache.num_rows(0).tolist() == [[130, 130]]  # of 260 tokens; 160 rows are 16 chunks


def test_negative_scores_of_chunks_do_not_depend_on_the_batch():
    model = tiny_model(dtype=torch.float64)
    with asymkv.replace("llama", model=model, method="chunkkv", scorer="knorm", window_size=8, ratio=0.4):
        for length in range(80, 130, 7):
            ids, mask, alone = left_padded([170, length], seed=length)
            batch = model(ids, attention_mask=mask).past_key_values
            assert_same_rows(model(alone[1]).past_key_values, batch, row_b=1)


@pytest.mark.parametrize("split", [{"head_budgets": "adaptive"}, {"layer_budgets": "global"}], ids=str)
def test_chunks_are_the_same_in_all_heads(split):
    with pytest.raises(ValueError, match="the same chunks in all heads"):
        asymkv.CompressionConfig("chunkkv", **split)


def test_a_layer_mean_matches_rows_by_position():
    """Heads hold the positions 0, 2, 3 and 2, 3: the second row of the one is the first of the other."""
    positions = torch.tensor([[[0, 2, 3], [2, 3, 0]]])
    valid = torch.tensor([[[True, True, True], [True, True, False]]])
    view = SimpleNamespace(positions=positions, valid=valid, lengths=torch.tensor([[3, 2]]), tokens=torch.tensor([4]))
    mass = torch.tensor([[[0.5, 0.2, 0.3], [0.6, 0.4, 0.0]]])
    found: Tensor = mean_over_heads(mass, view)
    assert torch.allclose(found[0, 0], torch.tensor([0.25, 0.4, 0.35]))
    assert torch.allclose(found[0, 1, :2], torch.tensor([0.4, 0.35]))


@pytest.mark.parametrize("settings", [
    {"method": "expected_attention"}, {"method": "criticalkv", "scorer": "expected_attention"},
], ids=lambda s: s["method"])  # fmt: skip
def test_expected_attention_needs_positions_that_stay(settings):
    with pytest.raises(ValueError, match="position_policy must be 'original', found 'compact'"):
        asymkv.CompressionConfig(**settings, position_policy="compact")


@pytest.mark.parametrize("method", ["headkv", "uncomp"])
def test_a_ratio_of_a_prompt_that_is_all_window(method):
    model = tiny_model()
    scores = [[0.1, 0.2], [0.9, 0.3]]
    settings = {"ratio": 0.5, "window_size": 64, "head_scores": scores}
    message = "window_size=64 is not shorter than the prompt of 50"
    with asymkv.replace("llama", model=model, method=method, **settings), pytest.raises(ValueError, match=message):
        model(prompt(50))


def test_worked_example_of_expected_attention(monkeypatch):
    """Queries of mean 1 and variance 4, keys 0, 1, 2 of one dimension: logits 0, 3, 10."""
    mean, covariance = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1, 1), 4.0)
    monkeypatch.setattr(ExpectedAttention, "_query_statistics", lambda self, view: (mean, covariance))
    view = SimpleNamespace(
        keys=torch.tensor([0.0, 1, 2]).view(1, 1, 3, 1), values=torch.tensor([2.0, 1, 1]).view(1, 1, 3, 1), scale=1.0,
        positions=torch.arange(3).view(1, 1, 3), bias=lambda: torch.zeros(1, 1, 3),
    )  # fmt: skip
    share = torch.tensor([0.0, 3, 10]).softmax(0)
    assert torch.allclose(ExpectedAttention(use_vnorm=False).score(view)[0, 0], share)
    assert torch.allclose(ExpectedAttention(epsilon=0.5).score(view)[0, 0], (share + 0.5) * torch.tensor([2.0, 1, 1]))
    flat = ExpectedAttention(use_covariance=False, use_vnorm=False).score(view)[0, 0]
    assert torch.allclose(flat, torch.tensor([0.0, 1, 2]).softmax(0))
