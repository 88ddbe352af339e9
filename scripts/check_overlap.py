"""Do the rows of a sample share text with the half of the data that is tuned and trained on, and what does it change?

    python scripts/check_overlap.py --sample configs/experiments/standing_sample.json --data-dir DIR \\
        --records results/quality --experiment quality --out results/quality/no_shared_text.md

Contexts are dealt into halves one by one, but different contexts may be made of the same material (a haystack,
demonstrations, two cuts of one report). For every row: the share of its text that stands in some context of the tune
half of any task. With ``--records``, a folder of scripts/fidelity.py, its table over the other rows alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from asymkv.files import write_atomic
from asymkv.longbench.data import load_rows
from asymkv.longbench.fidelity import record_key
from asymkv.longbench.fidelity_experiment import load_experiment
from asymkv.longbench.fidelity_report import main_table, paired, paired_table, summarise
from asymkv.longbench.fidelity_results import Results
from asymkv.longbench.records import RecordFolder
from asymkv.longbench.sample import SHARED_LIMIT, TUNE, Sample, half_of, read_sample, shared_text, text_runs


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sample", type=Path, required=True, help="sample file of the rows that are reported")
    add("--data-dir", type=Path, required=True, help="folder of <task>.jsonl")
    add("--records", type=Path, help="folder of scripts/fidelity.py")
    add("--experiment", default="quality", help="of the records")
    add("--out", type=Path, help="markdown file")
    return parser.parse_args(argv)


def shares(sample: Sample, data_dir: Path) -> dict[tuple[str, str], float]:
    """(task, row): share of the row's text that stands in contexts of the tune half."""
    rows = {task: load_rows(task, data_dir=data_dir, row_ids=ids) for task, ids in sample.tasks.items()}
    reported = {row["context"] for found in rows.values() for row in found}
    tasks = sorted(path.stem for path in data_dir.glob("*.jsonl"))
    runs: set[str] = set()
    for task in tqdm(tasks, desc="tune half"):
        contexts = {row["context"] for row in load_rows(task, data_dir=data_dir)}
        runs |= text_runs(context for context in contexts if half_of(context, reported) == TUNE)
    return {(task, row["_id"]): shared_text(row["context"], runs) for task, found in rows.items() for row in found}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints, and writes, the shares and the table."""
    args = parse_args(argv)
    sample = read_sample(args.sample)
    found = shares(sample, args.data_dir)
    lines = ["| task | share of each row's text that stands in contexts of the tune half |", "|---|---|"]
    for task in sample.tasks:
        lines.append(f"| {task} | {', '.join(f'{share:.2f}' for (t, _), share in found.items() if t == task)} |")
    apart = {row for (_, row), share in found.items() if share < SHARED_LIMIT}
    lines += ["", f"{len(apart)} of {len(found)} rows share less than {SHARED_LIMIT:.0%}."]
    if args.records is not None:
        folder = RecordFolder(args.records, record_key)
        records = [record for record in folder.read() if record.get("id") in apart]
        results = Results(records, load_experiment(args.experiment), folder.runs())
        lines += ["", main_table(summarise(results)), "", paired_table(paired(results))]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out is not None:
        write_atomic(args.out, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
