"""Context retention on hand numbers, the bootstrap, and teacher forcing on stock and compressed caches."""

import math

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, prompt, tiny_model

import asymkv
from asymkv.longbench import retention
from asymkv.longbench.prompts import Prompt

COMPRESSING = {
    "streaming_llm": {"method": "streaming_llm"},
    "h2o": {"method": "h2o"},
    "asymkv-output": {"method": "asymkv", "curvature": "output"},
    "asymkv-loss": {"method": "asymkv", "curvature": "loss"},
    "asymkv-upstream": {"method": "asymkv", "upstream_compat": True, "sink_size": 4, "window_size": 0,
                        "position_policy": "original"},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def random_ids(count, seed=0):
    return prompt(count, seed=seed)[0].tolist()


def test_retention_is_1_like_full_and_0_like_nothing():
    assert retention.context_retention(none=4.0, method=2.0, full=2.0) == 1.0
    assert retention.context_retention(none=4.0, method=4.0, full=2.0) == 0.0
    assert retention.context_retention(none=4.0, method=2.5, full=2.0) == 0.75
    assert math.isnan(retention.context_retention(none=2.0, method=2.0, full=2.0))


def test_a_task_is_sum_over_sum_and_tasks_weigh_alike():
    # Task a: gains 1 and 0 of spans 1 and 3 = 1/4 (the mean of the rows' own R would be 1/2); task b: 1/2.
    groups = {
        "a": retention.retention_pairs(none=[2, 4], method=[1, 4], full=[1, 1]),
        "b": retention.retention_pairs(none=[3], method=[2], full=[1]),
    }
    found = retention.pooled_ratio(groups)
    assert found.by_task == {"a": 0.25, "b": 0.5}
    assert found.value == pytest.approx(0.375)
    assert found.rows == 3


def test_a_task_that_its_context_does_not_help_is_nan_and_left_out():
    groups = {"a": np.array([[1.0, 2.0]]), "useless": np.array([[0.5, -0.1]])}
    found = retention.pooled_ratio(groups)
    assert math.isnan(found.by_task["useless"])
    assert found.value == 0.5
    assert math.isnan(found.low) and math.isnan(found.high)  # one row a task says nothing about its spread
    assert math.isnan(retention.pooled_ratio({"useless": np.array([[0.5, -0.1]])}).value)
    many = {**groups, "useless": np.array([[0.5, -0.1]] * 3)}
    assert math.isnan(retention.pooled_ratio(many).low), "the rows of a task that is left out say nothing either"


def test_paired_difference_is_the_difference_of_retentions():
    none, full, method, reference = [4.0, 5.0], [2.0, 1.0], [2.5, 2.0], [3.0, 4.5]

    def value(pairs):
        return retention.pooled_ratio({"a": pairs}).value

    difference = value(retention.paired_pairs(none, reference, method, full))
    retentions = [value(retention.retention_pairs(none, losses, full)) for losses in (method, reference)]
    assert difference == pytest.approx(retentions[0] - retentions[1])


def test_bootstrap_is_deterministic_and_covers_the_value():
    rng = np.random.default_rng(3)
    groups = {task: np.stack([rng.normal(0.5, 0.3, 12), np.ones(12)], axis=1) for task in "abc"}
    first, second = retention.pooled_ratio(groups), retention.pooled_ratio(groups)
    assert (first.low, first.high) == (second.low, second.high)
    assert first.low < first.value < first.high
    assert (first.low, first.high) != (retention.pooled_ratio(groups, seed=1).low, first.high)
    # The interval of a mean of 36 values with standard deviation 0.3: about 4 x 0.05 wide.
    assert 0.12 < first.high - first.low < 0.28


def test_kl_of_identical_logits_is_zero_and_of_two_coins_is_known():
    logits = torch.randn(130, 7, generator=torch.Generator().manual_seed(0))
    assert retention.kl_divergence(logits, logits) == 0.0
    fair, biased = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert retention.kl_divergence(fair, biased) == pytest.approx(expected, rel=1e-6)


def test_continuation_score_of_the_full_cache_against_itself():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    score = retention.continuation_score(logits, logits, [0, 3, 8, 1, 2])
    assert (score.kl, score.agreement) == (0.0, 1.0)
    assert score.nll == pytest.approx(float(torch.nn.functional.cross_entropy(logits, torch.tensor([0, 3, 8, 1, 2]))))


@pytest.mark.parametrize("num_targets", [1, 3, 6])
def test_continuation_on_a_stock_cache_equals_one_forward(model, num_targets):
    ids = random_ids(46)
    prefix = retention.compress(model, ids[:40])
    logits = retention.continuation_logits(model, prefix, ids[40:], num_targets)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1 - num_targets : -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert prefix.cache.get_seq_length() == 40


@pytest.mark.parametrize("protocol", retention.PROTOCOLS)
def test_both_protocols_have_one_full_loss_on_stock_and_full_cache(model, protocol):
    ids = random_ids(60)
    answer = ids[55:]
    first, rest = retention.split_prompt(Prompt(ids[:45], ids[45:55], ""), protocol)
    stock = retention.answer_nll(model, retention.compress(model, first), rest, answer)
    with asymkv.replace("llama", method="full", model=model):
        full = retention.answer_nll(model, retention.compress(model, first), rest, answer)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, 54:-1]
    expected = float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)))
    assert stock == pytest.approx(expected, abs=1e-5)
    assert full == pytest.approx(expected, abs=1e-5)


def test_unknown_protocol_lists_the_known():
    with pytest.raises(ValueError, match="prompt, context"):
        retention.split_prompt(Prompt([1], [2], ""), "question")


@pytest.mark.parametrize("name", COMPRESSING)
def test_the_gold_answer_takes_no_part_in_compression(model, name):
    """Logits before a changed token stay the same to the last bit, and the compressed rows stay where they are."""
    options = {"budget": 24, "window_size": 4, "chunk_size": 16, "decode_interval": 0, **COMPRESSING[name]}
    ids, answer = random_ids(80), random_ids(40, seed=1)
    changed = [*answer[:30], (answer[30] + 1) % VOCAB, *answer[31:]]
    with asymkv.replace("llama", model=model, **options):
        prefix = retention.compress(model, ids)
        rows = prefix.cache.num_rows(0).clone()
        logits = [retention.continuation_logits(model, prefix, x, len(x)) for x in (answer, changed)]
        assert int(rows.max()) < 80
        assert torch.equal(prefix.cache.num_rows(0), rows)
    assert torch.equal(logits[0][:31], logits[1][:31])
    assert not torch.equal(logits[0][31:], logits[1][31:])


def test_contains_answer_ignores_case_and_takes_any_reference():
    assert retention.contains_answer("The code is AB12.", ["zz", " ab12 "])
    assert not retention.contains_answer("The code is AB1.", ["ab12"])


def test_text_windows_are_spread_and_do_not_overlap():
    ids = list(range(100))
    windows = retention.text_windows(ids, prefix=20, targets=5, count=3)
    assert [first[0] for first, _ in windows] == [0, 37, 75]
    assert all(len(first) == 20 and rest == list(range(first[-1] + 1, first[-1] + 6)) for first, rest in windows)
    assert len(retention.text_windows(ids, prefix=40, targets=5, count=3)) == 2
    assert retention.text_windows(ids, prefix=99, targets=5, count=3) == []
