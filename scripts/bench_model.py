"""Times decoding of a whole model at long contexts: a compressed cache against the stock DynamicCache.

SmolLM2 on one CPU thread, and random weights of Llama-3.1-8B's size on a GPU::

    python scripts/bench_model.py --model smollm2 --batches 1 --out results/model
    python scripts/bench_model.py --model llama-3.1-8b-random --batches 1,4,8 --device cuda --out results/model_gpu

The caches are filled with random rows, not prefilled. Every cell (arm, batch, context) runs in a process of its own,
and one that is in ``model.csv`` already is not run again; one that does not fit is written down as "out of memory".
Writes ``model.csv``, ``model.md``, ``model.png`` and ``conditions.json``. Times are means over the timed tokens, the
compactions that fall among them included; memory is what came on top of the loaded model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers

from asymkv.arguments import DTYPES
from asymkv.longbench import model_speed
from asymkv.longbench.conditions import commit, device_name
from asymkv.longbench.files import write_atomic
from asymkv.longbench.model_speed import Cell
from asymkv.ops.bench import Table, integers

KEYS = ("model", "device", "dtype", "batch", "context", "arm", "budget")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = ", ".join(model_speed.RANDOM_MODELS)
    add("--model", default="smollm2", help=f"short name, hub id or folder; random weights: {names}")
    add("--contexts", type=integers, default=list(model_speed.CONTEXTS), help="tokens seen, e.g. 4096,131072")
    add("--batches", type=integers, default=[1], help="e.g. 1,4,8")
    add("--arms", nargs="+", choices=model_speed.ARMS, default=list(model_speed.ARMS))
    add("--budget", type=int, default=2048, help="rows per KV head of the compressed cache")
    add("--steps", type=int, default=128, help="timed tokens on the compressed cache: 128 = its decode_interval")
    add("--stock-steps", type=int, default=16, help="timed tokens on the stock cache")
    add("--device", default="cpu", help="cpu, cuda, ...")
    add("--dtype", default="bfloat16", choices=DTYPES[1:], help="of weights and cache")
    add("--threads", type=int, default=1, help="torch threads")
    add("--out", type=Path, help="folder of the tables")
    add("--worker", nargs=2, metavar=("CELL", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.out is None and not args.worker:
        parser.error("the following arguments are required: --out")
    return args


def make_cells(args: argparse.Namespace) -> list[Cell]:
    """All cells, small contexts first."""
    return [
        Cell(arm, args.model, batch, context, args.budget, args.stock_steps if arm == model_speed.STOCK else args.steps,
             args.device, args.dtype, args.threads)
        for context, batch, arm in product(args.contexts, args.batches, args.arms)
    ]  # fmt: skip


def run_in_process(cell: Cell) -> dict[str, str]:
    """One cell in a fresh process; a process that the system kills for its memory has run out of it."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--worker", json.dumps(dataclasses.asdict(cell)), str(result)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(cell.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        done = subprocess.run(command, env=environment, check=False)
        if done.returncode == -signal.SIGKILL:
            return model_speed.out_of_memory()
        done.check_returncode()
        return json.loads(result.read_text(encoding="utf-8"))


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers hold for."""
    return {
        "device": device_name(torch.device(args.device)), "threads": args.threads, "dtype": args.dtype,
        "model": args.model, "budget": args.budget, "steps": args.steps, "stock_steps": args.stock_steps,
        "torch": torch.__version__, "transformers": transformers.__version__, "commit": commit(),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Starts the processes, or is one of them."""
    args = parse_args(argv)
    if args.worker:
        cell, path = args.worker
        Path(path).write_text(json.dumps(model_speed.guarded(Cell(**json.loads(cell)))), encoding="utf-8")
        return
    found = conditions(args)
    table = Table(args.out / "model.csv", stamp={"commit": str(found["commit"])})
    for cell in make_cells(args):
        keys = {name: getattr(cell, name) for name in KEYS}
        if table.has(keys):
            continue
        print(f"context {cell.context}, batch {cell.batch}, {cell.arm}", file=sys.stderr)
        write_atomic(args.out / "conditions.json", json.dumps(found, indent=2) + "\n")
        table.add(keys, lambda cell=cell: {"steps": str(cell.steps), **run_in_process(cell)})
    lines = [f"- {name}: {value}" for name, value in found.items() if name != "commit"]
    text = "\n".join(["# Decoding at long contexts", "", *lines, table.markdown(), ""])
    write_atomic(args.out / "model.md", text)
    model_speed.plot(table.rows, args.out / "model.png")
    print(text)


if __name__ == "__main__":
    main()
