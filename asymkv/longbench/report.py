"""From the folders of a run to scores, context retention, bytes and speed, as json, table, markdown and plot."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asymkv.longbench import metrics
from asymkv.longbench.arms import FULL, NONE
from asymkv.longbench.data import ENGLISH_TASKS, Row, read_jsonl
from asymkv.longbench.retention import pooled_ratio, retention_pairs
from asymkv.longbench.runner import RUN_FILE

MEGABYTE = 1e6
NAN = float("nan")


@dataclasses.dataclass(frozen=True)
class ArmRun:
    """One finished arm: ``run.json`` and its records by dataset, in row order."""

    name: str
    run: dict[str, Any]
    records: dict[str, list[Row]]

    def all_records(self) -> list[Row]:
        """The records of all datasets."""
        return [record for records in self.records.values() for record in records]


def find_arms(folders: Sequence[str | Path]) -> list[ArmRun]:
    """Reads every finished arm in (or directly below) the given folders.

    Arms of the same name from several folders are told apart by the folder's name.
    """
    found = []
    for folder in map(Path, folders):
        paths = sorted({*folder.glob(RUN_FILE), *folder.glob(f"*/{RUN_FILE}")})
        if not paths:
            raise FileNotFoundError(f"no finished arm ({RUN_FILE}) in {folder} or its subfolders; finish the run first")
        found += [path.parent for path in paths]
    # The references come first, the arms in alphabetical order after them.
    found.sort(key=lambda path: (path.name != FULL, path.name != NONE))
    names = [path.name for path in found]
    labels = [path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}" for path in found]
    if len(set(labels)) != len(labels):
        raise ValueError(f"arms cannot be told apart by name: {labels}")
    return [_read_arm(label, path) for label, path in zip(labels, found, strict=True)]


def _read_arm(name: str, folder: Path) -> ArmRun:
    run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    datasets = run["results"]["datasets"]
    return ArmRun(name, run, {dataset: read_jsonl(folder / f"{dataset}.jsonl") for dataset in datasets})


def build_report(arms: Sequence[ArmRun], *, seed: int = 0) -> dict[str, Any]:
    """Scores every arm and joins the arms by row id for context retention.

    Args:
        arms: the arms; retention needs one named ``full`` and one named ``none`` of the same protocol.
        seed: of the bootstrap.
    """
    return {arm.name: _arm_report(arm, arms, seed) for arm in arms}


def _arm_report(arm: ArmRun, arms: Sequence[ArmRun], seed: int) -> dict[str, Any]:
    records = arm.all_records()
    answered = {name: rows for name, rows in arm.records.items() if all("pred" in row for row in rows)}
    scores = {name: _score(name, rows) for name, rows in answered.items()}
    report = {
        "protocol": arm.run["settings"]["protocol"],
        "without_context": arm.run["settings"]["without_context"],
        "scores": scores,
        **_averages(scores),
        "retention": _retention(arm, arms, seed),
        "rows": {name: len(rows) for name, rows in arm.records.items()},
        "ids_sha256": {name: entry["ids_sha256"] for name, entry in arm.run["results"]["datasets"].items()},
        "stored_mb": _mean(row["stored_bytes"] for row in records) / MEGABYTE,
        "stored_share": _ratio(sum(r["stored_bytes"] for r in records), sum(r["full_bytes"] for r in records)),
        "peak_mb": max(row["peak_bytes"] for row in records) / MEGABYTE,
        "kept_ratio": _mean(row["kept_ratio"] for row in records),
        "nominal_ratio": _mean(row.get("nominal_ratio", row["kept_ratio"]) for row in records),
        "prefill_tokens_per_second": _ratio(
            sum(r["prompt_tokens"] for r in records), sum(r["prefill_seconds"] for r in records)
        ),
        "decode_tokens_per_second": _ratio(
            sum(r.get("decode_steps", 0) for r in records), sum(r.get("decode_seconds", 0.0) for r in records)
        ),
    }
    buckets = {name: _score_e(name, rows) for name, rows in answered.items() if name.endswith("_e")}
    reference = {name: _rouge_reference(rows) for name, rows in answered.items() if _is_english_rouge(name)}
    return report | {key: value for key, value in (("scores_e", buckets), ("rouge_score_l", reference)) if value}


def _score(dataset: str, rows: Sequence[Row]) -> float:
    return metrics.score_dataset(
        dataset, [row["pred"] for row in rows], [row["answers"] for row in rows], rows[-1]["all_classes"]
    )


def _score_e(dataset: str, rows: Sequence[Row]) -> dict[str, float]:
    return metrics.score_dataset_e(
        dataset,
        [row["pred"] for row in rows],
        [row["answers"] for row in rows],
        rows[-1]["all_classes"],
        lengths=[row["length"] for row in rows],
    )


def _is_english_rouge(dataset: str) -> bool:
    return metrics.metric_for(dataset) is metrics.rouge_score


def _rouge_reference(rows: Sequence[Row]) -> float:
    """ROUGE-L of the ``rouge_score`` package, which is not LongBench's, for comparison with other papers."""
    scores = [
        metrics.score_sample(row["dataset"], row["pred"], row["answers"], None, metrics.rouge_l_reference)
        for row in rows
    ]
    return round(100 * _mean(scores), 2)


