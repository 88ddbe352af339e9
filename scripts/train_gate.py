"""Trains a gate: a small network per KV head that tells from a row alone how much KVzip would value it.

    python scripts/train_gate.py --model smollm2 --data-dir DIR --half tune --reported-sample SAMPLE.json \
        --texts FILE.txt --work runs/gate

Stage 1 scores passages with KVzip into ``--work``, one file a passage; a killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from asymkv.gates.collect import Folder, Passage, Recipe, file_passages, take_turns, task_passages
from asymkv.longbench.models import load_model, load_tokenizer, resolve_spec
from asymkv.longbench.sample import HALVES, read_sample

TASKS = (
    "needle", "trec", "qasper", "qmsum", "gov_report", "multi_news", "lcc", "hotpotqa", "2wikimqa", "musique",
    "narrativeqa", "multifieldqa_en", "passage_retrieval_en", "passage_count", "triviaqa",
)  # fmt: skip


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="short name of configs/models.yaml, hub id or folder")
    add("--work", type=Path, required=True, help="folder of the collected passages")
    # passages
    add("--data-dir", type=Path, help="folder of <task>.jsonl")
    add("--tasks", nargs="+", default=TASKS, help="tasks of --data-dir to take contexts of")
    add("--contexts", type=int, default=5, help="contexts of each task")
    add("--half", choices=HALVES, help="only contexts of one half of the data")
    add("--reported-sample", type=Path, nargs="+", default=[], metavar="FILE",
        help="sample files; contexts of their rows are left out")
    add("--texts", type=Path, nargs="+", default=[], metavar="FILE", help="text files to take passages of")
    add("--windows", type=int, default=3, help="passages of each text file")
    add("--max-tokens", type=int, default=Recipe.max_tokens, help="tokens of a passage at most")
    add("--share", type=float, default=Recipe.share, help="of a passage's rows that are stored")
    # how it is run
    add("--seed", type=int, default=0)
    add("--dtype", default="bfloat16", help="of the model")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=1, help="torch threads")
    args = parser.parse_args(argv)
    if args.data_dir is None and not args.texts:
        parser.error("nothing to read: give --data-dir, --texts or both")
    return args


def passages_of(args: argparse.Namespace, tokenizer: Any, recipe: Recipe) -> list[Passage]:
    """Everything to score, the kinds taking turns."""
    left_out = {row for file in args.reported_sample for ids in read_sample(file).tasks.values() for row in ids}
    picked = {"half": args.half, "left_out": left_out, "seed": args.seed}
    tasks = args.tasks if args.data_dir else ()
    groups = [task_passages(task, args.data_dir, args.contexts, **picked) for task in tasks]
    return take_turns(groups + [file_passages(path, args.windows, tokenizer, recipe) for path in args.texts])


def collect(args: argparse.Namespace, folder: Folder) -> None:
    """Stage 1."""
    spec = resolve_spec(args.model, max_length=sys.maxsize)
    tokenizer = load_tokenizer(spec)
    recipe = Recipe(args.max_tokens, args.share, args.seed)
    passages = passages_of(args, tokenizer, recipe)
    model = load_model(spec, dtype=args.dtype, device=args.device)
    folder.claim(model, recipe)
    for passage in tqdm(passages, unit="passage", desc="kvzip"):
        folder.add(model, tokenizer, passage, recipe)


def main(argv: Sequence[str] | None = None) -> int:
    """Collects."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    collect(args, Folder(args.work))
    return 0


if __name__ == "__main__":
    sys.exit(main())
