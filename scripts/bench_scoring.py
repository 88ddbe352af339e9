"""Times the scoring of synthetic predictions: every metric, all of LongBench's tasks, and the packages beside.

    python scripts/bench_scoring.py --out results/scoring                 # 10,000 predictions each
    python scripts/bench_scoring.py --out results/scoring --count 100     # a smoke run

No model runs. ``scoring.csv`` holds wall and processor time (a shared machine's wall time says little), and
``conditions.json`` machine and versions.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from asymkv.files import csv_text, write_atomic
from asymkv.longbench import scoring_speed
from asymkv.longbench.conditions import commit, cpu_name

PACKAGES = ("numpy", "rouge", "rouge_score", "jieba")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the table")
    parser.add_argument("--count", type=int, default=10_000, help="predictions of each metric")
    parser.add_argument("--package-count", type=int, default=100, help="predictions that the packages score")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Times, prints and writes."""
    args = parse_args(argv)
    now = commit()
    names = list(scoring_speed.makers(scoring_speed.Samples(args.seed)))
    rows = []
    jobs: list[Callable[[], list[scoring_speed.Result]]] = [
        *(lambda name=name: [scoring_speed.time_metric(name, args.count, args.seed)] for name in names),
        lambda: [scoring_speed.time_longbench(args.count, args.seed)],
        lambda: scoring_speed.compare_with_packages(args.package_count, args.seed),
    ]
    for job in jobs:
        for row in job():
            each = 1e6 * row["cpu_seconds"] / row["predictions"]
            seconds = row["cpu_seconds"]
            print(f"{row['what']:>36} {row['predictions']:>6} {seconds:8.2f} s {each:9.1f} us each", flush=True)
            rows.append({**row, "seconds": f"{row['seconds']:.3f}", "cpu_seconds": f"{row['cpu_seconds']:.3f}",
                         "cpu_microseconds_each": f"{each:.1f}", "mean_score": f"{row['mean_score']:.4f}"})  # fmt: skip
    write_atomic(args.out / "scoring.csv", csv_text(rows))
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}
    conditions = {"device": cpu_name(), "processes": 1, "commit": now, "seed": args.seed, "versions": versions}
    write_atomic(args.out / "conditions.json", json.dumps(conditions, indent=2) + "\n")


if __name__ == "__main__":
    main()
