"""One table and one figure for several models, each measured into a folder of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from asymkv.files import csv_text, write_atomic
from asymkv.longbench import fidelity_report
from asymkv.longbench.fidelity_experiment import Experiment
from asymkv.longbench.fidelity_results import Results
from asymkv.longbench.records import Record, RecordFolder


def write_joint_report(out: str | Path, folders: Mapping[str, RecordFolder], experiment: Experiment) -> str:
    """Writes ``results.csv``, ``results.md`` and ``retention.png`` of all models into ``out``; returns the markdown.

    Args:
        out: holds the models' folders.
        folders: by model's name.
        experiment: gives the order of the arms.
    """
    out, summary, parts, runs = Path(out), [], [], []
    for model, folder in folders.items():
        results = Results(folder.read(), experiment, folder.runs())
        summary += _named(model, fidelity_report.summarise(results))
        runs += folder.runs()
        parts += [f"## Conditions: {model}", fidelity_report.conditions_text(folder.runs())]
    tables = [f"# Fidelity: {experiment.name}", fidelity_report.definitions(summary, runs)]
    if any(row["rows"] for row in summary):
        tables += ["## Context retention", fidelity_report.main_table(summary)]
        tables += ["## Retention by task", fidelity_report.task_table(summary)]
    if any(row["windows"] for row in summary):
        tables += ["## Long texts", fidelity_report.text_table(summary)]
    text = "\n\n".join(tables + parts) + "\n"
    write_atomic(out / "results.csv", csv_text(summary))
    write_atomic(out / "results.md", text)
    fidelity_report.plot(summary, out / "retention.png")
    return text


def _named(model: str, summary: list[Record]) -> list[Record]:
    return [{"model": model, **row} for row in summary]
