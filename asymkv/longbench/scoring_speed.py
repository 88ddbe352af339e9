"""How long scoring takes: synthetic predictions of LongBench's lengths through every metric and the whole set."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from asymkv.longbench import metrics
from asymkv.longbench.data import LONGBENCH_TASKS

Sample = tuple[str, list[str], list[str] | None]
Result = dict[str, Any]

# Words of a prediction and of its gold answer, as long as the tasks' answer lengths and gold answers are.
LENGTHS = {"qa": (12, 6), "summary": (350, 280), "dialogue": (40, 20), "zh": (60, 40), "zh_summary": (220, 150)}
CLASSES = [f"Class of {word}" for word in ("food", "date", "city", "person", "number", "animal", "reason", "colour")]
WORDS_PER_SENTENCE = 18


class Samples:
    """Predictions and answers that share words, as a model's answers do; the same for the same seed."""

    def __init__(self, seed: int = 0) -> None:
        from pydoc_data.topics import topics

        self.random = random.Random(seed)
        # As often as prose has them: common words make common subsequences.
        self.words = re.findall("[A-Za-z]{2,}", " ".join(topics.values()))
        self._chinese: list[str] = []

    @property
    def chinese(self) -> list[str]:
        """Words of jieba's dictionary, as often as it counts them."""
        if not self._chinese:
            import jieba

            jieba.initialize()
            counts = jieba.dt.FREQ
            known = sorted(word for word in counts if counts[word] and not word.isascii())
            self._chinese = self.random.choices(known, [counts[word] for word in known], k=50_000)
        return self._chinese

    def _text(
        self, words: Sequence[str], count: int, pool: Sequence[str], stop: str, space: str
    ) -> tuple[str, list[str]]:
        """``count`` words in sentences, three of ten from ``pool``, and the words."""
        drawn = [self.random.choice(pool if pool and self.random.random() < 0.3 else words) for _ in range(count)]
        sentences = [space.join(drawn[i : i + WORDS_PER_SENTENCE]) for i in range(0, count, WORDS_PER_SENTENCE)]
        return (stop + space).join(sentences) + stop * (len(sentences) > 1), drawn

    def texts(self, kind: str) -> Sample:
        """A prediction and one answer in English or (``zh...``) Chinese."""
        said, wanted = LENGTHS[kind]
        chinese = kind.startswith("zh")
        words, space, stop = (self.chinese, "", "\u3002") if chinese else (self.words, " ", ".")
        gold, drawn = self._text(words, wanted, (), stop, space)
        return self._text(words, said, drawn, stop, space)[0], [gold], None

    def labels(self) -> Sample:
        """A named class, with words around it and another class one time in four."""
        right, other = self.random.sample(CLASSES, 2)
        return f"{right}, not {other}" if self.random.random() < 0.25 else right, [right], CLASSES

    def numbers(self, word: str) -> Sample:
        """A numbered paragraph among other numbers."""
        number = self.random.randint(1, 30)
        return f"{word}{self.random.randint(1, 30)}, {word}{number}", [f"{word}{number}"], None

    def code(self) -> Sample:
        """A line of code and one that differs in a few names, a comment before it."""
        names = self.random.sample(self.words, 8)
        line = f"    {names[0]} = self.{names[1]}({names[2]}, {names[3]}={names[4]}[{self.random.randint(0, 9)}])"
        return f"# {names[5]}\n{line.replace(names[2], names[6])}\n    return {names[7]}", [line], None


def makers(samples: Samples) -> dict[str, Callable[[], Sample]]:
    """What a metric's predictions look like, by the metric's name; ``rouge_score`` gets long summaries."""
    return {
        "qa_f1_score": lambda: samples.texts("qa"),
        "qa_f1_zh_score": lambda: samples.texts("zh"),
        "rouge_score": lambda: samples.texts("summary"),
        "rouge_zh_score": lambda: samples.texts("zh_summary"),
        "rouge_l_reference": lambda: samples.texts("summary"),
        "classification_score": samples.labels,
        "retrieval_score": lambda: samples.numbers("Paragraph "),
        "retrieval_zh_score": lambda: samples.numbers(metrics.PARAGRAPH_ZH),
        "count_score": lambda: samples.numbers(""),
        "code_sim_score": samples.code,
    }


def time_metric(name: str, count: int, seed: int = 0) -> Result:
    """Scores ``count`` predictions by one metric.

    Returns:
        ``seconds``, ``cpu_seconds``, ``predictions``, ``mean_score`` (which shows that there was something to find).
    """
    make = makers(Samples(seed))[name]
    samples = [make() for _ in range(count)]
    metric = getattr(metrics, name)
    metric(*_first(samples[0]), all_classes=samples[0][2])  # dictionaries are loaded once
    watch = _Stopwatch()
    scores = [metric(*_first(sample), all_classes=sample[2]) for sample in samples]
    times = watch.result()
    return {"what": name, "predictions": count, **times, "mean_score": sum(scores) / count}


class _Stopwatch:
    """Wall and processor time; on a shared machine only the latter belongs to the work."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def result(self) -> Result:
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}


def _first(sample: Sample) -> tuple[str, str]:
    return sample[0], sample[1][0]


def time_longbench(count: int, seed: int = 0) -> Result:
    """Scores ``count`` predictions in all, spread evenly over LongBench's 21 tasks, as ``score_dataset`` does."""
    samples = Samples(seed)
    by_metric = makers(samples)
    tables = {}
    for number, task in enumerate(LONGBENCH_TASKS):
        make = by_metric[metrics.metric_for(task).__name__]
        make = (lambda: samples.texts("dialogue")) if task == "samsum" else make
        rows = count // len(LONGBENCH_TASKS) + (number < count % len(LONGBENCH_TASKS))
        tables[task] = [make() for _ in range(rows)]
    watch = _Stopwatch()
    scores = [
        metrics.score_dataset(task, [row[0] for row in rows], [row[1] for row in rows], rows[-1][2])
        for task, rows in tables.items()
        if rows
    ]
    times = watch.result()
    mean = sum(scores) / len(scores) / 100
    return {"what": "all 21 tasks together", "predictions": count, **times, "mean_score": mean}


def compare_with_packages(count: int, seed: int = 0) -> list[Result]:
    """Seconds of the packages that LongBench's scores come from, on the same predictions, and the largest difference.

    Args:
        count: predictions of each metric; the packages are slow.
        seed: of the predictions.
    """
    from rouge import Rouge
    from rouge_score.rouge_scorer import RougeScorer

    reference, rouge = RougeScorer(["rougeL"], use_stemmer=False), Rouge()
    packages: dict[str, Callable[[str, str], float]] = {
        "rouge_score": lambda said, gold: rouge.get_scores([said], [gold], avg=True)["rouge-l"]["f"],
        "rouge_l_reference": lambda said, gold: reference.score(gold, said)["rougeL"].fmeasure,
    }
    found: list[Result] = []
    for name, package in packages.items():
        make = makers(Samples(seed))[name]
        pairs = [_first(make()) for _ in range(count)]
        watch = _Stopwatch()
        theirs = [package(*pair) for pair in pairs]
        times = watch.result()
        worst = max(abs(getattr(metrics, name)(*pair) - score) for pair, score in zip(pairs, theirs, strict=True))
        found.append({"what": f"{name} by its package", "predictions": count, **times,
                      "mean_score": sum(theirs) / count, "largest_difference": worst})  # fmt: skip
    return found
