"""Tables and a figure from the records of a fidelity run."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from asymkv.files import csv_text, write_atomic
from asymkv.longbench import needle_plot
from asymkv.longbench.arms import NONE
from asymkv.longbench.fidelity_experiment import Experiment
from asymkv.longbench.fidelity_plot import MIB, plot
from asymkv.longbench.fidelity_results import CellKey, Results
from asymkv.longbench.records import Record, RecordFolder, merged_settings

DEFINITIONS = """\
R is context retention: (NLL_none - NLL_arm) / (NLL_none - NLL_full), NLL = mean token loss of the gold answer; sums
over the rows of a task, then the plain mean over tasks; 1 = the full cache, 0 = the context was never read. Intervals
are 95 % percentile bootstraps that redraw rows within tasks. Stored bytes are counted from the cache's buffers after
the prefix was compressed (metadata, statistics and slack included), mean over rows; their share is of a stock cache of
the same tokens. The peak is what compression held at most, over the same. Compare arms by bytes: equal ratios need not
store as much. The time of compression is prefill (compaction included) over the full cache's on the same row, the
median over rows; none where these were measured in different sessions, or sessions were on different devices."""
IN_VIEW = """\
An arm that hides rows without removing them is charged for all that it stores; the share in view is what attention
still sees of the tokens' rows."""
ASKED_BEFORE = """\
In protocol prompt the first token of an answer comes from the prefill, which methods that lose nothing before the whole
prompt is read run on the full cache: where the gold answer is one token, their R is 1 whatever they keep."""


def summarise(results: Results) -> list[Record]:
    """One flat mapping per cell: the rows of ``results.csv``."""
    return [
        {"arm": cell[0], "ratio": cell[1] or 1.0, **_row_summary(results, cell), **_text_summary(results, cell)}
        for cell in results.cells
    ]


def prefill_multiple(results: Results, cell: CellKey) -> float:
    """What compressing costs: prefill seconds over the full cache's on the same row, median over rows.

    Rows that were prefilled for several cells at once have no time of their own.
    """
    items = results.common("row", cell, results.full)
    own, full = (results.column("row", key, "prefill_seconds", items) for key in (cell, results.full))
    timed = np.isfinite(own / full) & results.timed_together(cell, items)
    return float(np.median((own / full)[timed])) if timed.any() else math.nan


