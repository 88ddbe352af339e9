"""The figure of a fidelity run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asymkv.longbench.records import Record

MIB = 2**20
LOWEST = -0.5
EMPHASISED = 12


def plot(summary: Sequence[Record], path: str | Path) -> bool:
    """Context retention against stored bytes, one line per arm, a panel per model.

    The legend names arms from the highest mean retention to the lowest; the first twelve are drawn with their
    intervals, the others thin and without (the table has them).

    Returns:
        Whether any arm has a retention to draw; without one no file is written.
    """
    from matplotlib.figure import Figure

    panels: dict[str, list[Record]] = defaultdict(list)
    for row in summary:
        if row["rows"] and math.isfinite(row["retention"]):
            panels[row.get("model", "")].append(row)
    if not panels:
        return False
    arms = _ranked([row for rows in panels.values() for row in rows])
    # The legend stands beside the panels and must hold every arm.
    figure = Figure(figsize=(3 + 6 * len(panels), max(5.5, 0.21 * len(arms))), layout="constrained")
    for axes, (model, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for i, arm in enumerate(arms):
            _draw(axes, sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["stored_bytes"]), i)
        axes.set_xscale("log", subs=(1, 2, 3, 5))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.set_xlabel("stored bytes per row of the sample, MiB")
        axes.set_ylabel("context retention R")
        if any(row["retention"] < LOWEST for row in rows):
            # One arm that breaks the model would press all others into one line.
            axes.set_ylim(bottom=LOWEST)
            axes.set_ylabel(f"context retention R (below {LOWEST:g}: in the table only)")
        axes.set_title(model)
        axes.axhline(1, color="grey", linewidth=0.5)
        axes.grid(alpha=0.3)
    labelled = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
    handles = {label: line for pairs in labelled for line, label in pairs}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return True


def _ranked(rows: Sequence[Record]) -> list[str]:
    """The arms from the highest mean retention to the lowest; ties in the order of the table."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        found[row["arm"]].append(row["retention"])
    return sorted(found, key=lambda arm: -float(np.mean(found[arm])))


def _draw(axes: Any, rows: Sequence[Record], i: int) -> None:
    """One arm's line in the style number ``i``."""
    if not rows:
        return
    style: dict[str, Any] = {"marker": "osv^Dxp*"[i % 8], "linestyle": ("-", "--", ":", "-.")[i // 10 % 4]}
    x, y = [row["stored_bytes"] / MIB for row in rows], [row["retention"] for row in rows]
    bars = None
    if i < EMPHASISED:
        edges = (("retention", "low"), ("high", "retention"))
        bars = np.maximum([[row[above] - row[below] for row in rows] for above, below in edges], 0)
    else:
        style |= {"alpha": 0.6, "zorder": 1.5}
    axes.errorbar(
        x, y, yerr=bars, label=rows[0]["arm"], color=f"C{i % 10}", capsize=2, linewidth=1 if bars is not None else 0.6,
        markersize=4 if bars is not None else 3, **style,
    )  # fmt: skip
