"""Every method against the full cache on one prompt: both answers side by side, and what each stored.

    python scripts/compare.py --model smollm2 --ratio 0.25 --context-file report.txt --question "Who wrote it?"
    python scripts/compare.py --model smollm2 --methods asymkv,kvzip,kvpress_snapkv --protocol context ...

``--protocol prompt`` (the default) has the question in view while compressing; ``context`` compresses the context
before the question is known. Methods are registered names, shipped settings or yaml files; finished ones are in
``--out`` (json) and are not run again unless their settings have changed. A method that cannot run is named with its
reason before the table, and the exit code is 1; without the full cache there is no table.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm
from transformers import PreTrainedModel

import asymkv
from asymkv.arguments import DTYPES, names, positive
from asymkv.files import write_atomic
from asymkv.longbench.conditions import commit, device_name
from asymkv.longbench.jsonl import read_object
from asymkv.longbench.measure import Clock
from asymkv.longbench.models import load_model, load_tokenizer, resolve_spec, weights_sha256
from asymkv.methods import METHODS
from asymkv.provenance import files_of
from asymkv.texts import read_text

FULL = "full"


@dataclasses.dataclass
class Answer:
    """What a method said, and at what price."""

    method: str
    text: str
    kept_ratio: float
    nbytes: int
    prefill_seconds: float
    total_seconds: float
    config: dict[str, Any] | None = None  # of the method; None in files that did not store it
    files: dict[str, str] | None = None  # digests of gates, head scores and bases that it read
    conditions: dict[str, Any] | None = None  # commit, device, threads and versions that it was run with


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="short name of configs/models.yaml, hub id or folder")
    add("--methods", type=names, help="comma-separated; default: all that can be had at this size")
    add("--ratio", type=float, help="share of the prompt's rows to keep")
    add("--budget", help="rows per KV head, or bytes such as 512MiB, instead of --ratio")
    add("--context", help="the context itself")
    add("--context-file", type=Path, help="file that holds the context")
    add("--question", required=True)
    add("--protocol", choices=("prompt", "context"), default="prompt")
    add("--max-new-tokens", type=positive, default=64)
    add("--dtype", default="auto", choices=DTYPES)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=positive, help="torch threads")
    add("--out", type=Path, help="json file of answers, read again by the next call")
    args = parser.parse_args(argv)
    if (args.context is None) == (args.context_file is None):
        parser.error("give exactly one of --context and --context-file")
    if (args.ratio is None) == (args.budget is None):
        parser.error("give exactly one of --ratio and --budget")
    return args


def config_of(name: str, args: argparse.Namespace) -> asymkv.CompressionConfig:
    """Settings of a registered method, a shipped file or a path."""
    budget = int(args.budget) if args.budget and args.budget.isdigit() else args.budget
    given: dict[str, Any] = {"budget": budget, "ratio": args.ratio}
    size = {k: v for k, v in given.items() if v is not None and name != FULL}
    return asymkv.CompressionConfig.named(name, **size)


def answer(
    args: argparse.Namespace, name: str, model: PreTrainedModel, tokenizer: Any, context: str, config: Any
) -> Answer:
    """One method's answer."""
    kwargs: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
    clock = Clock(model)
    if args.protocol == "context":
        cache = asymkv.compress(model, tokenizer, context, config)
        stats, prefill = cache.stats(), clock.lap()
        text = asymkv.ask(model, tokenizer, cache, args.question, **kwargs)
        return Answer(name, text, stats["kept_ratio"], stats["nbytes"], prefill, prefill + clock.lap())
    prompt = f"{context}\n\n{args.question}"
    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                               add_generation_prompt=True)  # fmt: skip
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).input_ids
    ids = ids.to(model.device)
    with asymkv.replace(model.config.model_type, config, model=model), torch.no_grad():
        first = model(ids, logits_to_keep=1)
        stats, prefill = first.past_key_values.stats(), clock.lap()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)  # type: ignore[operator]
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    return Answer(name, text, stats["kept_ratio"], stats["nbytes"], prefill, clock.lap())


def plain(config: asymkv.CompressionConfig) -> dict[str, Any]:
    """A method's settings as they are read again from json."""
    return json.loads(json.dumps(config.to_dict(), default=str))


def settings_of(args: argparse.Namespace, context: str) -> dict[str, Any]:
    """What answers must share to stand in one table; the weights are added when they are loaded."""
    shared = ("model", "ratio", "budget", "question", "protocol", "max_new_tokens", "dtype", "device")
    digest = hashlib.sha256(context.encode()).hexdigest()
    threads = {"threads": torch.get_num_threads()} if args.device == "cpu" else {}  # times are compared
    return {**{n: getattr(args, n) for n in shared}, **threads, "context_sha256": digest}