def _mean_of_known(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _row_summary(results: Results, cell: CellKey) -> Record:
    items = results.common("row", cell, results.full, (NONE, None))
    if not items:
        return {"rows": 0}
    names = ("nll", "kept_ratio", "tokens_seen", "stored_bytes", "full_bytes", "peak_bytes", "prefill_seconds")
    column = {name: results.column("row", cell, name, items) for name in names}
    found = [r["found"] for r in results.of("row", cell).values() if "found" in r]
    records = [results.of("row", cell)[item] for item in items]
    estimate = results.retention(cell)
    return {
        "rows": len(items),
        "complete": len(items) == len(results.of("row", results.full)),
        "retention": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "nll": column["nll"].mean(),
        "stored_bytes": column["stored_bytes"].mean(),
        "share_of_stock_bytes": column["stored_bytes"].sum() / column["full_bytes"].sum(),
        "rows_per_head": (column["kept_ratio"] * column["tokens_seen"]).mean(),
        "max_rows": max(record["rows_max"] for record in records),
        "peak_rows": max(record["peak_rows"] for record in records),
        "peak_bytes": max(record["peak_bytes"] for record in records),
        "peak_share_of_stock_bytes": column["peak_bytes"].sum() / column["full_bytes"].sum(),
        "prefill_seconds": _mean_of_known(column["prefill_seconds"]),
        "prefill_over_full": prefill_multiple(results, cell),
        "needles": len(found),
        "needles_found": sum(found),
        "nominal_ratio": _in_view(records),
        "hides_rows": _hides(records),
        **{f"retention_{task}": value for task, value in estimate.by_task.items()},
    }


def _in_view(records: Sequence[Record]) -> float:
    """Mean share of the tokens' rows that attention sees: of an arm that hides none, the rows that it stores."""
    return float(np.mean([record.get("nominal_ratio", record["kept_ratio"]) for record in records]))


def _hides(records: Sequence[Record]) -> bool:
    return any(record.get("nominal_ratio", record["kept_ratio"]) < record["kept_ratio"] for record in records)


def _text_summary(results: Results, cell: CellKey) -> Record:
    items = results.common("window", cell, results.full)
    if not items:
        return {"windows": 0}
    loss, full = (results.column("window", key, "nll", items).mean() for key in (cell, results.full))
    records = [results.of("window", cell)[item] for item in items]
    estimate = results.divergence(cell)
    stored, stock = (results.column("window", cell, name, items).sum() for name in ("stored_bytes", "full_bytes"))
    return {
        "windows": len(items),
        "text_nll": loss,
        "text_perplexity": math.exp(loss),
        "text_perplexity_difference": math.exp(loss) - math.exp(full),
        "text_kl": estimate.value,
        "text_kl_low": estimate.low,
        "text_kl_high": estimate.high,
        "text_agreement": results.column("window", cell, "agreement", items).mean(),
        "text_share_of_stock_bytes": stored / stock,
        "text_nominal_ratio": _in_view(records),
    }


def paired(results: Results) -> list[Record]:
    """Differences in retention between each arm and its references at the same ratio."""
    found = []
    for arm in results.experiment.arms:
        for reference in arm.references:
            for ratio in results.experiment.ratios:
                cell, other = (arm.name, ratio), (reference, ratio)
                items = results.common("row", cell, other)
                estimate = results.difference(cell, other)
                if not estimate.rows:
                    continue
                nbytes = [results.column("row", key, "stored_bytes", items).mean() for key in (cell, other)]
                found.append(
                    {"arm": arm.name, "reference": reference, "ratio": ratio, "rows": estimate.rows}
                    | {"difference": estimate.value, "low": estimate.low, "high": estimate.high}
                    | {"bytes_over_reference": nbytes[0] / nbytes[1]}
                )
    return found


def needle_grid(results: Results, cell: CellKey, dataset: str | None = None) -> needle_plot.Grid:
    """Planted facts found again, of one dataset or all: context length to depth to (found, asked)."""
    grid: needle_plot.Grid = defaultdict(dict)
    for (name, _), record in results.of("row", cell).items():
        if "found" in record and dataset in (name, None):
            length = record.get("target_len", 0)
            hits, asked = grid[length].get(record["depth"], (0, 0))
            grid[length][record["depth"]] = (hits + record["found"], asked + 1)
    return {length: dict(sorted(grid[length].items())) for length in sorted(grid)}


def needle_grids(results: Results) -> dict[str, dict[CellKey, needle_plot.Grid]]:
    """Dataset to cell to its grid, for the datasets with planted facts."""
    records = [(name, record) for cell in results.cells for (name, _), record in results.of("row", cell).items()]
    datasets = sorted({name for name, record in records if "found" in record})
    return {name: {cell: needle_grid(results, cell, name) for cell in results.cells} for name in datasets}


def length_units(results: Results) -> dict[str, str]:
    """What a dataset's planted facts' context lengths count: tokens, or what its records say."""
    records = [(name, record) for cell in results.cells for (name, _), record in results.of("row", cell).items()]
    return {name: record.get("target_unit", "tokens") for name, record in records if "found" in record}


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _interval(row: Mapping[str, Any], name: str, low: str, high: str, digits: int = 3) -> str:
    return f"{_number(row[name], digits)} [{_number(row[low], digits)}, {_number(row[high], digits)}]"


def _lead(row: Record) -> list[str]:
    """First columns: the model where there are several, the arm, the ratio."""
    return [*([row["model"]] if "model" in row else []), row["arm"], f"{row['ratio']:g}"]


def _lead_header(summary: Sequence[Record]) -> list[str]:
    return [*(["model"] if any("model" in row for row in summary) else []), "arm", "ratio"]


def main_table(summary: Sequence[Record]) -> str:
    """Retention beside what it costs; with the share of rows in view where some arm hides rows."""
    rows = [row for row in summary if row["rows"]]
    hides = any(row["hides_rows"] for row in rows)
    header = [*_lead_header(rows), "R [95 %]", "rows", "stored MiB", "share of stock bytes", "peak", "rows per head"]
    header += [*(["share in view"] if hides else []), "needles", "prefill s", "x full's prefill"]
    body = [
        [*_lead(row), _interval(row, "retention", "low", "high")]
        + [f"{row['rows']}{'' if row['complete'] else ' (unfinished)'}", _number(row["stored_bytes"] / MIB, 2)]
        + [f"{100 * row[name]:.1f} %" for name in ("share_of_stock_bytes", "peak_share_of_stock_bytes")]
        + [_number(row["rows_per_head"], 1)]
        + ([f"{100 * row['nominal_ratio']:.1f} %"] if hides else [])
        + [f"{row['needles_found']}/{row['needles']}", _number(row["prefill_seconds"], 2)]
        + [_number(row["prefill_over_full"], 2)]
        for row in rows
    ]
    return _table(header, body)


def task_table(summary: Sequence[Record]) -> str:
    """Retention by task."""
    rows = [row for row in summary if row["rows"]]
    tasks = sorted({name for row in rows for name in row if name.startswith("retention_")})
    header = [*_lead_header(rows), *(name.removeprefix("retention_") for name in tasks)]
    return _table(header, [[*_lead(row), *(_number(row.get(name)) for name in tasks)] for row in rows])


def common_table(results: Results) -> str:
    """Retention of every arm by ratio, over the rows that all of them have."""
    count, found = results.on_common_rows()
    ratios = sorted({cell[1] for cell in found if cell[1]}, reverse=True)
    arms = dict.fromkeys(cell[0] for cell in found if cell[1])
    body = [[arm, *(_number(found.get((arm, ratio))) for ratio in ratios)] for arm in arms]
    return f"{count} rows.\n\n" + _table(["arm", *(f"{ratio:g}" for ratio in ratios)], body)


def paired_table(differences: Sequence[Record]) -> str:
    """Paired differences in retention."""
    header = ("arm", "against", "ratio", "difference in R [95 %]", "rows", "bytes / reference's bytes")
    body = [
        (row["arm"], row["reference"], f"{row['ratio']:g}", _interval(row, "difference", "low", "high"))
        + (str(row["rows"]), _number(row["bytes_over_reference"]))
        for row in differences
    ]
    return _table(header, body)


def text_table(summary: Sequence[Record]) -> str:
    """Continuations of long texts against the full cache."""
    rows = [row for row in summary if row["windows"]]
    header = [*_lead_header(rows), "windows", "share of stock bytes", "perplexity", "difference to full"]
    header += ["KL, nats [95 %]", "top-1 agreement"]
    body = [
        [*_lead(row), str(row["windows"]), f"{100 * row['text_share_of_stock_bytes']:.1f} %"]
        + [_number(row["text_perplexity"], 2), f"{row['text_perplexity_difference']:+.2f}"]
        + [_interval(row, "text_kl", "text_kl_low", "text_kl_high", 4), _number(row["text_agreement"])]
        for row in rows
    ]
    return _table(header, body)


def needle_table(results: Results) -> str:
    """Planted facts found again, by dataset, length and depth."""
    grids, units = needle_grids(results), length_units(results)
    depths = sorted({d for cells in grids.values() for grid in cells.values() for row in grid.values() for d in row})
    body = []
    for dataset, cells in grids.items():
        for (arm, ratio), grid in cells.items():
            for length, row in grid.items():
                hits = ["{}/{}".format(*row[depth]) if depth in row else "" for depth in depths]
                body.append([dataset, arm, f"{ratio or 1:g}", f"{length} {units[dataset]}", *hits])
    return _table(["dataset", "arm", "ratio", "length", *(f"depth {depth:g}" for depth in depths)], body)


def conditions_text(runs: Sequence[Record]) -> str:
    """Model, rows and machine in a few lines; says so where sessions of one folder differ."""
    settings = merged_settings(runs)
    sessions = [session for run in runs for session in run["sessions"]]
    names = ("model", "dtype", "protocol", "max_length", "ids_sha256")
    lines = [f"- {name}: {settings[name]}" for name in names if settings.get(name)]
    for name in sorted({name for session in sessions for name in session} - {"date"}):
        values = sorted({json.dumps(session[name]).strip('"') for session in sessions if name in session})
        lines.append(f"- {name}: {' | '.join(values)}{' (sessions differ)' if len(values) > 1 else ''}")
    return "\n".join(lines)


def definitions(summary: Sequence[Record], runs: Sequence[Record]) -> str:
    """What the columns mean."""
    hides = any(row.get("hides_rows") for row in summary)
    asked = any(run["settings"].get("protocol") == "prompt" for run in runs)
    return "\n".join([DEFINITIONS, *[IN_VIEW] * hides, *[ASKED_BEFORE] * asked])


def markdown(results: Results, runs: Sequence[Record]) -> str:
    """The whole report."""
    summary, differences = summarise(results), paired(results)
    parts = [f"# Fidelity: {results.experiment.name}", conditions_text(runs), definitions(summary, runs)]
    if any(row["rows"] for row in summary):
        parts += ["## Context retention", main_table(summary), "## Retention by task", task_table(summary)]
    if any(row["rows"] and not row["complete"] for row in summary):
        parts += ["## Retention on the rows that all arms have", common_table(results)]
    if differences:
        parts += ["## Paired differences, same rows", paired_table(differences)]
    if any(row.get("needles") for row in summary):
        parts += ["## Planted facts found again", needle_table(results)]
    if any(row["windows"] for row in summary):
        parts += ["## Long texts", text_table(summary)]
    return "\n\n".join(parts) + "\n"


def write_report(folder: RecordFolder, experiment: Experiment) -> str:
    """Writes ``results.csv``, ``results.md``, figures and ``run.json`` into the folder; returns the markdown.

    The figures are ``retention.png``, and ``needles.png`` where facts were planted.

    Raises:
        FileNotFoundError: if the folder holds no records.
    """
    runs, records = folder.runs(), folder.read()
    if not records:
        raise FileNotFoundError(f"{folder.folder} holds no records")
    results = Results(records, experiment, runs)
    summary, text = summarise(results), markdown(results, runs)
    write_atomic(folder.folder / "results.csv", csv_text(summary))
    write_atomic(folder.folder / "results.md", text)
    plot(summary, folder.folder / "retention.png")
    needle_plot.plot(needle_grids(results), folder.folder / "needles.png", length_units(results))
    sessions = sorted((session for run in runs for session in run["sessions"]), key=lambda session: session["date"])
    whole = {"settings": merged_settings(runs), "sessions": sessions, "records": len(records)}
    write_atomic(folder.folder / "run.json", json.dumps(whole, indent=2) + "\n")
    return text
