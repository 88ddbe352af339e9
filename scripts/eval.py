"""Scores the folders that scripts/pred.py wrote: LongBench scores, context retention, bytes, time and memory.

    python scripts/eval.py runs/small
    python scripts/eval.py runs/ratio25 runs/ratio50 --json runs/all.json --markdown runs/all.md --plot runs/all.png

Folders of ``<task>.jsonl`` that LongBench's own pred.py or another project wrote (fields ``pred``, ``answers``,
``all_classes``, ``length``) are scored too, alone or beside the others; ``--e`` adds LongBench-E's length buckets:

    python scripts/eval.py LongBench/pred_e/my-model --e
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from asymkv.longbench import predictions, report, report_tables
from asymkv.longbench.files import write_atomic


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="of scripts/pred.py or its single arms, or of <task>.jsonl")
    parser.add_argument("--e", action="store_true", help="length buckets for all tasks, not only those named <task>_e")
    parser.add_argument("--json", help="scores as json (default: report.json in the first folder)")
    parser.add_argument("--markdown", help="table as markdown (default: report.md in the first folder)")
    parser.add_argument("--plot", help="score and retention against bytes, as png, pdf or svg (needs matplotlib)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    return parser.parse_args(argv)


def show(header: list[str], cells: list[list[str]], title: str | None = None) -> None:
    """Prints a table."""
    table = Table(title=title)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left")
    for row in cells:
        table.add_row(*row)
    # A table that is piped into a file must not be folded at 80 columns.
    Console(width=None if sys.stdout.isatty() else 40 + 18 * len(header)).print(table)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    plain = {folder: predictions.plain_folders(folder) for folder in args.folders}
    # A folder may hold arms of a run and folders of predictions side by side.
    runs = [folder for folder in args.folders if not plain[folder] or report.has_arms(folder)]
    arms = report.find_arms(runs) if runs else []
    scores = report.build_report(arms, seed=args.seed, by_length=args.e)
    for folder in (folder for found in plain.values() for folder in found):
        name = folder.name if folder.name not in scores else f"{folder.resolve().parent.name}/{folder.name}"
        if name in scores:
            raise ValueError(f"{folder} cannot be told apart from another folder by its name {name!r}")
        scores[name] = predictions.score_folder(folder, by_length=args.e)
    first = Path(args.folders[0])
    write_atomic(Path(args.json or first / "report.json"), report_tables.to_json(scores))
    write_atomic(Path(args.markdown or first / "report.md"), report_tables.markdown(scores, arms))
    if args.plot:
        report_tables.plot(scores, args.plot)
    show(*report_tables.table_rows(scores))
    for dataset, (header, cells) in report_tables.detail_tables(scores).items():
        show(header, cells, dataset)
    for header, cells in (report_tables.bucket_rows(scores), report_tables.cost_rows(scores)):
        if cells:
            show(header, cells)
    return scores


if __name__ == "__main__":
    main()
