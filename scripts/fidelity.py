"""Context retention, text perplexity and planted facts of many compression arms on the same rows.

One process, the standing sample (rows as LongBench jsonl, one file a task)::

    python scripts/fidelity.py --experiment configs/experiments/foundation.yaml --data-dir DIR \
        --longbench-config LONGBENCH/config --model smollm2 --protocol context --out results/foundation

Two processes into the same folder: add ``--shard 0/2`` to one and ``--shard 1/2`` to the other. A killed run goes on
where it stopped when started again. ``--report-only`` rebuilds the tables. A smoke run: ``--max-rows 1 --arms h2o``.
Every planted fact at every depth and length: ``--sample all --tasks needle``; one fact among others, lengths in tokens:
``--sample all --tasks ruler_niah_multikey --options '{"ruler": {"lengths": [2048, 4096], "rows": 10}}'``.

Several experiments over the same rows and several models make one table: ``--experiment methods peers --model smollm2
FOLDER``; each model has a subfolder of its own then. Presses of kvpress (``configs/experiments/peers.yaml``) are
measured by a worker process in kvpress's own environment, which is installed on first use (``make kvpress``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from asymkv.arguments import DTYPES, not_negative, positive
from asymkv.longbench import fidelity, models, peers, runner, suites
from asymkv.longbench.checks import check_asked, check_gold
from asymkv.longbench.conditions import now
from asymkv.longbench.data import Row, Task, contents_sha256, load_tasks
from asymkv.longbench.fidelity_experiment import Cell, Experiment, join_experiments, load_experiment
from asymkv.longbench.fidelity_joint import write_joint_report
from asymkv.longbench.fidelity_report import write_report
from asymkv.longbench.files import write_atomic
from asymkv.longbench.measure import Protocol, Subject
from asymkv.longbench.press_arms import PressArm, PressError
from asymkv.longbench.records import RecordFolder, Shard
from asymkv.longbench.retention import PROTOCOLS
from asymkv.longbench.sample import (
    HALVES,
    MAX_PROMPT_TOKENS,
    ROWS_PER_TASK,
    STANDING_TASKS,
    Sample,
    first_rows,
    load_sample,
    pick_sample,
    read_sample,
    select_standing_sample,
)

logger = logging.getLogger(__name__)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--experiment", nargs="+", help="yamls of arms and ratios, or names of shipped ones")
    add("--out", type=Path, help="folder of records and tables; it takes one setting only")
    add("--arms", nargs="+", help="only these arms (the full cache always runs)")
    # what is read
    add("--data-dir", type=Path, help="folder of <task>.jsonl; without it, LongBench from the hub")
    add("--longbench-config", type=Path, help="config/ folder of a LongBench checkout (prompts and answer lengths)")
    add("--changed-prompts", action="store_true", help="those of --longbench-config may be others than LongBench's")
    add("--sample", help="sample file instead of the experiment's, or 'all' for every row of --tasks")
    add("--tasks", nargs="+", help="only these tasks")
    add("--options", type=suites.parse_options, default={}, metavar="JSON", help="settings of rows, as scripts/pred.py")
    add("--max-rows", type=not_negative, help="only the first so many rows of each task; 0 = texts only")
    add("--texts", type=Path, help="folder of .txt files for perplexity and KL divergence")
    # how it is run
    add("--model", default=["smollm2"], nargs="+", help="short names, hub ids or folders")
    add("--max-length", type=int, help="longest prompt, for a model that configs/models.yaml does not know")
    add("--no-chat-template", action="store_true", help="ask every task without the chat template")
    add("--protocol", choices=PROTOCOLS, default="context", help="what is in view while compressing")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--dtype", default="bfloat16", choices=DTYPES, help="of weights and cache")
    add("--threads", type=positive, default=1, help="torch threads")
    add("--shard", type=Shard.parse, default=Shard(), help="i/n: this process takes rows i, i + n, ...")
    add("--share-prefill", action="store_true",
        help="one prefill for all cells that judge the whole prompt at once, and one for most presses: the same "
             "numbers but for times, which they have none of, in a fraction of the time; holds a row's caches of all "
             "of them at once")
    # other things to do
    add("--report-only", action="store_true", help="rebuild tables and figure from the folder's records")
    add("--forget", nargs="+", metavar="ARM",
        help="take these arms out of the folder, to measure them anew (a gate was trained again)")
    add("--write-sample", type=Path, metavar="FILE", help="choose a standing sample from --data-dir")
    add("--half", choices=HALVES, help="of --write-sample: contexts of one half; --sample's rows count as reported")
    add("--rows-per-task", type=positive, default=ROWS_PER_TASK, help="of --write-sample")
    add("--min-length", type=positive, default=1, help="of --write-sample: shortest context in tokens")
    add(peers.WORKER_FLAG, action="store_true", help=argparse.SUPPRESS)
    add("--session", default=now(), help=argparse.SUPPRESS)  # the worker's is that of who started it
    args = parser.parse_args(argv)
    for name in ("experiment", "out") if args.write_sample is None else ("data_dir",):
        if getattr(args, name) is None:
            parser.error(f"--{name.replace('_', '-')} is required")
    if args.sample == "all" and not args.tasks:
        parser.error("--sample all needs --tasks")
    return args


def write_sample(args: argparse.Namespace, spec: models.ModelSpec) -> None:
    """Chooses the standing sample anew."""
    tokenizer = models.load_tokenizer(spec)
    tasks = args.tasks or STANDING_TASKS

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    longest = args.max_length or MAX_PROMPT_TOKENS
    reported = read_sample(args.sample).tasks.values() if args.sample else ()
    table = select_standing_sample(
        args.data_dir, count_tokens, tasks=tasks, rows_per_task=args.rows_per_task, max_prompt_tokens=longest,
        min_prompt_tokens=args.min_length, half=args.half, reported={row_id for ids in reported for row_id in ids},
    )  # fmt: skip
    table = {"tokenizer": spec.name, **table}
    write_atomic(args.write_sample, json.dumps(table, indent=2) + "\n")


class Inputs(NamedTuple):
    """What one process measures on: its share of the rows and windows."""

    sample: Sample
    contents: str | None
    tasks: Mapping[str, Task]
    rows: list[tuple[str, Row]]
    texts: Mapping[str, str] | None
    windows: list[fidelity.Window]
    subject: Subject

    def items(self) -> Iterator[tuple[str, str, str]]:
        """Kind, dataset and id of everything."""
        yield from (("row", task, row["_id"]) for task, row in self.rows)
        yield from (("window", window.text, str(window.index)) for window in self.windows)


def load(args: argparse.Namespace, spec: models.ModelSpec, experiment: Experiment) -> Inputs:
    """Reads rows, prompts and texts, and loads the model."""
    made = {"options": args.options, "reader": suites.Reader(spec)}
    sample = pick_sample(args.sample or experiment.sample, args.tasks, args.data_dir, **made)
    rows = load_sample(sample, args.data_dir, **made) if args.max_rows != 0 else []
    # Of all rows, so that a folder that began with few of them takes the others.
    contents = contents_sha256(row for _, row in rows) if rows else None
    rows = first_rows(rows, args.max_rows)
    tasks = load_tasks(sample.tasks, args.longbench_config, changed_prompts=args.changed_prompts)
    texts = fidelity.read_texts(args.texts) if args.texts else None
    limit = min(spec.max_length, sample.max_prompt_tokens or spec.max_length)
    spec = dataclasses.replace(spec, max_length=limit)
    subject = runner.load_subject(spec, torch.device(args.device), args.dtype)
    asked = {name: [row for task, row in rows if task == name] for name in tasks}
    check_gold(tasks, asked, subject.tokenizer)
    check_asked((), tasks, asked, subject, Protocol(args.protocol, generate=False))
    windows = fidelity.windows_of(texts, subject.tokenizer, experiment.texts) if texts else []
    mine = slice(args.shard.index, None, args.shard.count)
    return Inputs(sample, contents, tasks, rows[mine], texts, windows[mine], subject)


def measure_cells(
    args: argparse.Namespace,
    experiment: Experiment,
    inputs: Inputs,
    run: fidelity.FidelityRun,
    cells: Sequence[Cell],
    conditions: Mapping[str, Any],
) -> dict[str, str]:
    """Runs what the folder lacks of these cells; returns the arms that were refused, and why."""
    settings = fidelity.run_settings(
        experiment, cells, inputs.subject, args.protocol, sample=inputs.sample, contents=inputs.contents,
        tasks=inputs.tasks, texts=inputs.texts,
    )  # fmt: skip
    ranks = runner.Ranks(args.shard.index, args.shard.count, torch.device(args.device))
    run.folder.claim(settings, {**runner.conditions(inputs.subject, ranks), "date": args.session, **conditions})
    try:
        for task, row in tqdm(inputs.rows, desc="rows", disable=not inputs.rows):
            for name in run.run_row(inputs.tasks[task], row, cells):
                peers.stop_if_orphaned()
                tqdm.write(f"{task} {row['_id'][:8]} {name}", file=sys.stderr)
        for window in tqdm(inputs.windows, desc="texts", disable=not inputs.windows):
            for name in run.run_window(window, cells):
                peers.stop_if_orphaned()
                tqdm.write(f"{window.text} {window.index} {name}", file=sys.stderr)
    finally:
        run.folder.release()
    return run.refused


def measure_own(
    args: argparse.Namespace, spec: models.ModelSpec, experiment: Experiment, out: RecordFolder
) -> tuple[dict[str, str], bool]:
    """Measures this library's arms; returns those that were refused, and whether presses are missing."""
    inputs = load(args, spec, experiment)
    cells = experiment.cells(args.arms)
    presses = [cell for cell in cells if isinstance(cell, PressArm)]
    run = fidelity.FidelityRun(inputs.subject, args.protocol, out, share=args.share_prefill, session=args.session)
    missing = any(run.missing(*item, presses) for item in inputs.items())
    if missing:
        peers.check([cell.press for cell in presses if cell.press])
    own = [cell for cell in cells if not isinstance(cell, PressArm)]
    cells, conditions = [fidelity.without_context(), *own], {"share_prefill": args.share_prefill}
    return measure_cells(args, experiment, inputs, run, cells, conditions), missing


