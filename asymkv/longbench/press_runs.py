"""A rank's share of the presses of kvpress, in the worker that :func:`asymkv.longbench.runner.run` starts for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from asymkv.longbench import peers, runner
from asymkv.longbench.arms import FULL
from asymkv.longbench.measure import Record, Subject
from asymkv.longbench.records import RecordFolder


def run_presses(
    work: runner.Work,
    subject: Subject,
    out_dir: str | Path,
    ranks: runner.Ranks,
    *,
    progress: Callable[[str, str], None] | None = None,
) -> None:
    """Measures what is missing of the presses; merging is left to the caller of this worker.

    Args:
        work: all arms of the run, so that the full cache is found.
        subject: the model, loaded in this environment.
        out_dir: the arms' folders are here.
        ranks: the rank whose share this is.
        progress: called as (arm, dataset) after each row.
    """
    stores = runner.stores_of(work, out_dir, ranks)
    found = {"peer": peers.versions(), "full_cache": _compare_full(work, subject, stores)}
    for arm in work.presses.arms:
        settings, conditions = runner.run_settings(arm, work, subject), runner.conditions(subject, ranks)
        stores[arm.name].claim(settings, {**conditions, **found})
    for arm in work.presses.arms:
        runner.measure_arm(arm, stores[arm.name], work, subject, ranks, progress)


def _compare_full(work: runner.Work, subject: Subject, stores: Mapping[str, RecordFolder]) -> Record | None:
    """The full cache in this environment beside its first record, where the run has one."""
    for record in stores[FULL].read() if FULL in stores else ():
        if record["nll"] is not None:
            dataset = record["dataset"]
            row = work.rows[dataset][record["index"]]
            return peers.compare_full(subject, work.tasks[dataset], row, work.protocol, record["nll"])
    return None
