"""Are neighbouring keys alike and neighbouring values not? The observation behind AsymKV, on any decoder and any text.

    python scripts/plot_asymmetry.py --model smollm2 --text-file README.md --out results/asymmetry
    python scripts/plot_asymmetry.py --model smollm2 --text-file README.md --tokens 128 --windows 1 --out DIR   # smoke

Writes tables (heads.csv, lags.csv, asymmetry.md), figures (heatmaps, distributions, lags) and conditions (run.json).
A window of 512 tokens of a 135M model takes about 40 s of one CPU core; time and memory grow with its square.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from asymkv.analysis.asymmetry import MAX_LAG, SINK_SIZE, measure_asymmetry, text_windows
from asymkv.analysis.asymmetry_report import write_report
from asymkv.files import sha256
from asymkv.longbench.conditions import commit, device_name
from asymkv.longbench.models import load_model, load_tokenizer, parse_dtype, resolve_spec
from asymkv.texts import read_text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2", help="short name of configs/models.yaml, hub id or folder of any decoder")
    add("--text-file", type=Path, required=True, help="what the model reads (UTF-8)")
    add("--tokens", type=int, default=512, help="tokens of a window")
    add("--windows", type=int, default=4, help="windows of the text at most, one after the other from its beginning")
    add("--sink-size", type=int, default=SINK_SIZE, help="first tokens of a window that the second reading leaves out")
    add("--max-lag", type=int, default=MAX_LAG, help="largest distance of plain cosines")
    add("--dtype", default="float32", choices=("auto", "float32", "bfloat16", "float16"), help="of the model")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=1, help="torch threads")
    add("--no-figures", action="store_true", help="tables only")
    add("--out", type=Path, required=True, help="folder of the report")
    return parser.parse_args(argv)


def conditions_of(args: argparse.Namespace, model: Any, path: str, text: str, windows: list[torch.Tensor]) -> dict:
    """What the numbers were measured on."""
    ids = json.dumps([w.tolist() for w in windows]).encode()
    return {
        "model": path,
        "dtype": str(model.dtype).removeprefix("torch.") + " (attention weights in fp32)",
        "text": args.text_file.name,
        "text_sha256": sha256(text.encode()),
        "windows": len(windows),
        "tokens of a window": len(windows[0]),
        "ids_sha256": sha256(ids),
        "commit": commit(),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "numpy")),
        "device": device_name(model.device),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    spec = resolve_spec(args.model, max_length=sys.maxsize, chat_template=False)
    tokenizer = load_tokenizer(spec)
    text = read_text(args.text_file)
    windows = text_windows(tokenizer, text, tokens=args.tokens, windows=args.windows)
    dtype = parse_dtype(args.dtype)
    model = load_model(spec, dtype=dtype, device=args.device)
    layers = len(windows) * model.config.get_text_config().num_hidden_layers
    with tqdm(total=layers, unit="layer", desc="layers x windows") as bar:
        result = measure_asymmetry(
            model, windows, sink_size=args.sink_size, max_lag=args.max_lag, progress=lambda _: bar.update()
        )
    conditions = conditions_of(args, model, spec.path, text, windows)
    print(write_report(result, conditions, args.out, figures=not args.no_figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
