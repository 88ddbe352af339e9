"""LongBench v1's metrics, with LongBench's call signature and its values, the edge cases included.

Every metric is ``metric(prediction, ground_truth, **kwargs) -> float`` in [0, 1]. Only ``classification_score`` reads
a keyword (``all_classes``). The Chinese metrics and ``rouge_l_reference`` need ``pip install asymkv[eval]``; the others
need nothing.
"""

from __future__ import annotations

import difflib
import importlib
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from numbers import Real
from types import ModuleType
from typing import Any

import numpy as np

from asymkv.longbench import rouge_l
from asymkv.longbench.jsonl import shown

Metric = Callable[..., float]

# First and last code point of each run of characters that LongBench strips from Chinese answers.
_CHINESE_PUNCTUATION_RUNS = (
    (0x2013, 0x2014), (0x2018, 0x2019), (0x201B, 0x201F), (0x2026, 0x2027), (0x3001, 0x3003), (0x300B, 0x3011),
    (0x3014, 0x301F), (0x3030, 0x3030), (0x303E, 0x303F), (0xFE4F, 0xFE4F), (0xFF01, 0xFF0D), (0xFF0F, 0xFF0F),
    (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF64),
)  # fmt: skip
# The word for "paragraph" in passage_retrieval_zh's answers.
PARAGRAPH_ZH = "\u6bb5\u843d"
_PUNCTUATION = frozenset(string.punctuation)
PUNCTUATION_ZH = _PUNCTUATION.union(
    *({chr(code) for code in range(first, last + 1)} for first, last in _CHINESE_PUNCTUATION_RUNS)
)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"\d+")
_CODE_NOISE = ("`", "#", "//")
# LongBench-E's buckets by length in words: name and first length that no longer belongs.
LENGTH_BUCKETS = (("0-4k", 4000), ("4-8k", 8000), ("8k+", float("inf")))


def _optional(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"this metric needs the {package} package: pip install asymkv[eval]") from error


