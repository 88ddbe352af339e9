"""From the folders of a run to scores, context retention, bytes and speed of every arm."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from asymkv.longbench import metrics, suites
from asymkv.longbench.arms import FULL, NONE
from asymkv.longbench.data import Row, ids_sha256
from asymkv.longbench.jsonl import check_fields, numbered_objects, read_object
from asymkv.longbench.predictions import averages, check_kinds_of, further_scores, score_rows, score_rows_e
from asymkv.longbench.records import conflicts
from asymkv.longbench.retention import pooled_ratio, retention_pairs
from asymkv.longbench.rows import E_SUFFIX, required_fields
from asymkv.longbench.runner import RUN_FILE, SECONDS, shared_settings

logger = logging.getLogger(__name__)
MEGABYTE = 1e6
# What every record of a run has.
RECORD_FIELDS = (
    "_id", "dataset", "answers", "gold_tokens", "stored_bytes", "full_bytes", "peak_bytes", "kept_ratio",
    "prompt_tokens", "prefill_seconds",
)  # fmt: skip
NAN = float("nan")
# What an arm has before it is through.
_UNFINISHED = ("records-*.jsonl", "*/records-*.jsonl")


@dataclasses.dataclass(frozen=True)
class ArmRun:
    """One finished arm: ``run.json`` and its records by dataset, in row order."""

    name: str
    run: dict[str, Any]
    records: dict[str, list[Row]]

    def all_records(self) -> list[Row]:
        """The records of all datasets."""
        return [record for records in self.records.values() for record in records]


def has_arms(folder: str | Path) -> bool:
    """Whether a folder, or one directly below it, is an arm of scripts/pred.py, finished or not."""
    found = Path(folder)
    return any(any(found.glob(name)) for name in (RUN_FILE, f"*/{RUN_FILE}", *_UNFINISHED))


def find_arms(folders: Sequence[str | Path]) -> list[ArmRun]:
    """Reads every finished arm in (or directly below) the given folders.

    Arms of the same name from several folders are told apart by the folder's name.

    Raises:
        FileNotFoundError: for a folder without a finished arm.
        ValueError: for arms of one folder that were run on other rows, prompts or another model, and for records that
            are not those that ``run.json`` describes; names the settings, or file, line and field.
    """
    found = []
    for folder in map(Path, folders):
        paths = sorted({*folder.glob(RUN_FILE), *folder.glob(f"*/{RUN_FILE}")})
        if not paths:
            raise FileNotFoundError(f"no finished arm ({RUN_FILE}) in {folder} or its subfolders; finish the run first")
        found += [path.parent for path in paths]
        for path in sorted({path.parent for name in _UNFINISHED for path in folder.glob(name)} - set(found)):
            logger.warning("%s is not scored: its run is not finished (no %s); start it again", path, RUN_FILE)
    # The references come first, the arms in alphabetical order after them.
    found.sort(key=lambda path: (path.name != FULL, path.name != NONE))
    names = [path.name for path in found]
    labels = [path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}" for path in found]
    if len(set(labels)) != len(labels):
        raise ValueError(f"arms cannot be told apart by name: {labels}")
    arms = [_read_arm(label, path) for label, path in zip(labels, found, strict=True)]
    _refuse_mixtures(found, arms)
    return arms


def _refuse_mixtures(folders: Sequence[Path], arms: Sequence[ArmRun]) -> None:
    first: dict[Path, tuple[str, ArmRun]] = {}
    for folder, arm in zip(folders, arms, strict=True):
        name, other = first.setdefault(folder.parent, (folder.name, arm))
        differing = sorted(conflicts(*(shared_settings(each.run["settings"]) for each in (other, arm))))
        if differing:
            raise ValueError(
                f"{folder} and {folder.parent / name} are of other settings: {', '.join(differing)} differ; "
                "such arms are not comparable, score them from folders of their own"
            )


def _read_arm(name: str, folder: Path) -> ArmRun:
    run = read_object(folder / RUN_FILE)
    answered = run["settings"].get("generate", True)
    records = {
        dataset: _read_records(folder / f"{dataset}.jsonl", entry, answered=answered)
        for dataset, entry in run["results"]["datasets"].items()
    }
    return ArmRun(name, run, records)


def _read_records(path: Path, entry: Mapping[str, Any], *, answered: bool) -> list[Row]:
    """The records of one dataset, which must be those that ``run.json`` counted."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, {path.parent / RUN_FILE} counts {entry['rows']} rows of it")
    rows = []
    for place, row in numbered_objects(path.read_bytes(), str(path)):
        check_fields(row, place, "a record", required_fields(path.stem, RECORD_FIELDS))
        if "nll" not in row:
            raise ValueError(f"{place}: a record lacks nll; it has {', '.join(row)}")
        for where, part in check_kinds_of(row, place):
            check_fields(part, where, "a record", ("answers", *(("pred",) if answered else ())))
        rows.append(row)
    found = ids_sha256(row["_id"] for row in rows)
    if found != entry["ids_sha256"]:
        raise ValueError(
            f"{path} holds {len(rows)} records with ids of sha256 {found}; {path.parent / RUN_FILE} says "
            f"{entry['rows']} and {entry['ids_sha256']}: it is not the file of that run"
        )
    return rows


