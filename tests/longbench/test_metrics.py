"""LongBench v1's metrics: values computed by hand, and the edges that must agree with LongBench's own scorer."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from asymkv.longbench import metrics

PARAGRAPH = metrics.PARAGRAPH_ZH
BEIJING, WEATHER, COLD = "\u5317\u4eac", "\u5929\u6c14", "\u5bd2\u51b7"


@pytest.mark.parametrize(
    ("prediction", "truth", "score"),
    [
        ("The cat sat.", "a cat sat", 1.0),
        ("cat cat", "cat", 2 / 3),
        ("the cat sat on the mat", "cat mat", 2 * 0.5 * 1 / 1.5),
        ("don't", "dont", 1.0),
        ("the", "the", 0.0),
        ("", "", 0.0),
        ("dog", "cat", 0.0),
    ],
)
def test_qa_f1_counts_shared_words_without_articles_and_punctuation(prediction: str, truth: str, score: float) -> None:
    assert metrics.qa_f1_score(prediction, truth) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "truth", "score"),
    [
        ("\u3002\uff0c", "\u3002", 0.0),
        (f"{BEIJING}\u3002 ABC", f"{BEIJING}abc", 1.0),
        (f"{BEIJING}{WEATHER}", BEIJING, 2 / 3),
    ],
)
def test_qa_f1_zh_counts_jieba_words_without_punctuation(prediction: str, truth: str, score: float) -> None:
    pytest.importorskip("jieba")
    assert metrics.qa_f1_zh_score(prediction, truth) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "truth", "score"),
    [
        ("the the the the", "the", 1.0),
        ("the cat sat", "the cat ran", 2 / 3),
        ("", "the cat", 0.0),
        ("...", "the cat", 0.0),
        ("the cat", "", 0.0),
    ],
)
def test_rouge_is_that_of_the_rouge_package(prediction: str, truth: str, score: float) -> None:
    pytest.importorskip("rouge")
    assert metrics.rouge_score(prediction, truth) == pytest.approx(score, abs=1e-6)


def test_rouge_scores_a_stack_overflow_as_zero() -> None:
    pytest.importorskip("rouge")
    endless = " ".join(f"w{i}" for i in range(sys.getrecursionlimit() + 10))
    assert metrics.rouge_score(endless, endless) == 0.0


def test_rouge_zh_splits_into_jieba_words() -> None:
    pytest.importorskip("jieba")
    pytest.importorskip("rouge")
    assert metrics.rouge_zh_score(f"{BEIJING}{WEATHER}", f"{BEIJING}{COLD}") == pytest.approx(0.5, abs=1e-6)


def test_the_rouge_score_package_gives_another_number() -> None:
    pytest.importorskip("rouge_score")
    assert metrics.rouge_l_reference("the the the the", "the") == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("prediction", "truth", "classes", "score"),
    [
        ("It is Food", "Food", ["Food", "Date"], 1.0),
        ("Food or Date", "Food", ["Food", "Date"], 0.5),
        ("Food and drink", "Food and drink", ["Food", "Food and drink"], 1.0),
        # A goes, AB is skipped by the walk, ABC goes: AB stays beside ABCD.
        ("ABCD", "ABCD", ["A", "AB", "ABC", "ABCD"], 0.5),
        ("Date", "Food", ["Food", "Date"], 0.0),
        ("", "Food", ["Food"], 0.0),
    ],
)
def test_classification_removes_parts_of_the_truth_while_walking_the_list(
    prediction: str, truth: str, classes: list[str], score: float
) -> None:
    assert metrics.classification_score(prediction, truth, all_classes=classes) == score


@pytest.mark.parametrize(
    ("metric", "prediction", "truth", "score"),
    [
        (metrics.retrieval_score, "Paragraph 12", "Paragraph 12", 1.0),
        (metrics.retrieval_score, "1 or 12", "Paragraph 12", 0.5),
        (metrics.retrieval_score, "none", "Paragraph 12", 0.0),
        (metrics.retrieval_score, "\u0661\u0662", "Paragraph 12", 0.0),
        (metrics.retrieval_zh_score, f"{PARAGRAPH}3", f"{PARAGRAPH}3", 1.0),
        (metrics.retrieval_zh_score, "3 4 5", f"{PARAGRAPH}3", 1 / 3),
        (metrics.count_score, "There are 7, maybe 8", "7", 0.5),
        (metrics.count_score, "07", "7", 0.0),
        (metrics.count_score, "\u0663 3", "3", 0.5),
        (metrics.count_score, "", "3", 0.0),
    ],
)
def test_number_metrics_give_the_share_of_right_numbers(metric, prediction: str, truth: str, score: float) -> None:
    assert metric(prediction, truth) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "truth", "score"),
    [
        ("", "", 1.0),
        ("", "x = 1", 0.0),
        ("# only a comment", "", 1.0),
        ("```python\nx = 1\n```", "x = 1", 1.0),
        ("\n\nx = 1\ny = 2", "x = 1", 1.0),
        ("// no\nx = 2", "x = 1", 0.8),
        # whole percent: 2 * 2 / 6 = 0.667
        ("abc", "abd", 0.67),
    ],
)
def test_code_similarity_takes_the_first_line_of_code_in_whole_percent(
    prediction: str, truth: str, score: float
) -> None:
    assert metrics.code_sim_score(prediction, truth) == score


def test_code_similarity_is_difflibs_and_not_levenshteins() -> None:
    # difflib's longest match, "bc", leaves nothing else to match; Levenshtein's ratio of this pair is 0.5.
    assert metrics.code_sim_score("abxcd", "cdxab") == 0.4


def test_first_line_tasks_score_only_the_first_line() -> None:
    assert metrics.score_dataset("trec", ["\nFood\nDate"], [["Food"]], ["Food", "Date"]) == 100.0
    assert metrics.score_dataset("qasper", ["no\nyes"], [["yes"]], None) == pytest.approx(66.67)


def test_dataset_score_is_the_mean_of_the_best_answer() -> None:
    predictions, answers = ["a cat", "dog", "bird"], [["fish", "cat"], ["cat"], ["bird", "x"]]
    assert metrics.score_dataset("hotpotqa", predictions, answers, None) == 66.67


def test_dataset_e_scores_by_length_and_an_empty_bucket_is_nan() -> None:
    scores = metrics.score_dataset_e("qasper", ["yes", "no", "yes"], [["yes"]] * 3, None, lengths=[3999, 4000, 7999])
    assert scores["0-4k"] == 100.0 and scores["4-8k"] == 50.0 and math.isnan(scores["8k+"])


def test_unknown_dataset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no metric for dataset 'tree'; known: .*trec"):
        metrics.score_dataset("tree", ["a"], [["a"]], None)


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="different lengths"):
        metrics.score_dataset("qasper", ["a", "b"], [["a"]], None)


@pytest.mark.parametrize(
    ("task", "predictions", "answers", "classes", "message"),
    [
        ("qasper", ["abc"], ["abc"], None, "qasper, row 0: field 'answers' must be a list of strings, found str 'abc'"),
        ("qasper", ["a", "b"], [["a"], [5]], None, r"qasper, row 1: field 'answers' must be .*, found list \[5\]"),
        ("qasper", ["a"], [None], None, "qasper, row 0: field 'answers' must be .*, found NoneType None"),
        ("qasper", ["a", None], [["a"]] * 2, None, "row 1: field 'prediction' must be a string, found NoneType None"),
        ("qasper", ["a"], [{"a": 1}], None, "row 0: field 'answers' must be a list of strings, found dict"),
        ("qasper", "abc", [["a"], ["b"], ["c"]], None, "qasper: predictions must be a list .*, found str 'abc'"),
        ("qasper", ["a"], "a", None, "qasper: answers must be a list with one entry per sample, found str 'a'"),
        ("qasper", None, [["a"]], None, "qasper: predictions must be a list .*, found NoneType None"),
        ("trec", ["Food"], [["Food"]], None, "trec: all_classes must be .* class names, .*, found NoneType None"),
        ("trec", ["Food"], [["Food"]], "Food", "trec: all_classes must be .* class names, .*, found str 'Food'"),
        ("lsht", ["Food"], [["Food"]], [], r"lsht: all_classes must be .* at least one, found list \[\]"),
    ],
)
def test_columns_that_cannot_be_scored_are_named_by_row_and_field(
    task: str, predictions: list, answers: list, classes: list | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.score_dataset(task, predictions, answers, classes)
    with pytest.raises(ValueError, match=message):
        metrics.score_dataset_e(task, predictions, answers, classes, [1] * len(answers))


@pytest.mark.parametrize("length", ["x", None, float("nan"), float("inf"), -1, True])
def test_a_length_that_is_no_number_of_words_is_named(length: object) -> None:
    with pytest.raises(ValueError, match="qasper_e, row 1: field 'length' must be a number >= 0, found"):
        metrics.score_dataset_e("qasper_e", ["a", "b"], [["a"], ["b"]], None, [10, length])


def test_a_single_sample_is_checked_too() -> None:
    with pytest.raises(ValueError, match="qasper: field 'answers' must be a list of strings, found str 'abc'"):
        metrics.score_sample("qasper", "abc", "abc", None)


def test_columns_may_be_arrays_and_tuples_and_counts_may_be_numbers() -> None:
    texts, gold = np.array(["a cat", "dog"]), (np.array(["fish", "cat"]), ("cat",))
    assert metrics.score_dataset("hotpotqa", texts, gold, None) == 50.0
    assert metrics.score_dataset_e("hotpotqa", texts, gold, None, np.array([10, 20]))["0-4k"] == 50.0
    assert metrics.score_dataset("passage_count", ["7"], [[7]], None) == 100.0
    assert metrics.score_dataset("qasper", ["a"], [[]], None) == 0.0  # no answers: LongBench's 0


def test_missing_package_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ImportError, match=r"pip install asymkv\[eval\]"):
        metrics.qa_f1_zh_score("a", "b")


def test_every_longbench_task_has_a_metric() -> None:
    from asymkv.longbench.data import LONGBENCH_E_TASKS, LONGBENCH_TASKS, embedded_tasks

    for name in [*LONGBENCH_TASKS, *(f"{task}_e" for task in LONGBENCH_E_TASKS), *embedded_tasks()]:
        assert callable(metrics.metric_for(name))
    assert len(LONGBENCH_TASKS) == 21 and len(LONGBENCH_E_TASKS) == 13