def token_f1(prediction: Sequence[str], truth: Sequence[str]) -> float:
    """F1 over the multisets of tokens; 0 where they share none, two empty sides included."""
    same = sum((Counter(prediction) & Counter(truth)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(prediction), same / len(truth)
    return 2 * precision * recall / (precision + recall)


def words(text: str) -> list[str]:
    """Lowercase words without punctuation and articles."""
    bare = "".join(char for char in text.lower() if char not in _PUNCTUATION)
    return _ARTICLES.sub(" ", bare).split()


@lru_cache(maxsize=64)
def _jieba_words(text: str) -> tuple[str, ...]:
    """Jieba's words; a prediction is cut once for all of its answers."""
    return tuple(_optional("jieba").cut(text, cut_all=False))


def _words_zh(text: str) -> list[str]:
    """Jieba's words, lowercase, without punctuation and white space; words of nothing else vanish."""
    words = (word.lower() for word in _jieba_words(text))
    bare = ("".join(char for char in word if char not in PUNCTUATION_ZH and not char.isspace()) for word in words)
    return [word for word in bare if word]


def qa_f1_score(prediction: str, ground_truth: str, **kwargs: Any) -> float:
    """Token F1 of two English answers."""
    return token_f1(words(prediction), words(ground_truth))


def qa_f1_zh_score(prediction: str, ground_truth: str, **kwargs: Any) -> float:
    """Token F1 of two Chinese answers, over jieba's words."""
    return token_f1(_words_zh(prediction), _words_zh(ground_truth))


def rouge_score(prediction: str, ground_truth: str, **kwargs: Any) -> float:
    """ROUGE-L F1 as the ``rouge`` package computes it.

    That package refuses a text without words ("" or "...") and recurses once a word, so that a very long sentence
    overflows the stack; LongBench scores whatever it fails on as 0.
    """
    return rouge_l.summary_f1(prediction, ground_truth)


def rouge_zh_score(prediction: str, ground_truth: str, **kwargs: Any) -> float:
    """ROUGE-L F1 over jieba's words."""
    return rouge_score(" ".join(_jieba_words(prediction)), " ".join(_jieba_words(ground_truth)))


def rouge_l_reference(prediction: str, ground_truth: str, **kwargs: Any) -> float:
    """ROUGE-L F1 of the ``rouge_score`` package, reported beside LongBench's; the two are not comparable."""
    cut = _optional("rouge_score.tokenize").tokenize
    said, wanted = cut(prediction, None), cut(ground_truth, None)
    same = rouge_l.lcs_length(wanted, said)
    if not same:
        return 0.0
    precision, recall = same / len(said), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def classification_score(prediction: str, ground_truth: str, **kwargs: Any) -> float:
    """One over the number of classes named, if the right one is among them.

    A named class that is part of the right one (``Food`` in ``Food and drink``) is not counted, but LongBench removes
    it from the list that it walks along and so skips the entry after each removal. The skip moves scores; it is kept.
    """
    named = [name for name in kwargs["all_classes"] if name in prediction]
    position = 0
    while position < len(named):
        if named[position] in ground_truth and named[position] != ground_truth:
            # list.remove takes the first equal entry, which is another one where all_classes repeats a name.
            named.remove(named[position])
        position += 1
    return 1.0 / len(named) if ground_truth in named else 0.0


def _share_of_numbers(prediction: str, wanted: str) -> float:
    """Share of the numbers in the prediction that are the wanted one, compared as text."""
    numbers = _NUMBER.findall(prediction)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def _paragraph_number(ground_truth: str, word: str) -> str:
    found = re.search(rf"{word}(\d+)", ground_truth)
    if found is None:
        raise ValueError(f"a retrieval answer must contain {word + 'N'!r}, got {ground_truth!r}")
    return found.group(1)


def retrieval_score(prediction: str, ground_truth: str, **kwargs: Any) -> float:
    """Share of the numbers in the prediction that are the N of ``Paragraph N``."""
    return _share_of_numbers(prediction, _paragraph_number(ground_truth, "Paragraph "))


def retrieval_zh_score(prediction: str, ground_truth: str, **kwargs: Any) -> float:
    """Share of the numbers in the prediction that are the N of the Chinese ``Paragraph N``."""
    return _share_of_numbers(prediction, _paragraph_number(ground_truth, PARAGRAPH_ZH))


def count_score(prediction: str, ground_truth: str, **kwargs: Any) -> float:
    """Share of the numbers in the prediction that equal the answer."""
    return _share_of_numbers(prediction, str(ground_truth))


def code_sim_score(prediction: str, ground_truth: str, **kwargs: Any) -> float:
    """Similarity of the first line of code to the answer, in whole percent.

    fuzzywuzzy's ``ratio`` in its difflib form, written out: with python-Levenshtein installed fuzzywuzzy computes
    something else, and a score must not depend on what else is installed.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in _CODE_NOISE)), "")
    if line == ground_truth:
        return 1.0
    if not line or not ground_truth:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, ground_truth).ratio()) / 100


def needle_score(prediction: str, ground_truth: str, **kwargs: Any) -> float:
    """1 if the planted fact occurs in the prediction (this package's own task, not LongBench's)."""
    return float(ground_truth in prediction)


DATASET_METRICS: Mapping[str, Metric] = {
    "narrativeqa": qa_f1_score,
    "qasper": qa_f1_score,
    "multifieldqa_en": qa_f1_score,
    "multifieldqa_zh": qa_f1_zh_score,
    "hotpotqa": qa_f1_score,
    "2wikimqa": qa_f1_score,
    "musique": qa_f1_score,
    "dureader": rouge_zh_score,
    "gov_report": rouge_score,
    "qmsum": rouge_score,
    "multi_news": rouge_score,
    "vcsum": rouge_zh_score,
    "trec": classification_score,
    "triviaqa": qa_f1_score,
    "samsum": rouge_score,
    "lsht": classification_score,
    "passage_retrieval_en": retrieval_score,
    "passage_count": count_score,
    "passage_retrieval_zh": retrieval_zh_score,
    "lcc": code_sim_score,
    "repobench-p": code_sim_score,
    "needle": needle_score,
    "passage_retrieval": retrieval_score,
    "code_completion": code_sim_score,
}
FIRST_LINE_TASKS = frozenset({"trec", "triviaqa", "samsum", "lsht"})


def metric_for(dataset: str) -> Metric:
    """Returns the metric of a dataset; a LongBench-E suffix ``_e`` is ignored."""
    metric = DATASET_METRICS.get(dataset.removesuffix("_e"))
    if metric is None:
        raise ValueError(f"no metric for dataset {dataset!r}; known: {', '.join(DATASET_METRICS)}")
    return metric


def score_sample(
    dataset: str,
    prediction: str,
    answers: Sequence[str],
    all_classes: Sequence[str] | None,
    metric: Metric | None = None,
) -> float:
    """Best score of one prediction over its reference answers, in [0, 1]; no answers score 0.

    Args:
        dataset: decides the metric and whether only the first line counts.
        prediction: the model's answer.
        answers: reference answers.
        all_classes: class names of a classification task, else None.
        metric: used in place of the dataset's own.

    Raises:
        ValueError: for a prediction, answers or classes of another kind; names what was found.
    """
    chosen = metric or metric_for(dataset)
    _check_classes(dataset, chosen, all_classes)
    _check_texts(dataset, chosen, prediction, answers)
    return _best(dataset, chosen, prediction, answers, all_classes)


def _best(
    dataset: str, chosen: Metric, prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None
) -> float:
    if dataset.removesuffix("_e") in FIRST_LINE_TASKS:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return max((chosen(prediction, answer, all_classes=all_classes) for answer in answers), default=0.0)


def score_dataset(
    dataset: str,
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    all_classes: Sequence[str] | None,
) -> float:
    """LongBench's score of one dataset: mean over samples times 100, two decimals.

    Args:
        dataset: task name.
        predictions: one per sample.
        answers: reference answers of each sample.
        all_classes: class names of a classification task, else None.

    Raises:
        ValueError: for columns that are no lists or of different lengths, and for an entry of another kind; names the
            row's index, the field and what was found.
    """
    chosen = _check_columns(dataset, predictions, answers, all_classes)
    total = 0.0
    for text, gold in zip(predictions, answers, strict=True):
        total += _best(dataset, chosen, text, gold, all_classes)
    return round(100 * total / len(predictions), 2)


def score_dataset_e(
    dataset: str,
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    all_classes: Sequence[str] | None,
    lengths: Sequence[int],
) -> dict[str, float]:
    """LongBench-E's scores: like :func:`score_dataset`, by length bucket; an empty bucket is NaN.

    Args:
        dataset: task name.
        predictions: one per sample.
        answers: reference answers of each sample.
        all_classes: class names of a classification task, else None.
        lengths: the samples' ``length`` fields (words).

    Raises:
        ValueError: as :func:`score_dataset`, and for a length that is no number of words.
    """
    chosen = _check_columns(dataset, predictions, answers, all_classes, lengths=lengths)
    for index, length in enumerate(lengths):
        if not isinstance(length, Real) or isinstance(length, bool) or not 0 <= length < math.inf:
            raise ValueError(f"{dataset}, row {index}: field 'length' must be a number >= 0, found {shown(length)}")
    buckets: dict[str, list[float]] = {name: [] for name, _ in LENGTH_BUCKETS}
    for text, gold, length in zip(predictions, answers, lengths, strict=True):
        name = next(name for name, end in LENGTH_BUCKETS if length < end)
        buckets[name].append(_best(dataset, chosen, text, gold, all_classes))
    # numpy's mean and rounding are LongBench's, and differ from the built-in ones in the last digit of rare cases.
    return {name: float(round(100 * np.mean(s), 2)) if s else float("nan") for name, s in buckets.items()}


def _is_list(value: Any) -> bool:
    """Whether a value is a column of entries, and no text, whose characters would pass for them."""
    return isinstance(value, Collection) and not isinstance(value, (str, bytes, Mapping))


def _check_columns(
    dataset: str,
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    all_classes: Sequence[str] | None,
    **more: Sequence[Any],
) -> Metric:
    """The dataset's metric, once it can read every row."""
    columns = {"predictions": predictions, "answers": answers, **more}
    for name, column in columns.items():
        if not _is_list(column):
            raise ValueError(f"{dataset}: {name} must be a list with one entry per sample, found {shown(column)}")
    sizes = {name: len(column) for name, column in columns.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"{dataset}: columns of different lengths: {sizes}")
    if 0 in sizes.values():
        raise ValueError(f"{dataset}: nothing to score")
    chosen = metric_for(dataset)
    _check_classes(dataset, chosen, all_classes)
    for index, (text, gold) in enumerate(zip(predictions, answers, strict=True)):
        _check_texts(f"{dataset}, row {index}", chosen, text, gold)
    return chosen


def _check_classes(dataset: str, chosen: Metric, all_classes: Any) -> None:
    """Classes that are looked for in an answer: a text's characters would be found in any."""
    good = _is_list(all_classes) and len(all_classes) > 0 and all(isinstance(name, str) for name in all_classes)
    if chosen is classification_score and not good:
        raise ValueError(f"{dataset}: all_classes must be the task's class names, at least one, found "
                         f"{shown(all_classes)}")  # fmt: skip


def _check_texts(place: str, chosen: Metric, prediction: Any, answers: Any) -> None:
    """One row's prediction and reference answers; errors begin with ``place``."""
    if not isinstance(prediction, str):
        raise ValueError(f"{place}: field 'prediction' must be a string, found {shown(prediction)}")
    # A count is compared as text, whatever it is given as.
    kinds = (str, int) if chosen is count_score else (str,)
    if not _is_list(answers) or not all(isinstance(answer, kinds) for answer in answers):
        raise ValueError(f"{place}: field 'answers' must be a list of strings, found {shown(answers)}")
