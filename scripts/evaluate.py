r"""Perplexity, bytes and speed of compression methods over lengths, and ablations: the evaluation alone.

A smoke run on one CPU core, on text that Python carries:

    python scripts/evaluate.py --model_name_or_path smollm2 --dataset_name embedded --output_dir results/small \
        --methods full h2o dynamic_kv --sequence_lengths 512 1024 --sample_size 2 --max_cache_size 256

All lengths, ablations and summaries:

    python scripts/evaluate.py --model_name_or_path MODEL --dataset_name wikitext:wikitext-103-v1 --output_dir results \
        --methods full ours zack dynamic_kv razor uncomp --run_ablations --summarization --fp16

``zack``, ``razor`` and ``uncomp`` need what ``scripts/calibrate_zack.py`` and ``scripts/find_retrieval_heads.py``
measure once per model; a method that cannot run is named on the results page, with the reason. The same command goes on
where it was interrupted.
"""

from __future__ import annotations

import argparse
import sys

from asymkv.experiments.cli import add_common, add_evaluation, evaluate, options_of


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    add_evaluation(parser)
    parser.add_argument("--summarization", action="store_true", help="summaries, scored by ROUGE")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    outcome = evaluate(args, options_of(args, summaries=args.summarization_dataset if args.summarization else None))
    print(f"results: {outcome.page}")
    print("\n".join(outcome.left_out), file=sys.stderr)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