def measure_presses(
    args: argparse.Namespace, spec: models.ModelSpec, experiment: Experiment, out: RecordFolder
) -> dict[str, str]:
    """Measures the presses, in the worker, once the full cache is known to lose here what it lost in the caller."""
    inputs = load(args, spec, experiment)
    cells = experiment.cells(args.arms)
    full = PressArm(cells[0].name)
    run = fidelity.FidelityRun(inputs.subject, args.protocol, out, share=args.share_prefill, session=args.session)
    same = run.compare_full(full.name, inputs.tasks, inputs.rows)
    conditions = {"share_prefill": args.share_prefill, "peer": peers.versions(), "full_cache": same}
    presses = [full, *(cell for cell in cells if isinstance(cell, PressArm))]
    return measure_cells(args, experiment, inputs, run, presses, conditions)


def run_model(
    args: argparse.Namespace, argv: Sequence[str], spec: models.ModelSpec, experiment: Experiment, out: Path
) -> dict[str, str]:
    """Measures one model into its folder, presses in the worker, and writes its report."""
    folder = RecordFolder(out, fidelity.record_key, args.shard)
    refused: dict[str, str] = {}
    if not args.report_only:
        refused, missing = measure_own(args, spec, experiment, folder)
        try:
            if missing:
                own = ["--model", spec.path, "--out", str(out), "--session", args.session]
                refused |= peers.start_worker(__file__, [*argv, *own])
        except PressError as error:
            refused["presses of kvpress"] = str(error)
    if folder.read() or not refused:  # else nothing but the refusals is there to be told
        print(write_report(folder, experiment))
    return {f"{spec.name}, {arm}": why for arm, why in refused.items()}


