"""Calibrates ZACK's bases for one model, once: leading directions of queries and keys, and of values.

    python scripts/calibrate_zack.py --model smollm2 --text-file report.txt                 # minutes on one CPU core
    python scripts/calibrate_zack.py --model smollm2 --text-file report.txt --samples 4     # less text

The bases go where ``dimensions="zack"`` looks for them (``$ASYMKV_CACHE`` or the user's cache folder), or into
``--out``; they serve every ratio. The same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from asymkv.analysis.zack_basis import calibrate
from asymkv.arguments import DTYPES
from asymkv.dimensions.basis import OBJECTIVES, UNFINISHED, Basis, default_folder
from asymkv.dimensions.ranks import choose_ranks
from asymkv.head_scores import model_of
from asymkv.longbench.models import load_model, load_tokenizer, parse_dtype, resolve_spec
from asymkv.texts import read_text, samples_of


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="short name of configs/models.yaml, hub id or folder")
    add("--text-file", type=Path, required=True, help="text to calibrate on; best of the kind that will be read")
    add("--tokens", type=int, default=2048, help="tokens of one sample, at most the model's window")
    add("--samples", type=int, default=32, help="samples of the text at most")
    add("--out", type=Path, help="folder for the basis instead of the user's cache folder")
    add("--dtype", default="float32", choices=DTYPES, help="of the model while it is calibrated")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    spec = resolve_spec(args.model, max_length=sys.maxsize, chat_template=False)
    dtype = parse_dtype(args.dtype)
    model, tokenizer = load_model(spec, dtype=dtype, device=args.device), load_tokenizer(spec)
    size = min(args.tokens, model.config.max_position_embeddings)
    samples = samples_of(read_text(args.text_file), tokenizer, size, args.samples)
    folder = args.out or default_folder(model_of(model))
    with tqdm(total=len(samples), unit="sample", desc="zack") as bar:
        try:
            basis = calibrate(model, samples, folder=folder, progress=lambda done: bar.update(done - bar.n))
        except KeyboardInterrupt:
            print(f"interrupted; the same command goes on from what is in {folder}", file=sys.stderr)
            return 130
    print(f"basis: {basis.save(folder)}")
    (folder / UNFINISHED).unlink(missing_ok=True)
    report(basis)
    return 0


def report(basis: Basis) -> None:
    """Prints the energy that each share of dimensions keeps, and the ranks of the layers."""
    size = basis.joint.keys.shape[-1]
    block = min(8, max(size // 16 * 2, 2))
    for objective, ratio in itertools.product(OBJECTIVES, (0.75, 0.5, 0.25)):
        found = basis.of(objective)
        for name, energy in (("keys", found.key_energy), ("values", found.value_energy)):
            ranks = choose_ranks(energy, ratio, "layer", multiple=block, least=block)
            inside = torch.arange(size) < ranks[..., None]
            share = ((energy * inside).sum(-1) / energy.sum(-1)).mean()
            print(f"{objective}: {ratio:.0%} of {size} dimensions of {name}: {share:.4f} of the energy, "
                  f"ranks of the layers {' '.join(str(r) for r in ranks[:, 0].tolist())}")


if __name__ == "__main__":
    sys.exit(main())
