r"""One command for the whole table: every method over lengths, ablations, summaries, LongBench rows, page and plots.

    python scripts/run_experiments.py --model_name_or_path gpt2 --output_dir results --dataset_name wikitext \
        --dataset_config wikitext-103-v1 --max_length 2048 --sample_size 10 --run_evaluation --run_ablations --fp16

A smoke run on one CPU core, on text that Python carries:

    python scripts/run_experiments.py --model_name_or_path smollm2 --dataset_name embedded --output_dir results/small \
        --sequence_lengths 512 1024 --max_length 1024 --sample_size 1 --max_cache_size 256 --num_clusters 64 \
        --pruning_interval 256 --lookback_window 128 --run_evaluation --run_ablations

Without a ``--run_*`` flag, evaluation and ablations run. ``--checkpoint`` (of ``scripts/train.py``) adds the step of
distillation. The same command goes on where it was interrupted; ``scripts/evaluate.py`` takes the same settings.
"""

from __future__ import annotations

import argparse
import sys

from asymkv.experiments.cli import add_common, add_evaluation, evaluate, options_of


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    add_evaluation(parser)
    parts = parser.add_argument_group("parts")
    parts.add_argument("--run_evaluation", action="store_true", help="the methods over all lengths")
    parts.add_argument("--run_summarization", action="store_true", help="summaries of the methods, scored by ROUGE")
    args = parser.parse_args(argv)
    if not (args.run_evaluation or args.run_ablations or args.run_summarization):
        args.run_evaluation = args.run_ablations = True
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if not args.run_evaluation:
        args.sequence_lengths, args.longbench = [], []
    summaries = args.summarization_dataset if args.run_summarization else None
    options = options_of(args, summaries=summaries)
    outcome = evaluate(args, options, methods=args.run_evaluation or args.run_summarization)
    print(f"results: {outcome.page}")
    print("\n".join(outcome.left_out), file=sys.stderr)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
