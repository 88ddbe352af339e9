"""Teach a model to live with its compressed cache: distillation from the same model on the full one.

    python scripts/train.py --model_name_or_path smollm2 --train_file report.txt --lora --max_length 1024 \\
        --max_cache_size 256 --num_clusters 64 --pruning_interval 128 --lookback_window 64 --output_dir out   # CPU
    accelerate launch scripts/train.py --model_name_or_path gpt2 --bf16 --max_length 1024 --max_cache_size 512 \\
        --num_clusters 128 --output_dir out                                                                   # GPUs

The flags of AAGC's public code keep their names. A run that was stopped goes on with the same command and ``--resume``.
Writes checkpoints, ``log.jsonl``, ``run.json`` (settings, model, texts, and where each start of the run was made) and
``final_model`` (weights or adapter, tokenizer, ``compression.yaml``) to the output folder; validation is perplexity on
the real compressed cache, and beside it on the full one.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator

import asymkv
from asymkv.distill import checkpoints
from asymkv.distill.student import POSITIONS, DistillSettings, Student
from asymkv.distill.text import read_dataset, to_blocks
from asymkv.distill.trainer import Trainer, TrainSettings
from asymkv.experiments.corpus import digest
from asymkv.files import write_atomic
from asymkv.fingerprint import fingerprint
from asymkv.longbench.conditions import conditions
from asymkv.longbench.models import load_model, load_tokenizer, resolve_spec
from asymkv.methods import METHODS, get_method
from asymkv.texts import FORMS, read_files

# flags of the public code that are settings of a method
SEED_OPTIONS = ("num_clusters", "pruning_interval", "lookback_window", "kmeans_learning_rate")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # model
    add("--model_name_or_path", default="gpt2", help="short name of configs/models.yaml, hub id or folder")
    add("--lora", action="store_true", help="train low-rank adapters (peft); the teacher is the model without them")
    add("--lora_rank", type=int, default=16)
    add("--lora_alpha", type=int, default=32)
    add("--lora_targets", default="all-linear", help="peft's target_modules, separated by commas")
    add("--bf16", action="store_true", help="mixed precision")
    add("--fp16", action="store_true", help="mixed precision with loss scaling (CUDA)")
    add("--cpu", action="store_true", help="stay on the CPU")
    # text
    add("--dataset_name", default="wikitext-103-v1", help=f"data set of the hub: {FORMS}")
    add("--train_file", nargs="+", help="local .txt, .md or .jsonl files instead")
    add("--validation_file", nargs="+", help="local files; else the last twentieth of --train_file's blocks")
    add("--dataset_cache_dir", help="where datasets keeps its files")
    add("--sample_size", type=int, help="blocks of text to take at most")
    add("--max_length", type=int, default=2048, help="tokens of a block")
    # compression
    add("--use_compression", action=argparse.BooleanOptionalAction, default=True, help="train on a compressed cache")
    add("--method", default="aagc", choices=sorted(METHODS), help="compression method")
    add("--max_cache_size", type=int, default=1024, help="rows per KV head (B)")
    add("--num_clusters", type=int, default=256, help="aagc: centroids (K); at least B: prune only")
    add("--pruning_interval", type=int, default=512, help="tokens between compactions (P)")
    add("--lookback_window", type=int, default=256, help="aagc: judging queries (Delta)")
    add("--kmeans_learning_rate", type=float, default=0.01, help="aagc: eta of kmeans_update=ema")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting of the cache or the method")
    # distillation
    add("--temperature", type=float, default=2.0)
    add("--distillation_weight", type=float, default=0.5, help="lambda of T^2 KL; 0 = no teacher")
    add("--distill_positions", choices=POSITIONS, default="all", help="compressed: only after the first compaction")
    add("--bptt_chunks", type=int, default=2, help="chunks that a gradient flows back through")
    add("--gradient_checkpointing", action="store_true", help="our own, chunk by chunk")
    # training
    add("--output_dir", type=Path, default=Path("results/distill"))
    add("--resume", nargs="?", const="", metavar="CHECKPOINT", help="go on from a checkpoint, or the newest one")
    add("--num_train_epochs", type=int, default=3)
    add("--max_steps", type=int, help="updates, instead of epochs")
    add("--train_batch_size", type=int, default=4)
    add("--eval_batch_size", type=int, default=4)
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--learning_rate", type=float, default=5e-5)
    add("--weight_decay", type=float, default=0.01)
    add("--warmup_steps", type=int, default=500)
    add("--max_grad_norm", type=float, default=1.0)
    add("--seed", type=int, default=42)
    add("--logging_steps", type=int, default=100)
    add("--save_steps", type=int, default=1000)
    add("--evaluate_during_training", action="store_true", help="validate before the end too")
    add("--evaluation_strategy", choices=("epoch", "steps"), default="epoch")
    add("--eval_steps", type=int, help="with --evaluation_strategy steps")
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program for flags that do not go together."""
    if args.bf16 and args.fp16:
        parser.error("give one of --bf16 and --fp16")
    if args.evaluate_during_training and args.evaluation_strategy == "steps" and not args.eval_steps:
        parser.error("--evaluation_strategy steps needs --eval_steps")
    if args.max_length < 2:
        parser.error(f"--max_length must be at least 2, a token and the one that it is to say; found {args.max_length}")
    unfit = [item for item in args.set if "=" not in item]
    if unfit:
        parser.error(f"--set takes KEY=VALUE, such as window_size=8; found {unfit}")


