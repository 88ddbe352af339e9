"""Prefill time, peak memory and decode rate of AsymKV's curvatures, against plain chunked prefill and the stock cache.

SmolLM2 on one CPU thread::

    python scripts/bench_prefill_decode.py --model smollm2 --lengths 1024 2048 4096 --budget 512 --out results/speed

A large model's size with random weights on a GPU::

    python scripts/bench_prefill_decode.py --model path/to/config.json --device cuda --lengths 8192 32768 \
        --budget 2048 --out results/speed

Every arm runs in a process of its own; arms take turns, ``--rounds`` times. Writes ``bench.json`` (all measurements)
and ``bench.md`` (medians and conditions). Reports only: it never fails for being slow.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asymkv.arguments import DTYPES
from asymkv.longbench.files import write_atomic
from asymkv.longbench.speed import SpeedJob, markdown, run_job, speed_arms


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2", help="short name, hub id, folder, or a config.json for random weights")
    add("--lengths", type=int, nargs="+", default=[1024, 2048, 4096], help="context lengths in tokens")
    add("--arms", nargs="+", help="only these arms")
    add("--budget", type=int, default=512, help="rows per KV head that the compressing arms keep")
    add("--chunk-size", type=int, default=512, help="tokens of a prefill chunk, for every arm")
    add("--decode-steps", type=int, default=128, help="tokens decoded after each prefill; 0 = prefill only")
    add("--rounds", type=int, default=3, help="processes per arm and length")
    add("--repeats", type=int, default=1, help="prefills per process")
    add("--device", default="cpu", help="cpu, cuda, ...")
    add("--dtype", default="bfloat16", choices=DTYPES[1:], help="of weights and cache")
    add("--threads", type=int, default=1, help="torch threads")
    add("--out", type=Path, help="folder of bench.json and bench.md")
    add("--worker", nargs=2, metavar=("JOB", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.out is None and args.worker is None:
        parser.error("--out is required")
    return args


def make_jobs(args: argparse.Namespace) -> list[SpeedJob]:
    """All measurements, the arms taking turns."""
    arms = speed_arms(args.budget, args.chunk_size)
    unknown = sorted(set(args.arms or ()) - set(arms))
    if unknown:
        raise SystemExit(f"unknown arms {unknown}; choose from {', '.join(arms)}")
    names = [field.name for field in dataclasses.fields(SpeedJob) if hasattr(args, field.name)]
    shared = {name: getattr(args, name) for name in names}
    return [
        SpeedJob(arm=arm, config=arms[arm], tokens=tokens, **shared)
        for tokens in args.lengths
        for _ in range(args.rounds)
        for arm in args.arms or arms
    ]


def run_in_process(job: SpeedJob) -> dict[str, Any]:
    """One measurement in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--worker", json.dumps(dataclasses.asdict(job)), str(result)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        subprocess.run(command, check=True, env=environment)
        return json.loads(result.read_text(encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> None:
    """Starts the processes, or is one of them."""
    args = parse_args(argv)
    if args.worker:
        job, path = args.worker
        Path(path).write_text(json.dumps(run_job(SpeedJob(**json.loads(job)))), encoding="utf-8")
        return
    jobs, results = make_jobs(args), []
    for number, job in enumerate(jobs, start=1):
        print(f"{number}/{len(jobs)} {job.tokens} tokens, {job.arm}", file=sys.stderr)
        results.append(run_in_process(job))
        # After each: a stopped benchmark leaves what it has measured.
        write_atomic(args.out / "bench.json", json.dumps(results, indent=2) + "\n")
    text = markdown(results)
    write_atomic(args.out / "bench.md", text)
    print(text)


if __name__ == "__main__":
    main()
