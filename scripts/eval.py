"""Scores the folders that scripts/pred.py wrote: LongBench scores, context retention, bytes and speed.

python scripts/eval.py runs/small
python scripts/eval.py runs/ratio25 runs/ratio50 --json runs/all.json --markdown runs/all.md --plot runs/all.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from asymkv.longbench import report


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="output folders of scripts/pred.py, or folders of single arms")
    parser.add_argument("--json", help="scores as json (default: report.json in the first folder)")
    parser.add_argument("--markdown", help="table as markdown (default: report.md in the first folder)")
    parser.add_argument("--plot", help="score and retention against bytes, as png, pdf or svg (needs matplotlib)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    return parser.parse_args(argv)


def show(scores: dict) -> None:
    """Prints the table."""
    header, cells = report.table_rows(scores)
    table = Table()
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left")
    for row in cells:
        table.add_row(*row)
    # A table that is piped into a file must not be folded at 80 columns.
    Console(width=None if sys.stdout.isatty() else 40 + 18 * len(header)).print(table)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    arms = report.find_arms(args.folders)
    scores = report.build_report(arms, seed=args.seed)
    first = Path(args.folders[0])
    Path(args.json or first / "report.json").write_text(report.to_json(scores), encoding="utf-8")
    Path(args.markdown or first / "report.md").write_text(report.markdown(scores, arms), encoding="utf-8")
    if args.plot:
        report.plot(scores, args.plot)
    show(scores)
    return scores


if __name__ == "__main__":
    main()