def _averages(scores: Mapping[str, float]) -> dict[str, float]:
    """Plain mean over the tasks that ran, and LongBench's headline where all 16 English tasks did."""
    averages = {"average": round(_mean(scores.values()), 2)}
    if set(ENGLISH_TASKS) <= set(scores):
        averages["average_english_16"] = round(_mean(scores[name] for name in ENGLISH_TASKS), 2)
    return averages


def _retention(arm: ArmRun, arms: Sequence[ArmRun], seed: int) -> dict[str, Any] | None:
    """Context retention with its bootstrap interval, or None without the two reference arms."""
    protocol = arm.run["settings"]["protocol"]
    peers = {other.run["arm"]: other for other in arms if other.run["settings"]["protocol"] == protocol}
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


def _mean(values: Any) -> float:
    items = list(values)
    return sum(items) / len(items) if items else NAN


def _ratio(above: float, below: float) -> float:
    return above / below if below else NAN


def to_json(report: Mapping[str, Any]) -> str:
    """The report as strict json: a number that does not exist (NaN) becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(entry) for key, entry in value.items()}
        return None if isinstance(value, float) and math.isnan(value) else value

    return json.dumps(plain(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def table_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the summary table, one row per arm, in the order of the report."""
    datasets = list(dict.fromkeys(name for arm in report.values() for name in arm["scores"]))
    protocols = {arm["protocol"] for arm in report.values()}
    header = ["method", *datasets, "average", "R (95 % interval)", "stored MB", "of full"]
    # An arm that hides rows is charged for all that it stores; what attention still sees stands beside it.
    hides = any(arm.get("nominal_ratio", NAN) < arm.get("kept_ratio", NAN) for arm in report.values())
    header += ["in view"] if hides else []
    header += ["prefill tok/s", "decode tok/s"]
    cells = []
    for name, arm in report.items():
        label = name if len(protocols) == 1 else f"{name} ({arm['protocol']})"
        scores = [_number(arm["scores"].get(dataset, NAN)) for dataset in datasets]
        retained = arm["retention"]
        share = NAN if arm["without_context"] else 100 * arm["stored_share"]
        interval = "-"
        if retained is not None:
            interval = f"{retained['value']:.3f} ({retained['low']:.3f}..{retained['high']:.3f})"
        cells.append([
            label, *scores, _number(arm["average"]), interval, _number(arm["stored_mb"]),
            _number(share, " %", 1), *([_number(100 * arm["nominal_ratio"], " %", 1)] if hides else []),
            _number(arm["prefill_tokens_per_second"], places=0),
            _number(arm["decode_tokens_per_second"], places=1),
        ])  # fmt: skip
    return header, cells


def _number(value: float, unit: str = "", places: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{places}f}{unit}"


def markdown(report: Mapping[str, Any], arms: Sequence[ArmRun]) -> str:
    """The table in markdown, with the conditions that the numbers hold under."""
    header, cells = table_rows(report)
    lines = ["# Scores", "", *_conditions(arms), ""]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    lines += [
        "",
        "R is context retention, (NLL_none - NLL) / (NLL_none - NLL_full) of the gold answer: 1 = the full cache,",
        "0 = no context at all; the interval is a bootstrap over rows. MB and share are of the cache after the prompt.",
    ]
    if "in view" in header:
        lines += ["In view: the share of the prompt's rows that attention still sees; hidden rows count as stored."]
    return "\n".join(lines) + "\n"


def _conditions(arms: Sequence[ArmRun]) -> list[str]:
    run = arms[0].run
    settings, context = run["settings"], run["conditions"]
    lines = [
        f"Model {settings['model']}, {settings['dtype']} on {settings['device']} ({context['device_name']}), "
        f"protocol `{settings['protocol']}`, torch {context['versions']['torch']}, "
        f"transformers {context['versions']['transformers']}, commit {context['commit']}.",
        "",
    ]
    for dataset, entry in run["results"]["datasets"].items():
        lines.append(f"- {dataset}: {entry['rows']} rows, sha256 of ids {entry['ids_sha256'][:16]}")
    return lines


def plot(report: Mapping[str, Any], path: str | Path) -> None:
    """Draws average score and retention against stored bytes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, title, value in zip(
        figure.subplots(1, 2),
        ("average score", "context retention R"),
        (lambda arm: arm["average"], lambda arm: arm["retention"]["value"] if arm["retention"] else NAN),
        strict=True,
    ):
        for name, arm in report.items():
            if not math.isnan(value(arm)):
                axes.scatter(arm["stored_mb"], value(arm), label=name)
                axes.annotate(name, (arm["stored_mb"], value(arm)), textcoords="offset points", xytext=(4, 4))
        axes.set(xlabel="stored MB after the prompt (mean)", ylabel=title)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
