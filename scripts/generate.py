"""Generate text on a compressed cache: the one-file quick start.

    python scripts/generate.py --model smollm2 --method asymkv --budget 512 --prompt-file report.txt
    python scripts/generate.py --model meta-llama/Llama-3.1-8B-Instruct --ratio 0.25 --prompt "Tell me about ..."
    python scripts/generate.py --model tiny --random --budget 64 --prompt-tokens 400   # random weights, no download

``--method`` takes a registered method, a shipped setting or a yaml file; other settings go as ``--set key=value``
(``--set curvature=loss``). Prints the text, then what was stored.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import asymkv
from asymkv.arguments import DTYPES, positive
from asymkv.longbench.models import load_model, load_tokenizer, resolve_spec
from asymkv.texts import read_text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="short name of configs/models.yaml, hub id or folder")
    parser.add_argument("--method", default="asymkv", help="method, shipped setting (kvpress_snapkv) or yaml file")
    parser.add_argument("--budget", help="rows per KV head, or bytes such as 512MiB")
    parser.add_argument("--ratio", type=float, help="share of the prompt's rows to keep, instead of --budget")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting")
    parser.add_argument("--prompt", help="the prompt itself")
    parser.add_argument("--prompt-file", type=Path, help="file that holds the prompt")
    parser.add_argument("--prompt-tokens", type=positive, help="so many random tokens instead of text")
    parser.add_argument("--random", action="store_true", help="tiny random Llama instead of real weights")
    parser.add_argument("--max-new-tokens", type=positive, default=128)
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-chat", action="store_true", help="feed the prompt without the chat template")
    args = parser.parse_args(argv)
    if sum(x is not None for x in (args.prompt, args.prompt_file, args.prompt_tokens)) != 1:
        parser.error("give exactly one of --prompt, --prompt-file and --prompt-tokens")
    if args.random and args.prompt_tokens is None:
        parser.error("--random has no tokenizer; use --prompt-tokens")
    return args


def settings(args: argparse.Namespace) -> asymkv.CompressionConfig:
    pairs = dict(item.split("=", 1) for item in args.set)
    options = {key: yaml.safe_load(value) for key, value in pairs.items()}
    budget = int(args.budget) if args.budget and args.budget.isdigit() else args.budget
    size = {key: value for key, value in (("budget", budget), ("ratio", args.ratio)) if value is not None}
    return asymkv.CompressionConfig.named(args.method, **size, **options)


def load(args: argparse.Namespace) -> tuple:
    """Model and tokenizer (None for random weights)."""
    if args.random:
        torch.manual_seed(0)
        config = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, vocab_size=256, max_position_embeddings=1 << 20)  # fmt: skip
        return LlamaForCausalLM(config).eval().to(args.device), None
    # The prompt is fed whole, and the chat template is ours to apply: the table only knows where the weights are.
    spec = resolve_spec(args.model, max_length=sys.maxsize, chat_template=False)
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    return load_model(spec, **({} if dtype is None else {"dtype": dtype}), device=args.device), load_tokenizer(spec)


def encode(args: argparse.Namespace, tokenizer: object, vocab: int) -> torch.Tensor:
    if args.prompt_tokens is not None:
        return torch.randint(3, vocab, (1, args.prompt_tokens))
    text = args.prompt if args.prompt is not None else read_text(args.prompt_file)
    if tokenizer.chat_template and not args.no_chat:  # type: ignore[attr-defined]
        text = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    plain = args.no_chat or not tokenizer.chat_template  # type: ignore[attr-defined]
    return tokenizer(text, return_tensors="pt", add_special_tokens=plain).input_ids  # type: ignore[operator]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    config = settings(args)  # bad settings fail before the model is loaded
    model, tokenizer = load(args)
    ids = encode(args, tokenizer, model.config.vocab_size).to(args.device)
    with asymkv.replace(model.config.model_type, config, model=model):
        start = time.perf_counter()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.max_new_tokens,
                             do_sample=False, return_dict_in_generate=True)  # fmt: skip
        seconds = time.perf_counter() - start
    new = out.sequences[0, ids.shape[1] :]
    print(tokenizer.decode(new, skip_special_tokens=True) if tokenizer else new.tolist())
    stats = out.past_key_values.stats()
    print(
        f"\n[{config.describe()}] {stats['tokens_seen'][0]} tokens seen, at most {stats['max_rows']} rows per KV head "
        f"stored ({stats['nbytes'] / 2**20:.2f} MiB, {stats['kept_ratio']:.1%} of the rows), peak {stats['peak_rows']} "
        f"rows; {seconds:.1f} s",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