def earlier(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Answer]:
    """Answers of an earlier call.

    Args:
        settings: of this call; what is not in them yet is not compared.

    Raises:
        ValueError: for a file of other settings, or one that is no file of answers.
    """
    if args.out is None or not args.out.exists():
        return {}
    found, known = read_answers(args.out)
    differing = {k: (found["settings"].get(k), v) for k, v in settings.items() if found["settings"].get(k) != v}
    if differing:
        raise ValueError(f"{args.out} holds answers of other settings, (there, here): {differing}; use another --out")
    return {each.method: each for each in known}


def configs_of(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings by name, the full cache's first; and why others cannot be had. Before a model is loaded.

    Raises:
        ValueError: for a method that was asked for by name; of all methods, where none can be had.
    """
    configs, refused = {}, {}
    for name in dict.fromkeys([FULL, *(args.methods or METHODS)]):
        try:
            configs[name] = config_of(name, args)
        except ValueError as error:
            if args.methods:
                raise
            refused[name] = str(error)
    if not configs.keys() - {FULL} and refused:
        raise ValueError(next(iter(refused.values())))
    return configs, refused


def read_answers(path: Path) -> tuple[dict[str, Any], list[Answer]]:
    """The json object of an answers' file, and its answers.

    Raises:
        ValueError: for anything else; names the file.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; --out takes a json file of answers, or a name for one")
    found = read_object(path)
    try:
        dict(found["settings"])
        return found, [Answer(**each) for each in found["answers"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of answers, which has settings and answers with the fields "
                         f"{', '.join(Answer.__annotations__)}: {type(error).__name__}: {error}") from error


def save(args: argparse.Namespace, settings: dict[str, Any], answers: dict[str, Answer]) -> None:
    if args.out is None:
        return
    table = {"settings": settings, "answers": [vars(a) for a in answers.values()]}
    write_atomic(args.out, json.dumps(table, indent=1, ensure_ascii=False) + "\n")


def run(
    args: argparse.Namespace, settings: dict[str, Any], configs: dict[str, Any], context: str
) -> tuple[dict[str, Answer], dict[str, str]]:
    """All answers, those of an earlier call among them where nothing has changed; and what could not be run, and why.

    Raises:
        ValueError: for an ``--out`` of other settings or weights.
    """
    earlier(args, settings)  # other settings are told before the model is loaded
    spec = resolve_spec(args.model, max_length=sys.maxsize, chat_template=False)
    dtype = {} if args.dtype == "auto" else {"dtype": getattr(torch, args.dtype)}
    model, tokenizer = load_model(spec, device=args.device, **dtype), load_tokenizer(spec)
    settings = {**settings, "weights_sha256": weights_sha256(model)}
    refused: dict[str, str] = {}
    files = {name: files_of(config, model) for name, config in configs.items()}
    answers = {name: each for name, each in earlier(args, settings).items()
               if name not in configs or (each.config, each.files) == (plain(configs[name]), files[name])}  # fmt: skip
    conditions = {"commit": commit(), "device": device_name(torch.device(args.device)), "torch": torch.__version__}
    for name in tqdm([n for n in configs if n not in answers], desc="methods"):
        try:
            found = answer(args, name, model, tokenizer, context, configs[name])
            more = {"config": plain(configs[name]), "files": files[name], "conditions": conditions}
            answers[name] = dataclasses.replace(found, **more)
        except ValueError as error:
            refused[name] = str(error)
        save(args, settings, answers)
    return answers, refused


def show(answers: dict[str, Answer], args: argparse.Namespace) -> None:
    """Both answers side by side, the full cache's on the left; what a model said is never read as markup."""
    full = answers[FULL]
    size = f"ratio {args.ratio}" if args.ratio is not None else f"budget {args.budget}"
    title = Text(f"{args.model}, protocol {args.protocol}, {size}", "table.title")
    table = Table(title=title, show_lines=True, expand=True)
    table.add_column(f"full cache\n{full.nbytes / 2**20:.2f} MiB, prefill {full.prefill_seconds:.1f} s", ratio=1)
    table.add_column("method", ratio=1)
    for each in answers.values():
        if each.method != FULL:
            price = (f" {each.kept_ratio:.1%} of the rows, {each.nbytes / 2**20:.2f} MiB, "
                     f"{each.prefill_seconds / full.prefill_seconds:.2f} x prefill\n")  # fmt: skip
            table.add_row(Text(full.text), Text.assemble((each.method, "bold"), price, each.text))
    Console().print(table)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if args.threads:
        torch.set_num_threads(args.threads)
    configs, impossible = configs_of(args)
    context = args.context if args.context is not None else read_text(args.context_file)
    answers, refused = run(args, settings_of(args, context), configs, context)
    refused = {**impossible, **refused}
    for name, reason in refused.items():
        print(f"not run: {name}: {reason}", file=sys.stderr)
    if FULL in answers:
        show({name: answers[name] for name in configs if name in answers}, args)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
