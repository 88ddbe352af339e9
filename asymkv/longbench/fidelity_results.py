"""The records of a fidelity run, by cell and by row: what its tables and figures are made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from asymkv.longbench.arms import NONE
from asymkv.longbench.fidelity_experiment import Experiment
from asymkv.longbench.records import Record, machines
from asymkv.longbench.retention import Estimate, paired_pairs, pooled_ratio, retention_pairs

CellKey = tuple[str, float | None]
ItemKey = tuple[str, str]


class Results:
    """Records of a folder, by cell and by row or window.

    Args:
        records: from ``RecordFolder.read``.
        experiment: gives the order of the arms, and their references.
        runs: of the folder.
    """

    def __init__(self, records: Iterable[Record], experiment: Experiment, runs: Iterable[Record] = ()) -> None:
        self.experiment, self.one_machine = experiment, len(machines(runs)) < 2
        self._by_kind: dict[str, dict[CellKey, dict[ItemKey, Record]]] = {"row": {}, "window": {}}
        for record in records:
            cells = self._by_kind[record["kind"]]
            cells.setdefault((record["arm"], record["ratio"]), {})[record["dataset"], record["id"]] = record
        order = {arm.name: i for i, arm in enumerate(experiment.arms)}
        found = {key for cells in self._by_kind.values() for key in cells if key[0] != NONE}
        self.full: CellKey = (next(arm.name for arm in experiment.arms if arm.is_full), None)
        self.cells = sorted(found, key=lambda key: (order.get(key[0], len(order)), key[0], -(key[1] or 1.0)))

    def of(self, kind: str, cell: CellKey) -> dict[ItemKey, Record]:
        """Records of one cell by (dataset, id)."""
        return self._by_kind[kind].get(cell, {})

    def common(self, kind: str, *cells: CellKey) -> list[ItemKey]:
        """Rows or windows that all these cells have, in a fixed order."""
        return sorted(set.intersection(*(set(self.of(kind, cell)) for cell in cells)))

    def column(self, kind: str, cell: CellKey, name: str, items: Sequence[ItemKey]) -> np.ndarray:
        """One value of the records of ``items``; NaN where it was not measured."""
        records = self.of(kind, cell)
        return np.array([records[item][name] for item in items], dtype=np.float64)

    def timed_together(self, cell: CellKey, items: Sequence[ItemKey]) -> np.ndarray:
        """Which rows of a cell one run timed with the full cache's; where none wrote that down: one machine."""
        own, full = self.of("row", cell), self.of("row", self.full)
        named = [(own[item].get("session"), full[item].get("session")) for item in items]
        return np.array([a == b and (a is not None or self.one_machine) for a, b in named], dtype=bool)

    def _ratio(self, pairs: Callable[..., np.ndarray], *cells: CellKey) -> Estimate:
        """Pooled ratio over rows that all the cells, the full cache and the empty context have."""
        columns = [(NONE, None), *cells, self.full]
        items = self.common("row", *columns)
        table = pairs(*(self.column("row", cell, "nll", items) for cell in columns))
        return pooled_ratio(_grouped(items, table))

    def on_common_rows(self) -> tuple[int, dict[CellKey, float]]:
        """How many rows all cells have, and each cell's retention over those alone: an unfinished run compares so."""
        cells = [cell for cell in self.cells if self.of("row", cell)]
        items = self.common("row", (NONE, None), *cells) if cells else []
        out = {}
        for cell in cells if items else ():
            columns = (self.column("row", each, "nll", items) for each in ((NONE, None), cell, self.full))
            out[cell] = pooled_ratio(_grouped(items, retention_pairs(*columns))).value
        return len(items), out

    def retention(self, cell: CellKey) -> Estimate:
        """Context retention of a cell."""
        return self._ratio(retention_pairs, cell)

    def difference(self, cell: CellKey, reference: CellKey) -> Estimate:
        """Retention of a cell minus that of a reference, on the same rows."""
        return self._ratio(paired_pairs, reference, cell)

    def divergence(self, cell: CellKey) -> Estimate:
        """KL divergence from the full cache: windows within texts, then the plain mean over texts."""
        items = self.common("window", cell)
        kl = self.column("window", cell, "kl", items)
        return pooled_ratio(_grouped(items, np.stack([kl, np.ones_like(kl)], axis=1)))


def _grouped(items: Sequence[ItemKey], table: np.ndarray) -> dict[str, np.ndarray]:
    by_task: dict[str, list[np.ndarray]] = defaultdict(list)
    for (task, _), row in zip(items, table, strict=True):
        by_task[task].append(row)
    return {task: np.stack(rows) for task, rows in by_task.items()}
