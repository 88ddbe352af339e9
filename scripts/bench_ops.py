"""Times the cache's ops on this machine against what others do: append, decode attention, compaction.

    OMP_WAIT_POLICY=PASSIVE python scripts/bench.py --out results/ops               # CPU, one thread
    python scripts/bench.py --device cuda --dtypes bfloat16 --out results/ops_gpu    # GPU

Each table goes to ``<table>.csv`` with its conditions in ``conditions.json``, and ``ops.png`` shows all; a row that is
already there is not timed again. Times are medians of single calls, data in memory between them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from asymkv.longbench.conditions import commit, device_name
from asymkv.ops import bench


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of tables")
    add("--tables", nargs="+", choices=list(bench.TABLES), default=list(bench.TABLES))
    add("--device", default="cpu")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"])
    add("--rows", nargs="+", type=int, default=[1024, 8192, 32768, 131072], help="rows per KV head")
    add("--repeats", type=int, default=15)
    add("--threads", type=int, default=1)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tables and prints them."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    conditions = {
        "device": device_name(torch.device(args.device)), "threads": args.threads, "repeats": args.repeats,
        "torch": torch.__version__, "commit": commit(), "kv_heads": bench.KV_HEADS, "group": bench.GROUP,
        "head_dim": bench.DIM, "batch": 1,
    }  # fmt: skip
    (args.out / "conditions.json").write_text(json.dumps(conditions, indent=2) + "\n", encoding="utf-8")
    for name in args.tables:
        table = bench.Table(args.out / f"{name}.csv")
        bench.TABLES[name](table, torch.device(args.device), args.dtypes, args.rows, args.repeats)
        print(table.markdown())
    bench.plot(args.out)


if __name__ == "__main__":
    main()
