"""Times the cache's ops on this machine against what others do: append, decode attention, compaction.

    OMP_WAIT_POLICY=PASSIVE python scripts/bench_ops.py --out results/ops                # CPU, one thread
    python scripts/bench_ops.py --device cuda --dtypes bfloat16 --out results/ops_gpu    # GPU

Each table goes to ``<table>.csv`` with its conditions in ``conditions.json``, and ``ops.png`` shows all; a row that is
already there is not timed again, and says by which commit it was. Times are medians of single calls, data in memory
between them. ``compaction_share`` times a model's compaction against the forward of the chunk before it.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from asymkv.files import write_atomic
from asymkv.longbench.compaction_share import bench_compaction_share, default_model
from asymkv.longbench.conditions import commit, device_name
from asymkv.ops import bench

TABLES = [*bench.TABLES, "compaction_share"]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of tables")
    add("--tables", nargs="+", choices=TABLES, default=TABLES)
    add("--device", default="cpu")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"])
    add("--rows", nargs="+", type=int, default=[1024, 8192, 32768, 131072], help="rows per KV head")
    add("--batches", type=bench.integers, default=[1, 8, 32], help="sequences, of the decode table: 1,8,32")
    add("--max-bytes", type=int, help="of K and V in one cell; more is skipped (default: 6 GiB, half of a GPU)")
    add("--model", help="of compaction_share: short name, hub id or folder (default: SmolLM2 or its size)")
    add("--repeats", type=int, default=15)
    add("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    if args.max_bytes is None:
        args.max_bytes = bench.default_max_bytes(torch.device(args.device))
    return args


def open_table(folder: Path, name: str, now: str) -> bench.Table:
    """A table; files without a batch or commit column hold batch 1, timed by the commit of their conditions."""
    before = folder / "conditions.json"
    earlier = json.loads(before.read_text(encoding="utf-8")).get("commit") if before.exists() else None
    absent = {"commit": str(earlier)} | ({"batch": "1"} if name == "decode" else {})
    return bench.Table(folder / f"{name}.csv", absent, {"commit": now})


def write_conditions(args: argparse.Namespace, now: str, skipped: list[str]) -> None:
    """What the numbers hold for, and what was left out of the tables that were run."""
    conditions = {
        "device": device_name(torch.device(args.device)), "threads": args.threads, "repeats": args.repeats,
        "torch": torch.__version__, "commit": now, "kv_heads": bench.KV_HEADS, "group": bench.GROUP,
        "head_dim": bench.DIM, "max_bytes": args.max_bytes, "skipped": skipped,
    }  # fmt: skip
    write_atomic(args.out / "conditions.json", json.dumps(conditions, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tables and prints them."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    now = str(commit())
    # All of them: the conditions of those that are not run now are about to be overwritten.
    tables = {name: open_table(args.out, name, now) for name in TABLES}
    write_conditions(args, now, [])
    options = bench.Options(
        torch.device(args.device), args.dtypes, args.rows, args.batches, args.repeats, args.max_bytes
    )
    share = functools.partial(bench_compaction_share, model=args.model or default_model())
    for name in args.tables:
        {**bench.TABLES, "compaction_share": share}[name](tables[name], options)
        print(tables[name].markdown())
    skipped = [line for table in tables.values() for line in table.skipped]
    print(*(f"skipped: {line}" for line in skipped), sep="\n")
    write_conditions(args, now, skipped)
    bench.plot(args.out)


if __name__ == "__main__":
    main()
