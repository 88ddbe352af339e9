"""Scores a plain folder of ``<task>.jsonl``, as LongBench's own ``pred.py`` and other projects write them.

A line has ``pred``, ``answers``, ``all_classes`` and ``length``; one of a suite's dataset ``pred``, ``answers`` and
what its scores read, or these for each of its ``turns``. Nothing is known of how the answers came about, so there are
scores and no bytes, no retention and no conditions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asymkv.longbench import metrics, suites
from asymkv.longbench.data import ENGLISH_TASKS, Row
from asymkv.longbench.jsonl import check_fields, check_kinds, numbered_objects, shown
from asymkv.longbench.rows import E_SUFFIX, check_answers, check_scored, required_fields

PREDICTION_KINDS: dict[str, type] = {"pred": str, "answers": list, "all_classes": list, "length": int}


def plain_folders(folder: str | Path) -> list[Path]:
    """The folder, or those directly below it, that hold predictions and are no run of scripts/pred.py."""
    path = Path(folder)
    return [path] if _is_plain(path) else sorted(sub for sub in path.glob("*/") if _is_plain(sub))


def _is_plain(folder: Path) -> bool:
    return any(folder.glob("*.jsonl")) and not any(folder.glob("run*.json")) and not any(folder.glob("records-*.jsonl"))


def read_predictions(path: Path, *, by_length: bool = False) -> list[Row]:
    """Reads and checks the predictions of one task.

    Args:
        path: ``<task>.jsonl``.
        by_length: whether rows must tell their ``length``.

    Raises:
        ValueError: names file, line and field.
    """
    dataset = path.stem
    benchmark = suites.find(dataset)
    if benchmark is None:
        try:
            metrics.metric_for(dataset)
        except ValueError as error:
            raise ValueError(f"{path}: {error}, {', '.join(suites.names())}") from error
    needed = required_fields(dataset, ("length",) if by_length else ())
    scored = ("pred", "answers", *(benchmark.reads if benchmark else ()))
    rows = []
    for place, row in numbered_objects(path.read_bytes(), str(path)):
        check_fields(row, place, "a prediction", needed)
        check_scored(dataset, row, place)
        row = row if benchmark is None else {"dataset": dataset, **row}
        for where, part in check_kinds_of(row, place):
            check_fields(part, where, "a prediction", scored)
            check_answers(dataset, part["answers"], where)
            if benchmark is not None:
                benchmark.check(part, where)
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no predictions")
    return rows


def check_kinds_of(row: Row, place: str) -> list[tuple[str, Row]]:
    """Checks the kinds of a record's fields; returns its questions, each with its place: its turns, or itself."""
    if "turns" not in row:
        check_kinds(row, place, PREDICTION_KINDS)
        return [(place, row)]
    turns = row["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{place}: field 'turns' must be a list of objects, found {shown(turns)}")
    check_kinds({name: row.get(name) for name in ("all_classes", "length")}, place, PREDICTION_KINDS)
    placed = [(f"{place}, turn {number}", turn) for number, turn in enumerate(turns, start=1)]
    for where, turn in placed:
        check_kinds(turn, where, PREDICTION_KINDS)
    return placed


def score_rows(dataset: str, rows: Sequence[Row]) -> float:
    """The score of one task: its suite's, else LongBench's (the classes are the last row's, as in its scorer)."""
    benchmark = suites.find(dataset)
    if benchmark is not None:
        return benchmark.total(rows)
    return metrics.score_dataset(
        dataset, [row["pred"] for row in rows], [row["answers"] for row in rows], rows[-1].get("all_classes")
    )


def score_rows_e(dataset: str, rows: Sequence[Row]) -> dict[str, float]:
    """The scores of one task in LongBench-E's length buckets; an empty bucket is NaN."""
    benchmark = suites.find(dataset)
    if benchmark is not None:
        buckets: dict[str, list[Row]] = {name: [] for name, _ in metrics.LENGTH_BUCKETS}
        for row in rows:
            buckets[next(name for name, end in metrics.LENGTH_BUCKETS if row["length"] < end)].append(row)
        return {name: benchmark.total(found) if found else float("nan") for name, found in buckets.items()}
    return metrics.score_dataset_e(
        dataset,
        [row["pred"] for row in rows],
        [row["answers"] for row in rows],
        rows[-1].get("all_classes"),
        lengths=[row["length"] for row in rows],
    )


def further_scores(tables: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, float]]:
    """Scores that a suite gives beside its main one, by dataset, where there are any."""
    found = {name: (suites.find(name), rows) for name, rows in tables.items()}
    return {name: b.details(rows) for name, (b, rows) in found.items() if b is not None and b.details is not None}


def averages(scores: dict[str, float]) -> dict[str, float]:
    """Plain mean over the tasks that ran, and LongBench's headline where all 16 English tasks did."""
    found = {"average": round(_mean(scores.values()), 2)}
    if set(ENGLISH_TASKS) <= set(scores):
        found["average_english_16"] = round(_mean(scores[name] for name in ENGLISH_TASKS), 2)
    return found


def _mean(values: Any) -> float:
    items = list(values)
    return sum(items) / len(items) if items else float("nan")


def score_folder(folder: str | Path, *, by_length: bool = False) -> dict[str, Any]:
    """Scores every ``<task>.jsonl`` of a plain folder.

    Args:
        folder: the predictions.
        by_length: score every task in LongBench-E's length buckets too; tasks named ``<task>_e`` are in any case.

    Returns:
        ``scores`` and ``rows`` by task, ``average`` (and ``average_english_16``), and ``scores_e`` and ``details`` (a
        suite's further scores) where there are any.
    """
    paths = sorted(Path(folder).glob("*.jsonl"))
    if not paths:
        raise FileNotFoundError(f"no predictions (<task>.jsonl) in {folder}")
    bucketed = {path.stem for path in paths if by_length or path.stem.endswith(E_SUFFIX)}
    # All are read before any is scored: a bad line in the last file shows at once.
    tables = {path.stem: read_predictions(path, by_length=path.stem in bucketed) for path in paths}
    scores = {name: score_rows(name, rows) for name, rows in tables.items()}
    found = {"scores": scores, **averages(scores), "rows": {name: len(rows) for name, rows in tables.items()}}
    by_bucket = {name: score_rows_e(name, rows) for name, rows in tables.items() if name in bucketed}
    further = (("scores_e", by_bucket), ("details", further_scores(tables)))
    return found | {key: value for key, value in further if value}
