"""Trains a gate: a small network per KV head that tells from a row alone how much KVzip would value it.

    python scripts/train_gate.py --model smollm2 --data-dir DIR --half tune --reported-sample SAMPLE.json \
        --texts FILE.txt --work runs/gate

Stage 1 scores passages with KVzip into ``--work``, one file a passage; a killed run goes on where it stopped. Stage 2
(minutes on one CPU core) fits the gate on them, measures it on passages held out, and writes it to where method "gate"
looks for it (``$ASYMKV_CACHE`` or the user's cache folder), or to ``--out``; a json report lies beside it. One stage
alone: ``--stage collect`` or ``--stage fit``.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from asymkv.arguments import DTYPES
from asymkv.files import write_atomic
from asymkv.gates.collect import (
    Folder,
    Passage,
    Recipe,
    digest,
    file_passages,
    sample_contexts,
    take_turns,
    task_passages,
)
from asymkv.gates.fit import Fit, fit, read_rows, split
from asymkv.gates.gate import Gate
from asymkv.head_scores import model_of
from asymkv.longbench.models import load_model, load_tokenizer, resolve_spec
from asymkv.longbench.sample import HALVES

STAGES = ("collect", "fit", "both")
TASKS = (
    "needle", "trec", "qasper", "qmsum", "gov_report", "multi_news", "lcc", "hotpotqa", "2wikimqa", "musique",
    "narrativeqa", "multifieldqa_en", "passage_retrieval_en", "passage_count", "triviaqa",
)  # fmt: skip


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="short name of configs/models.yaml, hub id or folder")
    add("--work", type=Path, nargs="+", required=True, metavar="DIR",
        help="folders of collected passages; the first takes new ones")
    add("--stage", choices=STAGES, default=STAGES[-1], help="what to do")
    add("--out", type=Path, metavar="FILE", help="the gate's file (.safetensors)")
    # passages
    add("--data-dir", type=Path, help="folder of <task>.jsonl")
    add("--tasks", nargs="+", default=TASKS, help="tasks of --data-dir to take contexts of")
    add("--contexts", type=int, default=5, help="contexts of each task")
    add("--half", choices=HALVES, help="only contexts of one half of the data")
    add("--reported-sample", type=Path, nargs="+", default=[], metavar="FILE",
        help="sample files; what shares text with a context of their rows, of whatever task, is left out")
    add("--texts", type=Path, nargs="+", default=[], metavar="FILE", help="text files to take passages of")
    add("--windows", type=int, default=3, help="passages of each text file")
    add("--max-tokens", type=int, default=Recipe.max_tokens, help="tokens of a passage at most")
    add("--min-tokens", type=int, default=Recipe.min_tokens, help="contexts of fewer tokens are not taken")
    add("--share", type=float, default=Recipe.share, help="of a passage's rows that are stored")
    # the fit
    add("--hidden", type=int, default=Fit.hidden, help="hidden units of each head")
    add("--steps", type=int, default=Fit.steps)
    add("--batch", type=int, default=Fit.batch, help="rows of every head in a step")
    add("--rate", type=float, default=Fit.rate, help="highest learning rate")
    add("--decay", type=float, default=Fit.decay, help="weight decay")
    add("--held-out", type=int, default=6, metavar="N", help="one of N passages is only measured on")
    # how it is run
    add("--seed", type=int, default=0, help="of the passages, and of the fit")
    add("--dtype", default="bfloat16", choices=DTYPES, help="of the model")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=1, help="torch threads")
    args = parser.parse_args(argv)
    if args.stage != "fit" and args.data_dir is None and not args.texts:
        parser.error("nothing to read: give --data-dir, --texts or both")
    if args.reported_sample and args.data_dir is None:
        parser.error("--reported-sample names rows of --data-dir, which is missing")
    if args.out is not None and args.out.suffix != ".safetensors":
        parser.error(f"--out must end in .safetensors; found {args.out}")
    return args


def passages_of(
    args: argparse.Namespace, tokenizer: Any, recipe: Recipe, left_out: Collection[str]
) -> list[Passage]:
    """Everything to score, the kinds taking turns."""
    tasks = args.tasks if args.data_dir else ()
    groups = [task_passages(task, args.data_dir, args.contexts, tokenizer, recipe, left_out) for task in tasks]
    texts = [file_passages(path, args.windows, tokenizer, recipe, left_out) for path in args.texts]
    return take_turns(groups + texts)


def collect(args: argparse.Namespace, folder: Folder, model: PreTrainedModel, tokenizer: Any) -> None:
    """Stage 1."""
    left_out = sample_contexts(args.reported_sample, args.data_dir)
    recipe = Recipe(args.max_tokens, args.min_tokens, args.share, args.seed, args.half, digest(left_out))
    passages = passages_of(args, tokenizer, recipe, left_out)
    folder.claim(model, recipe)
    for passage in tqdm(passages, unit="passage", desc="kvzip"):
        folder.add(model, tokenizer, passage, recipe)


def fit_gate(args: argparse.Namespace, model: PreTrainedModel, name: str) -> None:
    """Stage 2; ``name`` is the model's, for the reader of the file."""
    folders = [Folder(path) for path in args.work]
    recipes = [folder.recipe_for(model) for folder in folders]
    train, held_out = split([file for folder in folders for file in folder.files()], args.held_out)
    settings = Fit(args.hidden, args.steps, args.batch, args.rate, args.decay, args.seed)
    rows = [[read_rows(file) for file in tqdm(files, desc="reading")] for files in (train, held_out)]
    with tqdm(total=args.steps, unit="step", desc="fit") as bar:
        weights, measured = fit(*rows, settings, progress=lambda step, found: show(bar, found))
    kinds = sorted({file.stem.rsplit("-", 1)[0] for file in train})
    trained = {**measured, "recipes": recipes, "kinds": kinds, "passages_trained_on": [file.stem for file in train],
               "held_out_passages": [file.stem for file in held_out]}  # fmt: skip
    path = Gate(weights, {**model_of(model), "name": name}, trained).save(args.out)
    write_atomic(path.with_suffix(".json"), json.dumps(trained, indent=1) + "\n")
    print(f"gate: {path}, {path.stat().st_size} bytes")


def show(bar: tqdm, found: dict[str, Any]) -> None:
    """One step on; prints what was measured."""
    bar.update()
    if found:
        shares = [f"{int(100 * float(r))} %: overlap {found['overlap'][r]:.3f}, mass {found['mass'][r]:.3f}"
                  for r in found["overlap"]]  # fmt: skip
        errors = f"error {found['error']:.3f} (of means {found['error_of_means']:.3f})"
        bar.write(f"step {bar.n}: {errors}; {'; '.join(shares)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Collects, then fits."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    spec = resolve_spec(args.model, max_length=sys.maxsize, chat_template=False)
    model, tokenizer = load_model(spec, dtype=args.dtype, device=args.device), load_tokenizer(spec)
    try:
        if args.stage != "fit":
            collect(args, Folder(args.work[0]), model, tokenizer)
        if args.stage != "collect":
            fit_gate(args, model, spec.name)
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from what is in {args.work[0]}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
