"""Writes kvpress_positions.json: the positions that kvpress 0.5.5 keeps on a tiny random model.

    python tests/data/make_kvpress_positions.py      # in an environment with kvpress 0.5.5 and transformers < 5.3

tests/methods/test_kvpress.py holds the ``kvpress_*`` settings to them, without kvpress.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import kvpress
import torch
from transformers import DynamicCache

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from kvpress_model import TOKENIZER, ids, model  # noqa: E402

RATIOS = (0.5, 0.25)


def presses(r: float) -> dict[str, tuple[dict, object]]:
    """Setting name and overrides on our side; the press on theirs."""
    snapkv, expected = kvpress.SnapKVPress, kvpress.ExpectedAttentionPress
    return {
        "snapkv": ({}, snapkv(r)),
        "snapkv narrow": ({"window_size": 32, "kernel_size": 7}, snapkv(r, window_size=32, kernel_size=7)),
        "pyramidkv": ({}, kvpress.PyramidKVPress(r)),
        "tova": ({}, kvpress.TOVAPress(r)),
        "keydiff": ({}, kvpress.KeyDiffPress(r)),
        "knorm": ({}, kvpress.KnormPress(r)),
        "h2o": ({}, kvpress.ObservedAttentionPress(r)),
        "expected_attention": ({}, expected(r)),
        "expected_attention near": ({"n_future_positions": 64, "epsilon": 0.02}, expected(r, 64, epsilon=0.02)),
        "streaming_llm": ({}, kvpress.StreamingLLMPress(r)),
        "adakv_snapkv": ({}, kvpress.AdaKVPress(snapkv(r))),
        "adakv_expected_attention": ({}, kvpress.AdaKVPress(expected(r))),
        "chunkkv": ({}, kvpress.ChunkKVPress(snapkv(r))),
        "chunkkv short": ({"chunk_length": 10}, kvpress.ChunkKVPress(snapkv(r), chunk_length=10)),
        "chunkkv alone": ({"chunk_length": 400}, kvpress.ChunkKVPress(snapkv(r), chunk_length=400)),
        "kvzip": ({}, kvpress.KVzipPress(r)),
    }


def kept(lm: torch.nn.Module, press: object, prompt: torch.Tensor, full: DynamicCache) -> list[list[str]]:
    """Positions kept per layer and KV head, as a bit mask in hex."""
    cache = DynamicCache()
    with torch.no_grad(), press(lm):
        lm.model(input_ids=prompt, past_key_values=cache)
    out = []
    for index, layer in enumerate(lm.model.layers):
        masked = getattr(layer.self_attn, "masked_key_indices", None)
        layer.self_attn.masked_key_indices = None
        keys, left = full.layers[index].keys[0], cache.layers[index].keys[0]
        heads = []
        for head in range(keys.shape[0]):
            if masked is not None:
                gone = set(masked[2][masked[1] == head].tolist())
                positions = [i for i in range(keys.shape[1]) if i not in gone]
            elif left.shape[1] == keys.shape[1]:
                positions = list(range(keys.shape[1]))
            else:
                positions = torch.cdist(left[head].double(), keys[head].double()).argmin(1).tolist()
            heads.append(f"{sum(1 << p for p in positions):x}")
        out.append(heads)
    return out


def main() -> None:
    prompt, cases = ids(), []
    with tempfile.TemporaryDirectory() as folder:
        TOKENIZER().save_pretrained(folder)
        for ratio in RATIOS:
            for name, (settings, press) in presses(1 - ratio).items():
                lm = model()
                lm.config._name_or_path = lm.name_or_path = folder
                lm.set_attn_implementation("eager" if name == "h2o" else "sdpa")
                full = DynamicCache()
                with torch.no_grad():
                    lm.model(prompt, past_key_values=full)
                masks = kept(lm, press, prompt, full)
                cases.append({"setting": f"kvpress_{name.split()[0]}", "overrides": settings, "ratio": ratio,
                              "kept": masks})  # fmt: skip
                print(name, ratio, sum(int(h, 16).bit_count() for heads in masks for h in heads))
    versions = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    table = {"versions": versions, "cases": cases}
    (HERE / "kvpress_positions.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
