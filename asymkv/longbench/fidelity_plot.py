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


def plot(summary: Sequence[Record], path: str | Path) -> bool:
    """Context retention against stored bytes, one line per arm, intervals as bars, a panel per model.

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
    arms = list(dict.fromkeys(row["arm"] for rows in panels.values() for row in rows))
    # The legend stands beside the panels and must hold every arm.
    figure = Figure(figsize=(3 + 6 * len(panels), max(5.5, 0.21 * len(arms))), layout="constrained")
    for axes, (model, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for i, arm in enumerate(arms):
            _draw(axes, sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["stored_bytes"]), i)
        axes.set_xscale("log")
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


def _draw(axes: Any, rows: Sequence[Record], i: int) -> None:
    """One arm's line in the style number ``i``."""
    if not rows:
        return
    bars = [[row["retention"] - row["low"] for row in rows], [row["high"] - row["retention"] for row in rows]]
    style = {"marker": "osv^Dxp*"[i % 8], "linestyle": ("-", "--", ":", "-.")[i // 10 % 4], "color": f"C{i % 10}"}
    x, y = [row["stored_bytes"] / MIB for row in rows], [row["retention"] for row in rows]
    axes.errorbar(x, y, yerr=np.maximum(bars, 0), label=rows[0]["arm"], capsize=2, linewidth=1, markersize=4, **style)
