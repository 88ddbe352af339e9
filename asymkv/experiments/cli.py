"""The command line that the comparison's scripts share; flags of the public code keep their names and meanings."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch

from asymkv.arguments import DTYPES
from asymkv.experiments.arms import Sizes, ablation_arms, load_suite, method_arms
from asymkv.experiments.report import write_report
from asymkv.experiments.suite import Options, run_suite
from asymkv.texts import FORMS

METHODS = ["full", "ours", "zack", "dynamic_kv", "razor", "uncomp"]
LENGTHS = [512, 1024, 2048, 4096, 8192]


def add_common(parser: argparse.ArgumentParser) -> None:
    """Flags of the model, the data and the compression."""
    add = parser.add_argument
    add("--model_name_or_path", default="gpt2", help="short name of configs/models.yaml, hub id or folder")
    add("--dataset_name", default="wikitext-103-v1",
        help=f"text or .jsonl file, folder of such, 'embedded' (text that Python carries), or a data set: {FORMS}")
    add("--dataset_config", help="configuration of --dataset_name, where that names none")
    add("--dataset_cache_dir", help="where the datasets library keeps its files")
    add("--output_dir", type=Path, default=Path("results"), help="folder of records, results.md and visualizations/")
    add("--max_length", type=int, default=2048, help="tokens of the windows that ablations read")
    add("--sample_size", type=int, default=10, help="windows of each length, and articles and rows of each task")
    add("--seed", type=int, default=42, help="of torch; windows and greedy answers do not depend on it")
    add("--fp16", action="store_true", help="the same as --dtype float16")
    add("--dtype", default="auto", choices=DTYPES, help="auto: the checkpoint's")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="torch threads")
    compression = parser.add_argument_group("compression")
    add = compression.add_argument
    add("--max_cache_size", type=int, default=1024, help="B: rows per KV head of every method")
    add("--num_clusters", type=int, default=256, help="K: centroids of ours")
    add("--pruning_interval", type=int, default=512, help="P: own tokens between two compactions, of every method")
    add("--lookback_window", type=int, default=256, help="Delta: queries that judge, of ours")
    add("--kmeans_learning_rate", type=float, default=0.01, help="eta, of ours with kmeans_update: ema")
    baselines = parser.add_argument_group("baselines")
    add = baselines.add_argument
    add("--zack_compression_ratio", type=float, default=0.5, help="share of dimensions that zack keeps")
    add("--dynamic_kv_budget", type=int, help="rows per KV head of dynamic_kv, the mean of its layers; default: B")
    add("--razor_retrieval_head_ratio", type=float, help="share of heads kept whole at most; default: what B holds")
    add("--uncomp_target_compression_ratio", type=float, help="share of rows that uncomp keeps; default: B rows")
    parser.add_argument("--calibration_text", default="embedded",
                        help="as --dataset_name: what razor, uncomp and zack are measured on beforehand, once per "
                             "model, where the user's cache folder lacks it; 'none' = leave them out then")  # fmt: skip
    parser.add_argument("--checkpoint", help="weights or LoRA adapter of scripts/train.py, for the distilled step")
    parser.add_argument("--suite", default="aagc", help="yaml of ablations, or the name of a shipped one")


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """Flags of what is evaluated."""
    add = parser.add_argument
    add("--methods", nargs="+", default=METHODS,
        help="full, ours (aagc), any registered method, names or paths of settings files")
    add("--sequence_lengths", nargs="+", type=int, default=LENGTHS, help="those beyond the model's window are named")
    add("--batch_size", type=int, default=1, help="windows read at a time")
    add("--decode_steps", type=int, default=16, help="generated tokens that are timed behind each window; 0 = none")
    add("--longbench", nargs="+", default=[], help="LongBench tasks, or embedded ones, such as needle")
    add("--data_dir", help="folder of <task>.jsonl for --longbench")
    add("--longbench_config", help="config/ folder of LongBench")
    add("--changed_prompts", action="store_true", help="those of --longbench_config may be others than LongBench's")
    add("--run_ablations", action="store_true", help="vary B, K, P and Delta, and take parts away")
    add("--ablation_lengths", nargs="+", type=int,
        help="tokens of the windows that ablations read; default: --max_length")
    add("--summarization_dataset", default="cnn_dailymail", help="dataset, or jsonl of articles")


def sizes_of(args: argparse.Namespace) -> Sizes:
    """The numbers of every method."""
    ours = {"num_clusters": args.num_clusters, "pruning_interval": args.pruning_interval,
            "lookback_window": args.lookback_window, "kmeans_learning_rate": args.kmeans_learning_rate}  # fmt: skip
    own: dict[str, dict[str, Any]] = {"aagc": ours, "zack": {"ratio": args.zack_compression_ratio}}
    if args.dynamic_kv_budget is not None:
        own["dynamic_kv"] = {"budget": args.dynamic_kv_budget}
    if args.razor_retrieval_head_ratio is not None:
        own["razor"] = {"retrieval_share": args.razor_retrieval_head_ratio}
    if args.uncomp_target_compression_ratio is not None:
        own["uncomp"] = {"ratio": args.uncomp_target_compression_ratio}
    return Sizes(args.max_cache_size, args.pruning_interval, own)


def options_of(args: argparse.Namespace, **extra: Any) -> Options:
    """What is measured, as the flags say."""
    return Options(
        model=args.model_name_or_path, out=args.output_dir, text=args.dataset_name,
        text_config=args.dataset_config,
        lengths=tuple(args.sequence_lengths), ablation_lengths=tuple(args.ablation_lengths or [args.max_length]),
        samples=args.sample_size,
        batch=args.batch_size, decode_steps=args.decode_steps, longbench=tuple(args.longbench), data_dir=args.data_dir,
        longbench_config=args.longbench_config, changed_prompts=args.changed_prompts,
        dtype="float16" if args.fp16 else args.dtype, device=args.device,
        calibration=None if args.calibration_text == "none" else args.calibration_text,
        cache_dir=args.dataset_cache_dir, **extra,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Where the results page is, what was left out and why, and the exit status: 1 if a method was not measured."""

    page: Path
    left_out: list[str]
    status: int


def evaluate(args: argparse.Namespace, options: Options, *, methods: bool = True) -> Outcome:
    """Runs methods and ablations as the flags say, and reports."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    sizes, names = sizes_of(args), args.methods if methods else []
    plan = method_arms(names, sizes)
    if args.run_ablations:
        plan += ablation_arms(load_suite(args.suite), sizes, args.checkpoint)
    results = run_suite(options, plan)
    left_out = [f"skipped: {what}: {why}" for what, why in results["skipped"].items()]
    left_out += [f"not measured: {name}: {why}" for name, why in results["refused"].items()]
    wanted = {Path(name).stem if name.endswith(".yaml") else name for name in names}
    return Outcome(write_report(options.out, results), left_out, int(bool(wanted & set(results["refused"]))))
