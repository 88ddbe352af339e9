"""What a row of a LongBench file must hold, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from asymkv.longbench import metrics
from asymkv.longbench.files import sha256
from asymkv.longbench.jsonl import check_fields, check_kinds, numbered_objects

Row = dict[str, Any]

REQUIRED_FIELDS = ("input", "context", "answers")
# Their metric looks for the names of the classes in the answer.
CLASSIFIED_TASKS = frozenset({"trec", "lsht"})
E_SUFFIX = "_e"
FIELD_KINDS: dict[str, type] = {
    "input": str, "context": str, "_id": str, "dataset": str, "language": str, "answers": list, "all_classes": list,
    "length": int,
}  # fmt: skip


def parse_rows(data: bytes, source: str, dataset: str) -> list[Row]:
    """Reads and checks the rows of one file.

    Args:
        data: the file's content, one JSON object a line.
        source: its name, for errors.
        dataset: the task; some need more fields than others.

    Raises:
        ValueError: names file, line and field of what is missing, of the wrong type, or an ``_id`` of two rows.
    """
    placed = list(numbered_objects(data, source))
    for place, row in placed:
        check_row(dataset, row, place)
    check_ids(placed)
    if not placed:
        raise ValueError(f"{source} holds no rows")
    return [row for _, row in placed]


def check_row(dataset: str, row: Row, place: str) -> None:
    """Checks one row's fields; errors begin with ``place``."""
    check_fields(row, place, f"a row of {dataset}", required_fields(dataset, REQUIRED_FIELDS))
    check_kinds(row, place, FIELD_KINDS)
    check_answers(dataset, row["answers"], place)
    check_scored(dataset, row, place)
    _check_text(row, place)


def check_scored(dataset: str, row: Row, place: str) -> None:
    """Checks the values that scores are sorted or looked up by: the length, and the classes where the task has some."""
    if type(row.get("length")) is int and row["length"] < 0:
        raise ValueError(f"{place}: field 'length' must not be below 0, found {row['length']}")
    if dataset.removesuffix(E_SUFFIX) in CLASSIFIED_TASKS and not row["all_classes"]:
        raise ValueError(f"{place}: field 'all_classes' must name the classes of {dataset}, found []")


def _check_text(row: Row, place: str) -> None:
    """Refuses text that no UTF-8 file can hold: half of a surrogate pair, which JSON can spell."""
    for name, value in row.items():
        for text in value if isinstance(value, list) else [value]:
            try:
                (text if isinstance(text, str) else "").encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{place}: field {name!r} holds half of a surrogate pair at character {error.start}"
                ) from None


def required_fields(dataset: str, always: tuple[str, ...]) -> tuple[str, ...]:
    """Fields that a task's rows must have: length buckets need a length, classification tasks their classes."""
    extra: tuple[str, ...] = ("length",) if dataset.endswith(E_SUFFIX) else ()
    return always + extra + (("all_classes",) if dataset.removesuffix(E_SUFFIX) in CLASSIFIED_TASKS else ())


def check_answers(dataset: str, answers: Iterable[str], place: str) -> None:
    """Raises ValueError for a gold answer that the task's metric cannot read."""
    metric = metrics.DATASET_METRICS.get(dataset.removesuffix(E_SUFFIX))
    if metric not in (metrics.retrieval_score, metrics.retrieval_zh_score):
        return
    for answer in answers:
        try:
            metric("", answer)
        except ValueError as error:
            raise ValueError(f"{place}: field 'answers': {error}") from error


def check_ids(placed: Iterable[tuple[str, Row]]) -> None:
    """Refuses an ``_id`` that names two different rows.

    LongBench has rows that occur twice, with one id and one content; these are scored twice, as LongBench does.
    """
    first: dict[str, tuple[str, str]] = {}
    for place, row in placed:
        if row.get("_id"):
            content = sha256(f"{row['input']}\0{row['context']}".encode())
            other, known = first.setdefault(row["_id"], (place, content))
            if known != content:
                raise ValueError(
                    f"{place}: field '_id' repeats {row['_id']!r} of {other}, with another input or context"
                )
