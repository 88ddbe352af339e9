"""Results of a suite: json, a page of tables, and plots."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asymkv.experiments.arms import METHOD_GROUP, STEP_GROUP
from asymkv.experiments.measure import Record
from asymkv.experiments.suite import LONGBENCH, SUMMARY, TEXT
from asymkv.experiments.tasks import ROUGES
from asymkv.longbench.files import write_atomic

JSON, PAGE, PLOTS = "evaluation_results.json", "results.md", "visualizations"
MIB, DRAWS, FULL = 2**20, 2000, "full"
MEANS = ("stored_bytes", "peak_bytes", "full_bytes", "rows_per_head", "tokens_per_second", "decode_tokens_per_second",
         "basis_bytes")  # fmt: skip

DEFINITIONS = """\
Texts are read turn by turn, as in use: every token is predicted from the tokens of its own turn before it and from what
compression left of earlier turns. Perplexity is exp of the mean loss of all tokens but the first; intervals are 95 %
bootstraps over windows (none with one window). Stored bytes are counted from the cache's buffers after the last turn
(metadata, statistics and spare rows included) and their share is of a stock cache of the same tokens; bases of fewer
dimensions, which belong to the model, are apart. Compare arms by bytes: equal rows need not be as much."""


def write_report(out: Path, results: Mapping[str, Any]) -> Path:
    """Writes json, page and plots into a folder; the page's path."""
    summary = summarise(results)
    content = finite({"summary": summary, **results})
    write_atomic(out / JSON, json.dumps(content, indent=1, default=str, allow_nan=False) + "\n")
    drawn = plots(summary, out / PLOTS)
    write_atomic(out / PAGE, page(results, summary, drawn))
    return out / PAGE


def finite(content: Any) -> Any:
    """The same with None where a number is NaN or infinite: JSON has neither."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def summarise(results: Mapping[str, Any]) -> list[Record]:
    """One row per arm and length of the texts, in the order of the arms."""
    cells: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in results["records"]:
        if record["kind"] == TEXT:
            cells[record["arm"], record["length"]].append(record)
    order = list(results["arms"])
    rows = []
    for (arm, length), found in sorted(cells.items(), key=lambda cell: (order.index(cell[0][0]), cell[0][1])):
        losses = np.array([record["nll_sum"] / record["scored_tokens"] for record in found])
        low, high = interval(losses)
        means = {name: _mean(record.get(name) for record in found) for name in MEANS}
        rows.append({
            "arm": arm, "group": results["arms"][arm]["group"], "length": length, "windows": len(found),
            "loss": float(losses.mean()), "perplexity": math.exp(losses.mean()),
            "low": math.exp(low), "high": math.exp(high), **means,
            "share": means["stored_bytes"] / means["full_bytes"],
            "peak_rows": max(r["peak_rows"] for r in found),
            "device_peak_bytes": max((r.get("device_peak_bytes", 0) for r in found), default=0),
        })  # fmt: skip
    return rows


def _mean(values: Iterable[float | None]) -> float:
    """Mean of the values that there are; NaN where there is none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan


