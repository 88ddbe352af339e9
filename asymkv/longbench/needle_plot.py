"""Heat maps of planted facts found again, by depth and context length, one panel per arm and share of rows kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Context length to depth to (found, asked).
Grid = dict[int, dict[float, tuple[int, int]]]
PANELS_PER_ROW = 5


def plot(
    tables: Mapping[str, Mapping[tuple[str, float | None], Grid]],
    path: str | Path,
    units: Mapping[str, str] | None = None,
) -> bool:
    """Draws one block of panels per dataset: depth down, length across, share found in colour, counts as text.

    Args:
        tables: dataset to (arm, ratio; None for the full cache) to its grid; an empty grid has no panel.
        path: png, pdf or svg.
        units: dataset to what its lengths count; tokens where it is not told.

    Returns:
        Whether there was anything to draw; without it no file is written.
    """
    from matplotlib.figure import Figure

    asked = {name: {cell: grid for cell, grid in cells.items() if grid} for name, cells in tables.items()}
    blocks = {name: cells for name, cells in asked.items() if cells}
    if not blocks:
        return False
    heights = [-(-len(cells) // PANELS_PER_ROW) for cells in blocks.values()]
    columns = min(max(len(cells) for cells in blocks.values()), PANELS_PER_ROW)
    # A panel holds a title of some 25 characters; a lone one is as wide as two.
    figure = Figure(figsize=(2.6 * max(columns, 2), 2.9 * sum(heights) + 0.5 * len(blocks)), layout="constrained")
    parts = figure.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
    image: Any = None
    for part, (name, cells), height in zip(parts, blocks.items(), heights, strict=True):
        part.suptitle(name)
        axes = part.subplots(height, columns, squeeze=False)
        for one in axes.flat[len(cells) :]:
            one.axis("off")
        for one, ((arm, ratio), grid) in zip(axes.flat, cells.items(), strict=False):
            image = _panel(one, grid)
            one.set_title(f"{arm}\n{100 * (ratio or 1):g} % of the rows", fontsize=8)
        part.supxlabel(f"context length, {(units or {}).get(name, 'tokens')}", fontsize=8)
        part.supylabel("depth", fontsize=8)
        part.colorbar(image, ax=axes, label="share found", shrink=0.8)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return True


def _panel(axes: Any, grid: Grid) -> Any:
    lengths = sorted(grid)
    depths = sorted({depth for row in grid.values() for depth in row})
    share = np.full((len(depths), len(lengths)), np.nan)
    for j, length in enumerate(lengths):
        for depth, (hits, asked) in grid[length].items():
            i = depths.index(depth)
            share[i, j] = hits / asked
            color = "white" if share[i, j] < 0.6 else "black"
            axes.text(j, i, f"{hits}/{asked}", ha="center", va="center", fontsize=5, color=color)
    axes.set_xticks(range(len(lengths)), [str(length) if length else "?" for length in lengths], fontsize=6)
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=6)
    return axes.imshow(share, cmap="viridis", vmin=0, vmax=1, aspect="auto")
