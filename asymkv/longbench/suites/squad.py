"""SQuAD 1.1 and 2.0: reading comprehension over one paragraph, with the official scores (arXiv 1606.05250,
1806.03822).

Rows come from the official files (``dev-v1.1.json``, ``dev-v2.0.json``) or from the hub's rows (validation split,
also as jsonl). The score is the mean F1; exact match stands beside it, for 2.0 also apart for questions with and
without an answer. Asked in a chat turn where the model has a chat template. A model says that there is no answer by
the word that the 2.0 prompt asks for; the official scorer is then given the empty answer. Only the first line of a
prediction counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from asymkv.longbench import metrics
from asymkv.longbench.data import Row, Task
from asymkv.longbench.jsonl import read_json, shown
from asymkv.longbench.suites.base import (
    Benchmark,
    Source,
    Suite,
    find_file,
    get,
    hub_records,
    percent,
    read_records,
    row,
)

TEMPLATE = (
    "Read the passage and answer the question with a few words of the passage and nothing else.{note}"
    "\n\nPassage: {context}\n\nQuestion: {input}\nAnswer:"
)
NO_ANSWER = "unanswerable"
NOTE = f" If the passage does not answer the question, write {NO_ANSWER}."
MAX_NEW_TOKENS = 32
HUB = {"squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2"}
FILES = {
    "squad": ("dev-v1.1.json", "squad.json", "squad.jsonl", "train-v1.1.json"),
    "squad_v2": ("dev-v2.0.json", "squad_v2.json", "squad_v2.jsonl", "train-v2.0.json"),
}


def load(dataset: str, source: Source) -> list[Row]:
    """Rows of ``squad`` or ``squad_v2``.

    Raises:
        ValueError: for a record without a field, of another type, or without an answer that 1.1 must have.
    """
    if source.data_dir is None:
        found = hub_records(HUB[dataset], None, "validation", FILES[dataset])
        return [_hub_row(dataset, where, record) for where, record in found]
    path = find_file(source.data_dir, FILES[dataset])
    if path.suffix == ".jsonl":
        return [_hub_row(dataset, where, record) for where, record in read_records(path)]
    return _official_rows(dataset, path)


def _official_rows(dataset: str, path: Path) -> list[Row]:
    table = read_json(path)
    if not isinstance(table, dict):
        raise ValueError(f"{path} must be SQuAD's object with a field 'data', found {type(table).__name__}")
    rows = []
    for a, article in enumerate(get(table, "data", str(path), list)):
        for p, paragraph in enumerate(get(article, "paragraphs", f"{path}, article {a}", list)):
            here = f"{path}, article {a}, paragraph {p}"
            context = get(paragraph, "context", here)
            for q, question in enumerate(get(paragraph, "qas", here, list)):
                where = f"{here}, question {q}"
                answers = [get(entry, "text", where) for entry in get(question, "answers", where, list)]
                impossible = bool(question.get("is_impossible", False))
                rows.append(_row(dataset, where, question, context, answers, impossible))
    return rows


def _hub_row(dataset: str, where: str, record: Row) -> Row:
    texts = get(get(record, "answers", where, dict), "text", f"{where}, answers", (list, tuple))
    return _row(dataset, where, record, get(record, "context", where), list(texts), not texts)


def _row(dataset: str, where: str, record: Row, context: str, answers: list[str], impossible: bool) -> Row:
    if dataset == "squad" and (impossible or not answers):
        raise ValueError(f"{where}: field 'answers' is empty; only squad_v2 has questions without an answer")
    if not impossible and not answers:
        raise ValueError(f"{where}: field 'answers' is empty, and 'is_impossible' does not say so")
    made = row(
        dataset, context, get(record, "question", where), [NO_ANSWER] if impossible else answers,
        note=NOTE if dataset == "squad_v2" else "", is_impossible=impossible,
    )  # fmt: skip
    return {**made, "_id": get(record, "id", where)}


def said(record: Row) -> str:
    """The first line of a prediction; empty where 2.0's prediction is that there is no answer."""
    text = record["pred"].strip().split("\n")[0]
    no_answer = record["dataset"] == "squad_v2" and metrics.words(text) == [NO_ANSWER]
    return "" if no_answer else text


def refuse(record: Row) -> str | None:
    """Why a record cannot be scored."""
    if not isinstance(record["is_impossible"], bool):
        return f"field 'is_impossible' must be true or false, found {shown(record['is_impossible'])}"
    return None


def _gold(record: Row) -> list[list[str]]:
    """Words of each reference; in 2.0, of those that have any, or the empty answer where there is none."""
    answers = [] if record["is_impossible"] else [metrics.words(answer) for answer in record["answers"]]
    return answers if record["dataset"] == "squad" else [words for words in answers if words] or [[]]


def exact_match(record: Row) -> float:
    """1 if the prediction equals a reference, case, punctuation, articles and spacing aside."""
    return float(metrics.words(said(record)) in _gold(record))


def f1(record: Row) -> float:
    """Best token F1 over the references; against an empty side 0, in 2.0 1 if both are empty."""
    words, both_empty = metrics.words(said(record)), float(record["dataset"] != "squad")
    return max(
        metrics.token_f1(words, gold) if words and gold else both_empty * (words == gold) for gold in _gold(record)
    )


def details(records: Sequence[Row]) -> dict[str, float]:
    """Exact match, and for 2.0 both scores of the questions with and without an answer."""
    scores = {"exact_match": percent([exact_match(record) for record in records])}
    if any(record["is_impossible"] for record in records):
        for name, impossible in (("answerable", False), ("unanswerable", True)):
            group = [record for record in records if record["is_impossible"] == impossible]
            if group:
                scores[f"{name} f1"] = percent([f1(record) for record in group])
                scores[f"{name} exact_match"] = percent([exact_match(record) for record in group])
    return scores


def _benchmark(dataset: str) -> Benchmark:
    task = Task(dataset, TEMPLATE, MAX_NEW_TOKENS, record_fields=("is_impossible",))
    return Benchmark(task, partial(load, dataset), f1, details, ("is_impossible",), refuse)


SUITE = Suite("squad", (_benchmark("squad"), _benchmark("squad_v2")), apart=frozenset({"squad_v2"}))