def compression(args: argparse.Namespace) -> asymkv.CompressionConfig:
    """The cache's settings."""
    if not args.use_compression:
        return asymkv.CompressionConfig("full")
    interval = {"chunk_size": args.pruning_interval, "decode_interval": args.pruning_interval}
    given: dict[str, Any] = {"budget": args.max_cache_size, **interval}
    own = {field.name for field in dataclasses.fields(get_method(args.method)) if field.init}
    given |= {name: getattr(args, name) for name in SEED_OPTIONS if name in own}
    given |= {key: yaml.safe_load(value) for key, value in (item.split("=", 1) for item in args.set)}
    return asymkv.CompressionConfig(args.method, **given)


def make_student(args: argparse.Namespace, config: asymkv.CompressionConfig) -> tuple[Student, Any, dict[str, Any]]:
    """The student with its teacher, the tokenizer, and what the model is known again by (before any adapter)."""
    # Blocks are cut here: the table only knows where the weights are.
    spec = resolve_spec(args.model_name_or_path, max_length=sys.maxsize, chat_template=False)
    model, tokenizer = load_model(spec, dtype=torch.float32, device="cpu"), load_tokenizer(spec)
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and args.max_length > most:
        raise ValueError(f"--max_length {args.max_length} is more than the {most} positions of this model")
    origin = fingerprint(model, any_dtype=True)
    settings = DistillSettings(args.temperature, args.distillation_weight, args.bptt_chunks,
                               args.gradient_checkpointing, args.distill_positions)  # fmt: skip
    if not args.lora:
        teacher = copy.deepcopy(model) if args.distillation_weight else None
        return Student(model, config, settings, teacher), tokenizer, origin
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ImportError("--lora needs the package peft: pip install 'asymkv[train]'") from None
    targets = args.lora_targets if args.lora_targets == "all-linear" else args.lora_targets.split(",")
    torch.manual_seed(args.seed)  # of the adapters' first weights
    lora = LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=targets, task_type="CAUSAL_LM")
    return Student(get_peft_model(model, lora), config, settings), tokenizer, origin


def read_blocks(args: argparse.Namespace, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of text to train on and to validate on."""

    def blocks(files: list[str] | None, split: str) -> torch.Tensor:
        texts = read_files(files) if files else read_dataset(args.dataset_name, split, args.dataset_cache_dir)
        return to_blocks(texts, tokenizer, args.max_length, args.sample_size)

    train = blocks(args.train_file, "train")
    if args.validation_file or not args.train_file:
        return train, blocks(args.validation_file, "validation")
    held = max(len(train) // 20, 1)
    if held == len(train):
        raise ValueError(f"--train_file holds one block of {args.max_length} tokens and leaves none to validate on; "
                         "give --validation_file, more text or a smaller --max_length")
    return train[:-held], train[-held:]


def train_settings(args: argparse.Namespace) -> TrainSettings:
    """The trainer's settings; without validation during training it comes at the end."""
    names = [n for n in TrainSettings.__dataclass_fields__ if hasattr(args, n) and n != "eval_steps"]
    by_steps = args.eval_steps if args.evaluation_strategy == "steps" else None
    eval_steps = by_steps if args.evaluate_during_training else sys.maxsize
    return TrainSettings(**{n: getattr(args, n) for n in names}, eval_steps=eval_steps)


def record_run(args: argparse.Namespace, found: dict[str, Any], device: Any) -> None:
    """Writes what a run is, and adds to what it was made on, in ``run.json``."""
    path = args.output_dir / "run.json"
    starts = json.loads(path.read_text(encoding="utf-8"))["starts"] if args.resume is not None and path.exists() else []
    packages = ["accelerate", *(["peft"] if args.lora else [])]
    table = {"arguments": vars(args), **found, "starts": [*starts, conditions(device, packages)]}
    write_atomic(path, json.dumps(table, indent=2, default=str) + "\n")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    config, settings = compression(args), train_settings(args)  # bad settings fail before the model is loaded
    accelerator = Accelerator(mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no", cpu=args.cpu)
    if args.resume is None:
        checkpoints.refuse_others(args.output_dir)
    student, tokenizer, origin = make_student(args, config)
    train, validation = read_blocks(args, tokenizer)
    trainer = Trainer(student, train, validation, args.output_dir, settings, accelerator)
    if args.resume is not None:
        step = trainer.resume(args.resume or None)
        accelerator.print(f"going on after update {step} of {trainer.total}")
    if accelerator.is_main_process:
        texts = {name: {"blocks": len(x), "sha256": digest(x)} for name, x in (("train", train), ("val", validation))}
        record_run(args, {"model": origin, "cache": config.to_dict(), "texts": texts}, accelerator.device)
    found = trainer.fit()
    if accelerator.is_main_process:
        target = args.output_dir / "final_model"
        student.model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        (target / "compression.yaml").write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
        print(", ".join(f"{name} {value:.4f}" for name, value in found.items()), f"-> {target}")
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
