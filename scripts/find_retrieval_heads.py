"""Measures what methods need to know of a model's heads, once per model.

    python scripts/find_retrieval_heads.py --model smollm2                       # induction and echo scores
    python scripts/find_retrieval_heads.py --model smollm2 --block 256           # a minute on one CPU core
    python scripts/find_retrieval_heads.py --model smollm2 --kind entropy --text-file report.txt
    python scripts/find_retrieval_heads.py --model smollm2 --kind kvzip --text-file report.txt   # heads for reuse
    python scripts/find_retrieval_heads.py --model smollm2 --kind stages --text-file report.txt  # layers, for uncomp

Files go where ``razor``, ``duo_attention``, ``headkv`` and ``uncomp`` look for them (``$ASYMKV_CACHE`` or the user's
cache folder), or into ``--out``. Retrieval scores need no data; the others need a text.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from asymkv.analysis.head_entropy import TOP, entropy_scores
from asymkv.analysis.hidden_entropy import THRESHOLD, measure_stages
from asymkv.analysis.kvzip_heads import kvzip_scores
from asymkv.analysis.retrieval_heads import BLOCK, REPEATS, retrieval_scores
from asymkv.arguments import DTYPES
from asymkv.budgets.scored import Retrieval
from asymkv.head_scores import HeadScores, write_pattern
from asymkv.layer_stages import KIND as STAGES
from asymkv.longbench.models import load_model, load_tokenizer, parse_dtype, resolve_spec
from asymkv.texts import read_text, samples_of

TEXT_KINDS = ("entropy", "kvzip", STAGES)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="short name of configs/models.yaml, hub id or folder")
    add("--kind", choices=("retrieval", *TEXT_KINDS), default="retrieval",
        help="induction and echo scores, entropies, KVzip's best score of each head, or the layers' stages")
    add("--out", type=Path, help="folder for <kind>.json instead of the user's cache folder")
    add("--block", type=int, default=BLOCK, help="random tokens in a block; cut where the model's window is short")
    add("--repeats", type=int, default=REPEATS, help="times that the block is read")
    add("--seed", type=int, default=0, help="of the random tokens")
    add("--text-file", type=Path, help="text for --kind entropy, kvzip and stages")
    add("--tokens", type=int, default=2048, help="tokens of the text in one sample")
    add("--samples", type=int, default=4, help="samples of the text at most")
    add("--eigenvalues", type=int, default=TOP, help="largest eigenvalues that count")
    add("--threshold", type=float, default=THRESHOLD, help="change of entropy, in percent, below which a stage begins")
    add("--duo-pattern", type=Path, metavar="FOLDER", help="also write the induction scores as DuoAttention's pattern")
    add("--share", type=float, default=0.15, help="heads to name at the end")
    add("--dtype", default="auto", choices=DTYPES, help="of the model")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if (args.kind in TEXT_KINDS) != (args.text_file is not None):
        parser.error(f"--text-file goes with --kind {' and '.join(TEXT_KINDS)}, which need it")
    if args.kind in ("entropy", STAGES) and args.duo_pattern is not None:
        parser.error("--duo-pattern is written from retrieval or KVzip scores")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    spec = resolve_spec(args.model, max_length=sys.maxsize, chat_template=False)
    dtype = parse_dtype(args.dtype)
    model, tokenizer = load_model(spec, dtype=dtype, device=args.device), load_tokenizer(spec)
    if args.kind == STAGES:
        return save_stages(args, model, tokenizer)
    if args.kind == "retrieval":
        with tqdm(total=model.config.num_hidden_layers, unit="layer", desc="induction, echo") as bar:
            found = retrieval_scores(
                model, block=args.block, repeats=args.repeats, seed=args.seed, special_ids=tokenizer.all_special_ids,
                progress=lambda _: bar.update(),
            )  # fmt: skip
    else:
        found = {args.kind: scores_of_text(args, model, tokenizer)}
    for kind, scores in found.items():
        print(f"{kind}: {scores.save(None if args.out is None else args.out / f'{kind}.json')}")
    if args.duo_pattern is not None:
        first = next(iter(found.values()))
        table = first.table / first.table.max().clamp(min=1)
        write_pattern(args.duo_pattern, table, sink_size=64, recent_size=256, model=first.model)
    report(found, args.share)
    return 0


def save_stages(args: argparse.Namespace, model: PreTrainedModel, tokenizer: Any) -> int:
    """Measures the layers' stages, writes the file and says where they begin."""
    samples = samples_of(read_text(args.text_file), tokenizer, args.tokens, args.samples)
    with tqdm(total=len(samples) * model.config.num_hidden_layers, unit="layer", desc=STAGES) as bar:
        found = measure_stages(model, samples, threshold=args.threshold, progress=lambda _: bar.update())
    print(f"{STAGES}: {found.save(None if args.out is None else args.out / f'{STAGES}.json')}")
    begin = [i for i, stage in enumerate(found.stages) if i == 0 or stage > found.stages[i - 1]]
    print(f"{len(begin)} stages, from layers {' '.join(map(str, begin))}")
    return 0


def scores_of_text(args: argparse.Namespace, model: PreTrainedModel, tokenizer: Any) -> HeadScores:
    """Scores that are measured on samples of a text."""
    samples = samples_of(read_text(args.text_file), tokenizer, args.tokens, args.samples)
    if args.kind == "kvzip":
        return kvzip_scores(model, tokenizer, tqdm(samples, unit="sample", desc="kvzip"))
    with tqdm(total=len(samples) * model.config.num_hidden_layers, unit="layer", desc="entropy") as bar:
        return entropy_scores(model, samples, top=args.eigenvalues, progress=lambda _: bar.update())


def report(found: dict[str, HeadScores], share: float) -> None:
    """Prints the heads that stand out."""
    if "entropy" in found:
        table = found["entropy"].table
        low, high = table.min().item(), table.max().item()
        print(f"H_{found['entropy'].measured['top']} / ln d from {low:.3f} to {high:.3f}, mean {table.mean():.3f}")
        return
    split = Retrieval(share=share, echo="echo" in found)
    # A single kind ranks heads by itself, whatever it is.
    tables = {"induction" if len(found) == 1 else kind: scores.table for kind, scores in found.items()}
    order = split.combine(tables)
    count, heads = split.full_heads(order), order.shape[1]
    print(f"{count} of {order.numel()} KV heads, best first (layer.head {' '.join(found)}):")
    for index in order.flatten().argsort(descending=True, stable=True)[:count].tolist():
        values = [scores.table.flatten()[index].item() for scores in found.values()]
        print(f"  {index // heads}.{index % heads} " + " ".join(f"{v:.3f}" for v in values))


if __name__ == "__main__":
    sys.exit(main())