def interval(values: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap of a mean ``[n]``; NaN for one value."""
    if len(values) < 2:
        return math.nan, math.nan
    draws = np.random.default_rng(seed).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)


def gains(results: Mapping[str, Any]) -> list[Record]:
    """What each step changes in loss against the one before, or the one it names, with its interval over windows.

    A row of each length, in nats a token.
    """
    steps = [name for name, arm in results["arms"].items() if arm["group"] == STEP_GROUP]
    losses: dict[str, dict[tuple[int, str], float]] = defaultdict(dict)
    for record in results["records"]:
        if record["kind"] == TEXT and record["arm"] in steps:
            losses[record["arm"]][record["length"], record["item"]] = record["nll_sum"] / record["scored_tokens"]
    rows = []
    for previous, after in zip([None, *steps], steps, strict=False):
        before = results["arms"][after].get("against") or previous
        common = losses[before].keys() & losses[after].keys() if before else set()
        for length in sorted({length for length, _ in common}):
            items = sorted(item for n, item in common if n == length)
            change = np.array([losses[after][length, item] - losses[before][length, item] for item in items])
            low, high = interval(change)
            rows.append({"step": after, "against": before, "length": length, "windows": len(items),
                         "change": float(change.mean()), "low": low, "high": high})  # fmt: skip
    return rows


def answers(records: Iterable[Record], kind: str, names: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Scores of summaries, or of LongBench rows by task: arm, then column, then the items' values."""
    table: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["kind"] == kind:
            scores = {n: record[n] for n in names} or {record["item"].split("/")[0]: record["score"]}
            for name, value in scores.items():
                table[record["arm"]][name].append(value)
    return table


def table_text(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def number(value: float | None, digits: int = 2) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def _within(row: Record, name: str, digits: int) -> str:
    if not math.isfinite(row["low"]):
        return number(row[name], digits)
    return f"{number(row[name], digits)} [{number(row['low'], digits)}, {number(row['high'], digits)}]"


def length_table(rows: Sequence[Record], first: str) -> str:
    """Perplexity at every length."""
    lengths = sorted({row["length"] for row in rows})
    cells = {(row["arm"], row["length"]): _within(row, "perplexity", 2) for row in rows}
    names = list(dict.fromkeys(row["arm"] for row in rows))
    return table_text([first, *(f"{n:,} tokens" for n in lengths)],
                      [[name, *(cells.get((name, n), "–") for n in lengths)] for name in names])  # fmt: skip


def cost_table(rows: Sequence[Record], first: str) -> str:
    """Perplexity beside bytes, rows and speed."""
    header = [first, "tokens", "windows", "perplexity [95 %]", "stored MiB", "of stock bytes", "rows per head",
              "peak rows", "peak MiB", "read tok/s", "decode tok/s"]  # fmt: skip
    body = [
        [row["arm"], f"{row['length']:,}", str(row["windows"]), _within(row, "perplexity", 2)]
        + [number(row["stored_bytes"] / MIB), f"{100 * row['share']:.1f} %", number(row["rows_per_head"], 0)]
        + [str(row["peak_rows"]), number(row["peak_bytes"] / MIB)]
        + [number(row["tokens_per_second"], 1), number(row["decode_tokens_per_second"], 1)]
        for row in rows
    ]
    return table_text(header, body)


def page(results: Mapping[str, Any], summary: Sequence[Record], drawn: Sequence[str]) -> str:
    """The results page."""
    parts = ["# Results", _conditions(results), DEFINITIONS]
    if methods := [row for row in summary if row["group"] == METHOD_GROUP]:
        longest = max(row["length"] for row in methods)
        parts += ["## Perplexity against length", length_table(methods, "method"),
                  f"## Bytes and speed at {longest:,} tokens",
                  cost_table([row for row in methods if row["length"] == longest], "method")]  # fmt: skip
    for group in dict.fromkeys(row["group"] for row in summary if row["group"] not in (METHOD_GROUP, STEP_GROUP)):
        parts += [f"## Ablation: {group}", *_ablation([row for row in summary if row["group"] == group], group)]
    if steps := [row for row in summary if row["group"] == STEP_GROUP]:
        parts += ["## What each part brings", *_ablation(steps, "step")]
    if found := gains(results):
        parts += ["Change of the loss in nats a token, on the same windows:", table_text(
            ["step", "against", "tokens", "windows", "change [95 %]"],
            [[r["step"], r["against"], f"{r['length']:,}", str(r["windows"]), _within(r, "change", 4)]
             for r in found])]  # fmt: skip
    for kind, title, names in ((SUMMARY, "Summaries (ROUGE F1, %)", ROUGES), (LONGBENCH, "LongBench (scores, %)", ())):
        if scores := answers(results["records"], kind, names):
            parts += [f"## {title}", _score_table(scores)]
    if results["skipped"] or results["refused"]:
        parts += ["## Not measured", _missing(results)]
    parts += [f"![{name}]({PLOTS}/{name})" for name in drawn]
    return "\n\n".join(parts) + "\n"


def _ablation(rows: Sequence[Record], first: str) -> list[str]:
    """Tables of an ablation: perplexity over lengths where there are several, and the cost of each arm and length."""
    several = len({row["length"] for row in rows}) > 1
    return [length_table(rows, first)] * several + [cost_table(rows, first)]


def _score_table(scores: Mapping[str, Mapping[str, list[float]]]) -> str:
    columns = list(dict.fromkeys(name for row in scores.values() for name in row))
    body = [[arm, *(number(100 * float(np.mean(row[c])), 1) if c in row else "–" for c in columns),
             str(max(map(len, row.values())))] for arm, row in scores.items()]  # fmt: skip
    return table_text(["method", *columns, "items"], body)


def _missing(results: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {why}" for name, why in {**results["skipped"], **results["refused"]}.items())


def _conditions(results: Mapping[str, Any]) -> str:
    found = results["conditions"]
    lines = [f"- {name}: {json.dumps(value, default=str).strip(chr(34))}" for name, value in found.items()]
    lines += [f"- {name}: {json.dumps(_told(arm), default=str)}" for name, arm in results["arms"].items()
              if arm["group"] == METHOD_GROUP]  # fmt: skip
    return "\n".join(lines)


def _told(arm: Mapping[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in arm["config"].items() if v is not None}, "turn": arm["stride"]}


def plots(summary: Sequence[Record], folder: Path) -> list[str]:
    """Perplexity, tokens per second and bytes against length, and perplexity against bytes; names of the files.

    Ablations are in the last of these, those of parts in one of their own too if they were measured at several lengths.
    """
    from matplotlib.figure import Figure

    if not summary:
        return []
    methods = [row for row in summary if row["group"] == METHOD_GROUP]
    folder.mkdir(parents=True, exist_ok=True)
    longest = max(row["length"] for row in methods or summary)
    steps = [row for row in summary if row["group"] == STEP_GROUP]
    steps = steps if len({row["length"] for row in steps}) > 1 else []
    figures = {
        "perplexity_length.png": ("length", "tokens", "perplexity", "perplexity", methods),
        "bytes_perplexity.png": ("mib", "stored MiB", "perplexity", f"perplexity at {longest:,} tokens",
                                 [row for row in summary if row["length"] == longest]),
        "steps_length.png": ("length", "tokens", "perplexity", "perplexity", steps),
        "tokens_per_second.png": ("length", "tokens", "tokens_per_second", "tokens read per second", methods),
        "memory.png": ("length", "tokens", "mib", "stored MiB", methods),
    }  # fmt: skip
    figures = {name: figure for name, figure in figures.items() if figure[-1]}
    for name, (x, x_label, y, y_label, rows) in figures.items():
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label, xscale="log")
        _draw(axes, [{**row, "mib": row["stored_bytes"] / MIB} for row in rows], x, y, by_arm=x == "length")
        figure.savefig(folder / name, dpi=120)
    return list(figures)


def _draw(axes: Any, rows: Sequence[Record], x: str, y: str, *, by_arm: bool) -> None:
    """A line per arm over lengths; or a line per group, its points named."""
    lines: dict[str, list[Record]] = defaultdict(list)
    for row in rows:
        single = by_arm or row["group"] == METHOD_GROUP
        lines[row["arm"] if single else row["group"]].append(row)
    for i, (name, found) in enumerate(lines.items()):
        found.sort(key=lambda row: row[x])
        style = {"marker": "osv^Dxp*"[i % 8], "color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]}
        axes.plot([row[x] for row in found], [row[y] for row in found], label=name, linewidth=1, markersize=4, **style)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