def run_worker(args: argparse.Namespace, spec: models.ModelSpec, experiment: Experiment) -> dict[str, str]:
    """What ``run_model`` starts in kvpress's environment, for one model."""
    folder = RecordFolder(args.out, fidelity.record_key, args.shard, peers.WORKER)
    return measure_presses(args, spec, experiment, folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs, then reports."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(args.threads)
    chat_template = False if args.no_chat_template else None
    specs = [models.resolve_spec(m, max_length=args.max_length, chat_template=chat_template) for m in args.model]
    if args.write_sample:
        write_sample(args, specs[0])
        return
    experiment = join_experiments([load_experiment(name) for name in args.experiment])
    if args.kvpress_worker:
        peers.answer(lambda: run_worker(args, specs[0], experiment))
        return
    folders = model_folders(specs, args.out)
    if args.forget:
        for path in measured_folders(folders).values():
            logger.info("%s: %d records less", path, RecordFolder(path, fidelity.record_key).forget(args.forget))
        return
    if args.report_only:
        folders = measured_folders(folders)
    refused = {}
    for spec in specs:
        if spec.name in folders:
            refused |= run_model(args, argv, spec, experiment, folders[spec.name])
    if len(specs) > 1:
        # After a run, a model whose every arm was refused has nothing to report; the refusals are told below.
        read = {name: RecordFolder(folder, fidelity.record_key) for name, folder in folders.items()}
        read = {name: folder for name, folder in read.items() if folder.read()}
        if read:
            print(write_joint_report(args.out, read, experiment))
    if refused:
        raise SystemExit("not measured:\n" + "\n".join(f"{arm}: {why}" for arm, why in refused.items()))


def measured_folders(folders: Mapping[str, Path]) -> dict[str, Path]:
    """The models' folders that hold records.

    Raises:
        FileNotFoundError: if none does.
    """
    measured = {name: path for name, path in folders.items() if RecordFolder(path, fidelity.record_key).read()}
    if not measured:
        raise FileNotFoundError(f"no records to report in {', '.join(map(str, folders.values()))}")
    for name in folders.keys() - measured.keys():
        logger.warning("%s is left out of the report: %s holds no records", name, folders[name])
    return measured


def model_folders(specs: Sequence[models.ModelSpec], out: Path) -> dict[str, Path]:
    """Where each model's records go: of one model the folder itself, of several a subfolder each."""
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise ValueError(f"models must have different names, got {names}")
    return {name: out if len(names) == 1 else out / name for name in names}


if __name__ == "__main__":
    main()
