"""Context retention, text perplexity and planted facts of many compression arms on the same rows.

One process, the standing sample (rows as LongBench jsonl, one file a task)::

    python scripts/fidelity.py --experiment configs/experiments/foundation.yaml --data-dir DIR \
        --longbench-config LONGBENCH/config --model smollm2 --protocol context --out results/foundation

Two processes into the same folder: add ``--shard 0/2`` to one and ``--shard 1/2`` to the other. A killed run goes on
where it stopped when started again. ``--report-only`` rebuilds the tables. A smoke run: ``--max-rows 1 --arms h2o``.
Every planted fact at every depth and length: ``--sample all --tasks needle``; one fact among others, lengths in tokens:
``--sample all --tasks ruler_niah_multikey --options '{"ruler": {"lengths": [2048, 4096], "rows": 10}}'``.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from asymkv.longbench import fidelity, models, runner, suites
from asymkv.longbench.data import load_tasks
from asymkv.longbench.fidelity_report import write_report
from asymkv.longbench.files import write_atomic
from asymkv.longbench.records import RecordFolder, Shard
from asymkv.longbench.retention import PROTOCOLS
from asymkv.longbench.sample import STANDING_TASKS, load_sample, pick_sample, select_standing_sample


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--experiment", required=True, help="yaml of arms and ratios, or the name of a shipped one")
    add("--out", type=Path, help="folder of records and tables; it takes one setting only")
    add("--arms", nargs="+", help="only these arms (the full cache always runs)")
    # what is read
    add("--data-dir", type=Path, help="folder of <task>.jsonl; without it, LongBench from the hub")
    add("--longbench-config", type=Path, help="config/ folder of a LongBench checkout (prompts and answer lengths)")
    add("--sample", help="sample file instead of the experiment's, or 'all' for every row of --tasks")
    add("--tasks", nargs="+", help="only these tasks")
    add("--options", type=suites.parse_options, default={}, metavar="JSON", help="settings of rows, as scripts/pred.py")
    add("--max-rows", type=int, help="only the first so many rows of each task; 0 = texts only")
    add("--texts", type=Path, help="folder of .txt files for perplexity and KL divergence")
    # how it is run
    add("--model", default="smollm2", help="short name, hub id or folder")
    add("--max-length", type=int, help="longest prompt, for a model that configs/models.yaml does not know")
    add("--no-chat-template", action="store_true", help="ask every task without the chat template")
    add("--protocol", choices=PROTOCOLS, default="context", help="what is in view while compressing")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--dtype", default="bfloat16", help="of weights and cache")
    add("--threads", type=int, default=1, help="torch threads")
    add("--shard", type=Shard.parse, default=Shard(), help="i/n: this process takes rows i, i + n, ...")
    # other things to do
    add("--report-only", action="store_true", help="rebuild tables and figure from the folder's records")
    add("--write-sample", type=Path, metavar="FILE", help="choose a standing sample from --data-dir")
    args = parser.parse_args(argv)
    if args.out is None and args.write_sample is None:
        parser.error("--out is required")
    if args.sample == "all" and not args.tasks:
        parser.error("--sample all needs --tasks")
    return args


def write_sample(args: argparse.Namespace, spec: models.ModelSpec) -> None:
    """Chooses the standing sample anew."""
    tokenizer = models.load_tokenizer(spec)
    tasks = args.tasks or STANDING_TASKS

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    table = {"tokenizer": spec.name, **select_standing_sample(args.data_dir, count_tokens, tasks=tasks)}
    write_atomic(args.write_sample, json.dumps(table, indent=2) + "\n")


def measure(
    args: argparse.Namespace, spec: models.ModelSpec, experiment: fidelity.Experiment, out: RecordFolder
) -> dict[str, str]:
    """Runs what the folder lacks of this process's shard; returns the arms that were refused, and why."""
    made = {"options": args.options, "reader": suites.Reader(spec)}
    sample = pick_sample(args.sample or experiment.sample, args.tasks, args.data_dir, **made)
    rows = load_sample(sample, args.data_dir, max_rows=args.max_rows, **made)
    tasks = load_tasks(sample.tasks, args.longbench_config)
    texts = fidelity.read_texts(args.texts) if args.texts else None
    limit = min(spec.max_length, sample.max_prompt_tokens or spec.max_length)
    spec = models.resolve_spec(args.model, max_length=limit, chat_template=spec.chat_template)
    subject = runner.load_subject(spec, torch.device(args.device), args.dtype)
    cells = experiment.cells(args.arms)
    settings = fidelity.run_settings(experiment, cells, subject, args.protocol, sample=sample, tasks=tasks, texts=texts)
    ranks = runner.Ranks(args.shard.index, args.shard.count, torch.device(args.device))
    out.claim(settings, runner.conditions(subject, ranks))
    run = fidelity.FidelityRun(subject, args.protocol, out)
    windows = fidelity.windows_of(texts, subject.tokenizer, experiment.texts) if texts else []
    mine = slice(args.shard.index, None, args.shard.count)
    for task, row in tqdm(rows[mine], desc="rows", disable=not rows):
        for name in run.run_row(tasks[task], row, cells):
            tqdm.write(f"{task} {row['_id'][:8]} {name}", file=sys.stderr)
    for window in tqdm(windows[mine], desc="texts", disable=not windows):
        for name in run.run_window(window, cells):
            tqdm.write(f"{window.text} {window.index} {name}", file=sys.stderr)
    return run.refused


def main(argv: Sequence[str] | None = None) -> None:
    """Runs, then reports."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(args.threads)
    chat_template = False if args.no_chat_template else None
    spec = models.resolve_spec(args.model, max_length=args.max_length, chat_template=chat_template)
    if args.write_sample:
        write_sample(args, spec)
        return
    experiment = fidelity.load_experiment(args.experiment)
    out = RecordFolder(args.out, fidelity.record_key, args.shard)
    refused = {} if args.report_only else measure(args, spec, experiment, out)
    print(write_report(out, experiment))
    if refused:
        raise SystemExit("not measured:\n" + "\n".join(f"{arm}: {why}" for arm, why in refused.items()))


if __name__ == "__main__":
    main()
