"""What a report of the arms says, as json, tables, markdown and plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asymkv.longbench import metrics
from asymkv.longbench.report import NAN, ArmRun, mean


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
    protocols = {arm["protocol"] for arm in report.values() if "protocol" in arm}
    header = ["method", *datasets, "average", "R (95 % interval)", "stored MB", "of full"]
    # An arm that hides rows is charged for all that it stores; what attention still sees stands beside it.
    hides = any(arm.get("nominal_ratio", NAN) < arm.get("kept_ratio", NAN) for arm in report.values())
    header += ["in view"] if hides else []
    header += ["prefill tok/s", "decode tok/s"]
    cells = []
    for name, arm in report.items():
        label = f"{name} ({arm['protocol']})" if len(protocols) > 1 and "protocol" in arm else name
        scores = [_number(arm["scores"].get(dataset, NAN)) for dataset in datasets]
        retained = arm.get("retention")
        share = NAN if arm.get("without_context") else 100 * arm.get("stored_share", NAN)
        interval = "-"
        if retained is not None:
            value, low, high = (_number(retained[name], places=3) for name in ("value", "low", "high"))
            interval = value if low == high == "-" else f"{value} ({low}..{high})"
        cells.append([
            label, *scores, _number(arm["average"]), interval, _number(arm.get("stored_mb", NAN)),
            _number(share, " %", 1), *([_number(100 * arm.get("nominal_ratio", NAN), " %", 1)] if hides else []),
            _number(arm.get("prefill_tokens_per_second", NAN), places=0),
            _number(arm.get("decode_tokens_per_second", NAN), places=1),
        ])  # fmt: skip
    return header, cells


def bucket_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of LongBench-E's table: one row per arm and task, and the mean of each bucket over its tasks."""
    names = [name for name, _ in metrics.LENGTH_BUCKETS]
    cells = []
    for arm, entry in report.items():
        by_task = entry.get("scores_e", {})
        means = {name: mean(s[name] for s in by_task.values() if not math.isnan(s[name])) for name in names}
        for task, scores in [*by_task.items(), *([("average", means)] if by_task else [])]:
            cells.append([arm, task, *(_number(scores[name]) for name in names)])
    return ["method", "task", *names], cells


def cost_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of what a row cost: seconds (mean), peak memory of the process and of the cache."""
    columns = {
        "prefill s": "prefill_seconds_per_row", "question s": "question_seconds_per_row",
        "decode s": "decode_seconds_per_row", "row s": "wall_seconds_per_row", "peak KV MB": "peak_mb",
        "peak RSS MB": "peak_rss_mb", "of it in the row": "peak_rss_increase_mb", "peak device MB": "device_peak_mb",
    }  # fmt: skip
    arms = {name: arm for name, arm in report.items() if "peak_mb" in arm}
    return ["method", *columns], [[n, *(_number(a.get(key, NAN)) for key in columns.values())] for n, a in arms.items()]


def detail_tables(report: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Header and cells for each dataset of a suite that has further scores, by dataset."""
    tables = {}
    for dataset in dict.fromkeys(name for arm in report.values() for name in arm.get("details", {})):
        found = {name: arm["details"][dataset] for name, arm in report.items() if dataset in arm.get("details", {})}
        columns = list(dict.fromkeys(column for scores in found.values() for column in scores))
        cells = [[name, *(_number(scores.get(column, NAN)) for column in columns)] for name, scores in found.items()]
        tables[dataset] = (["method", *columns], cells)
    return tables


def _number(value: float, unit: str = "", places: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{places}f}{unit}"


def markdown(report: Mapping[str, Any], arms: Sequence[ArmRun]) -> str:
    """The tables in markdown, with the conditions that the numbers hold under."""
    parts = ["# Scores", *(["\n".join(_conditions(arms))] if arms else []), _table(*table_rows(report))]
    if any(arm.get("retention") for arm in report.values()):
        parts.append(
            "R is context retention, (NLL_none - NLL) / (NLL_none - NLL_full) of the gold answer: 1 = the full cache,\n"
            "0 = no context at all; the interval is a bootstrap over rows. MB and share are of the cache after the\n"
            "prompt."
        )
    if "in view" in table_rows(report)[0]:
        parts.append("In view: the share of the prompt's rows that attention still sees; hidden rows count as stored.")
    for dataset, (header, cells) in detail_tables(report).items():
        parts += [f"## {dataset}", _table(header, cells)]
    header, cells = bucket_rows(report)
    if cells:
        parts += ["## By length in words (LongBench-E)", _table(header, cells)]
    if arms:
        parts += ["## Time and memory of a row", _table(*cost_rows(report))]
        parts.append("Seconds are means over rows, peaks the largest of a row; RSS and device hold the model too.")
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells])


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
        (lambda arm: arm["average"], lambda arm: arm["retention"]["value"] if arm.get("retention") else NAN),
        strict=True,
    ):
        for name, arm in report.items():
            if "stored_mb" in arm and not math.isnan(value(arm)):
                axes.scatter(arm["stored_mb"], value(arm), label=name)
                axes.annotate(name, (arm["stored_mb"], value(arm)), textcoords="offset points", xytext=(4, 4))
        axes.set(xlabel="stored MB after the prompt (mean)", ylabel=title)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
