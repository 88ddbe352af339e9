"""UNComp's entropies and groups, and the window scores that it shares with HeadKV."""

import math

import pytest
import torch
from tiny_models import HEAD_SCORES, assert_close, prompt, tiny_model

import asymkv
from asymkv import CompressionConfig
from asymkv.analysis.head_entropy import entropy_scores, matrix_entropy, spectrum_entropy
from asymkv.layer import CompressedLayer
from asymkv.rope import Rope


def test_entropy_of_a_spectrum():
    spectrum = torch.tensor([0.2, 0.7, 0.02, 0.08], dtype=torch.double)
    assert spectrum_entropy(spectrum).item() == pytest.approx(0.85186, abs=5e-6)
    assert spectrum_entropy(spectrum).item() / math.log(4) == pytest.approx(0.61449, abs=5e-6)
    assert spectrum_entropy(spectrum, 2).item() == pytest.approx(0.57156, abs=5e-6)
    assert spectrum_entropy(spectrum, 2).item() / math.log(4) == pytest.approx(0.41229, abs=5e-6)
    assert spectrum_entropy(spectrum).exp().item() == pytest.approx(2.344, abs=5e-4)


def test_entropy_of_rows_with_a_known_spectrum():
    """Rows along the axes, as many as the eigenvalues say, in both directions so that their mean is 0."""
    counts = torch.tensor([70, 20, 8, 2])
    rows = torch.eye(4, dtype=torch.double).repeat_interleave(counts, 0)
    assert matrix_entropy(torch.cat([rows, -rows]), None).item() == pytest.approx(0.61449, abs=1e-5)
    assert matrix_entropy(torch.cat([rows, -rows]), 2).item() == pytest.approx(0.41229, abs=1e-5)


def test_one_line_has_no_entropy_and_all_directions_alike_have_the_most():
    line = torch.linspace(-3, 4, 30)[:, None] * torch.tensor([[1.0, 2.0, -1.0, 0.5]])
    assert matrix_entropy(line, None).item() == pytest.approx(0, abs=1e-7)
    axes = torch.cat([torch.eye(8), -torch.eye(8)]) * 3
    assert matrix_entropy(axes, None).item() == pytest.approx(1, abs=1e-7)
    assert matrix_entropy(torch.ones(5, 4)).item() == pytest.approx(0, abs=1e-7)


def test_rotation_changes_nothing_and_scaling_of_rows_does():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50, 16, generator=generator, dtype=torch.double) * torch.linspace(0.1, 2, 16)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.double)).Q
    assert_close("rotated", matrix_entropy(x, 5), matrix_entropy(x @ turn, 5), 1e-10)
    scaled = x * torch.rand(3, 50, 1, generator=generator, dtype=torch.double)
    assert (matrix_entropy(x, 5) - matrix_entropy(scaled, 5)).abs().min() > 1e-5


def test_scores_of_a_model_are_means_over_groups_and_samples():
    model = tiny_model()
    seen = []
    with pytest.raises(ValueError, match="at least 2 tokens; found lengths .1."):
        entropy_scores(model, [prompt(1)[0]])
    samples = [prompt(60, seed=s)[0] for s in range(2)]
    both = entropy_scores(model, samples, top=6, progress=seen.append)
    alone = [entropy_scores(model, [s], top=6).table for s in samples]
    assert_close("mean", (alone[0] + alone[1]) / 2, both.table, 1e-12)
    assert seen == [0, 1, 0, 1] and both.measured["tokens"] == [60, 60]
    assert bool((both.table > 0).all() and (both.table <= 1).all())


def window_scores(view, window, kernel, pooling):
    """SnapKV's scores, the group reduced first."""
    options = {"window_size": window, "kernel_size": kernel, "pooling": pooling, "group_first": True}
    return asymkv.CompressionConfig("snapkv", sink_size=0, **options).options.score(view)


def view_of(keys, queries, tokens):
    """A layer of one group of two query heads; keys and queries are one-hot in 16 dimensions."""
    layer = CompressedLayer()
    layer.append(keys[None, None], torch.zeros_like(keys)[None, None])
    view = layer.view(Rope(tiny_model().model.rotary_emb), 1.0)
    view.queries = queries[None]
    view.query_positions = torch.arange(tokens - queries.shape[1], tokens)[None]
    return view


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_attention_on_one_row_selects_it_and_its_neighbours(pooling):
    keys = torch.zeros(30, 16)
    keys[11, 3] = 1
    queries = torch.zeros(2, 10, 16)
    queries[:, 6:, 3] = 50  # the last 4 queries look at row 11
    scores = window_scores(view_of(keys, queries, 30), 4, 5, pooling)[0, 0]
    best = scores.max().item()
    assert [i for i in range(30) if scores[i] > 0.9 * best] == [9, 10, 11, 12, 13]
    assert best == pytest.approx({"max": 1, "avg": 1 / 5}[pooling], rel=1e-4)  # the mean over 4 queries and 2 heads


def test_rows_of_the_window_count_as_nothing():
    keys = torch.zeros(30, 16)
    keys[28, 3] = 1
    queries = torch.zeros(2, 10, 16)
    queries[..., 3] = 50
    assert window_scores(view_of(keys, queries, 30), 2, 3, "max").max() < 1e-6


def test_groups_keep_two_thirds_and_four_thirds():
    model = tiny_model()
    with asymkv.replace("llama", method="uncomp", head_scores=HEAD_SCORES, budget=60):
        cache = model(prompt(200)).past_key_values
    assert [cache.num_rows(i)[0].tolist() for i in range(2)] == [[40, 80], [80, 40]]
    for at in cache.positions(0)[0]:
        assert at[:4].tolist() == [0, 1, 2, 3] and at[-8:].tolist() == list(range(192, 200))


def test_headkv_keeps_more_rows_where_the_score_is_higher():
    model = tiny_model()
    with asymkv.replace("llama", method="headkv", head_scores=HEAD_SCORES, budget=42):
        cache = model(prompt(300)).past_key_values
    # 30 rows beside sinks and window: 5 each, 100 by score of 1.5 in all.
    assert [cache.num_rows(i)[0].tolist() for i in range(2)] == [[24, 30], [77, 37]]


@pytest.mark.parametrize("method", ["uncomp", "headkv"])
@pytest.mark.parametrize(("options", "message"), [
    ({"kernel_size": 4}, "odd integer >= 1; found 4"),
    ({"pooling": "median"}, "pooling='median'; allowed: .'avg', 'max'"),
    ({"window_size": 0}, "window_size must be >= 1, found 0"),
    ({"chunk_size": 64}, "whole prompt at once"),
], ids=str)  # fmt: skip
def test_bad_options(method, options, message):
    with pytest.raises(ValueError, match=message):
        CompressionConfig(method, **options)
