"""Bytes that head-wise methods really hold after a prompt, here and in kvpress, which masks what it drops.

    python scripts/bench_headwise_memory.py --model smollm2 --text-file report.txt --tokens 2048 --out results/memory

Where kvpress is importable (it wants transformers < 5.3) its presses are measured in the same process, else their
column stays empty: set ``PYTHONPATH=$(python -m asymkv.longbench.peers --install)``. Methods with head scores need
scripts/find_retrieval_heads.py once before; those that lack them are named, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache

import asymkv
from asymkv.arguments import DTYPES
from asymkv.files import csv_text, write_atomic
from asymkv.longbench.arms import full_cache_bytes
from asymkv.longbench.conditions import commit, device_name
from asymkv.longbench.models import load_model, load_tokenizer, resolve_spec
from asymkv.texts import read_text

METHODS = (
    "kvpress_adakv_snapkv", "kvpress_adakv_expected_attention", "criticalkv_adakv", "kvpress_kvzip", "asymkv_adaptive",
    "headkv", "uncomp", "razor", "duo_attention",
)  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2", help="short name of configs/models.yaml, hub id or folder")
    add("--text-file", type=Path, required=True, help="the prompt")
    add("--tokens", type=int, default=2048, help="of the prompt")
    add("--ratios", type=float, nargs="+", default=[0.5, 0.25, 0.1], help="shares of rows kept")
    add("--dtype", default="bfloat16", choices=DTYPES[1:])
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=1)
    add("--out", type=Path, required=True, help="folder for memory.csv and conditions.json")
    return parser.parse_args(argv)


def ours(model: Any, ids: torch.Tensor, setting: str, ratio: float) -> int:
    with asymkv.replace(model.config.model_type, setting, model=model, ratio=ratio, decode_interval=0):
        return model(ids, logits_to_keep=1).past_key_values.nbytes


def theirs(model: Any, ids: torch.Tensor, make: Callable[[float], Any], ratio: float) -> int:
    cache = DynamicCache()
    with make(1 - ratio)(model):
        model.model(input_ids=ids, past_key_values=cache)
    buffers = (x for layer in cache.layers for x in (layer.keys, layer.values))
    return sum(x.untyped_storage().nbytes() for x in buffers)


def presses() -> dict[str, Callable[[float], Any]]:
    """kvpress's press behind each of our settings, as a function of the share that it removes; empty without it."""
    if importlib.util.find_spec("kvpress") is None:
        return {}
    import kvpress

    snapkv, expected = kvpress.SnapKVPress, kvpress.ExpectedAttentionPress
    return {
        "kvpress_adakv_snapkv": lambda r: kvpress.AdaKVPress(snapkv(r)),
        "kvpress_adakv_expected_attention": lambda r: kvpress.AdaKVPress(expected(r)),
        "criticalkv_adakv": lambda r: kvpress.CriticalAdaKVPress(snapkv(r)),
        "kvpress_kvzip": kvpress.KVzipPress,
    }


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    spec = resolve_spec(args.model, max_length=sys.maxsize, chat_template=False)
    model = load_model(spec, dtype=getattr(torch, args.dtype), device=args.device)
    ids = load_tokenizer(spec)(read_text(args.text_file), return_tensors="pt").input_ids
    ids = ids[:, : args.tokens].to(args.device)
    full, rows = full_cache_bytes(model, ids.shape[1]), []
    peers, refused = presses(), {}
    for setting in tqdm(METHODS):
        for ratio in args.ratios:
            row = {"method": setting, "ratio": ratio, "stock bytes": full, "asymkv bytes": "", "asymkv share": "",
                   "kvpress bytes": "", "kvpress share": ""}  # fmt: skip
            try:
                found = {"asymkv": ours(model, ids, setting, ratio)}
            except ValueError as error:
                refused[setting] = str(error)
                break
            if setting in peers:
                found["kvpress"] = theirs(model, ids, peers[setting], ratio)
            for name, size in found.items():
                row |= {f"{name} bytes": size, f"{name} share": f"{size / full:.3f}"}
            rows.append(row)
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out / "memory.csv", csv_text(rows))
    names = ("torch", "transformers", *(["kvpress"] if peers else []))
    conditions = {"model": args.model, "tokens": ids.shape[1], "dtype": args.dtype, "commit": commit(),
                  "device": device_name(torch.device(args.device)), **{n: version(n) for n in names}}  # fmt: skip
    write_atomic(args.out / "conditions.json", json.dumps(conditions, indent=1) + "\n")
    names = list(rows[0])
    print("\n".join("| " + " | ".join(str(r[n]) for n in names) + " |" for r in [{n: n for n in names}, *rows]))
    for setting, reason in refused.items():
        print(f"not measured: {setting}: {reason}", file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