def build_report(arms: Sequence[ArmRun], *, seed: int = 0, by_length: bool = False) -> dict[str, Any]:
    """Scores every arm and joins the arms by row id for context retention.

    Args:
        arms: the arms; retention needs one named ``full`` and one named ``none`` of the same rows, model and protocol.
        seed: of the bootstrap.
        by_length: score all tasks in LongBench-E's length buckets, not only those named ``<task>_e``.
    """
    return {arm.name: _arm_report(arm, arms, seed, by_length) for arm in arms}


def _arm_report(arm: ArmRun, arms: Sequence[ArmRun], seed: int, by_length: bool) -> dict[str, Any]:
    records = arm.all_records()
    answered = arm.records if arm.run["settings"].get("generate", True) else {}
    scores = {name: score_rows(name, rows) for name, rows in answered.items()}
    report = {
        "protocol": arm.run["settings"]["protocol"],
        "without_context": arm.run["settings"]["without_context"],
        "scores": scores,
        **averages(scores),
        "retention": _retention(arm, arms, seed),
        "rows": {name: len(rows) for name, rows in arm.records.items()},
        "ids_sha256": {name: entry["ids_sha256"] for name, entry in arm.run["results"]["datasets"].items()},
        "stored_mb": mean(row["stored_bytes"] for row in records) / MEGABYTE,
        "stored_share": _ratio(sum(r["stored_bytes"] for r in records), sum(r["full_bytes"] for r in records)),
        "peak_mb": max(row["peak_bytes"] for row in records) / MEGABYTE,
        "kept_ratio": mean(row["kept_ratio"] for row in records),
        "nominal_ratio": mean(row.get("nominal_ratio", row["kept_ratio"]) for row in records),
        "prefill_tokens_per_second": _ratio(
            sum(r["prompt_tokens"] for r in records), sum(r["prefill_seconds"] for r in records)
        ),
        "decode_tokens_per_second": _ratio(
            sum(r.get("decode_steps", 0) for r in records), sum(r.get("decode_seconds", 0.0) for r in records)
        ),
    }
    report |= _costs(records)
    bucketed = [name for name in answered if by_length or name.endswith(E_SUFFIX)]
    buckets = {name: score_rows_e(name, answered[name]) for name in bucketed}
    reference = {name: _rouge_reference(rows) for name, rows in answered.items() if _is_english_rouge(name)}
    further = (("scores_e", buckets), ("rouge_score_l", reference), ("details", further_scores(answered)))
    return report | {key: value for key, value in further if value}


def _costs(records: Sequence[Row]) -> dict[str, float]:
    """Time and memory a row; NaN where records do not tell."""
    seconds = {f"{name}_per_row": mean(r[name] for r in records if name in r) for name in (*SECONDS, "wall_seconds")}
    peaks = (
        ("peak_rss_mb", "peak_rss_bytes"), ("peak_rss_increase_mb", "peak_rss_increase_bytes"),
        ("device_peak_mb", "device_peak_bytes"),
    )  # fmt: skip
    return seconds | {
        label: max((r[name] for r in records if name in r), default=NAN) / MEGABYTE for label, name in peaks
    }


def _is_english_rouge(dataset: str) -> bool:
    return suites.find(dataset) is None and metrics.metric_for(dataset) is metrics.rouge_score


def _rouge_reference(rows: Sequence[Row]) -> float:
    """ROUGE-L of the ``rouge_score`` package, which is not LongBench's, for comparison with other papers."""
    scores = [
        metrics.score_sample(row["dataset"], row["pred"], row["answers"], None, metrics.rouge_l_reference)
        for row in rows
    ]
    return round(100 * mean(scores), 2)


def _retention(arm: ArmRun, arms: Sequence[ArmRun], seed: int) -> dict[str, Any] | None:
    """Context retention with its bootstrap interval, or None without the two reference arms on the same rows."""
    own = shared_settings(arm.run["settings"])
    same = [other for other in arms if not any(conflicts(own, shared_settings(other.run["settings"])))]
    peers = {other.run["arm"]: other for other in same}
    for other in arms:
        if other.run["arm"] in (FULL, NONE) and other.run["arm"] not in peers:
            differing = sorted(conflicts(own, shared_settings(other.run["settings"])))
            logger.warning("no R of %s against %s: %s differ", arm.name, other.name, ", ".join(differing))
    if FULL not in peers or NONE not in peers:
        return None
    full, none = peers[FULL], peers[NONE]
    groups = {}
    for dataset in arm.records:
        shared = _shared_losses(dataset, none, arm, full)
        if shared:
            groups[dataset] = retention_pairs(*map(list, zip(*shared, strict=True)))
    if not groups:
        return None
    estimate = pooled_ratio(groups, seed=seed)
    return {
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "by_task": estimate.by_task,
        "rows": estimate.rows,
    }


def _shared_losses(dataset: str, *runs: ArmRun) -> list[tuple[float, ...]]:
    """Losses of the rows that all runs have, joined by row id; the gold answers must have the same tokens."""
    tables = [{row["_id"]: row for row in run.records.get(dataset, ()) if row["nll"] is not None} for run in runs]
    ids = [row_id for row_id in tables[0] if all(row_id in table for table in tables)]
    for row_id in ids:
        if len({table[row_id]["gold_tokens"] for table in tables}) != 1:
            raise ValueError(f"{dataset}: row {row_id} was scored on gold answers of different lengths")
    return [tuple(table[row_id]["nll"] for table in tables) for row_id in ids]


def mean(values: Iterable[float]) -> float:
    """Plain mean; NaN of nothing."""
    items = list(values)
    return sum(items) / len(items) if items else NAN


def _ratio(above: float, below: float) -> float:
    return above / below if below else NAN
