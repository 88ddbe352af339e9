"""Bases of the tiny models, calibrated once per process, and settings that point to them."""

from __future__ import annotations

import atexit
import shutil
import tempfile

import torch
from tiny_models import FAMILIES, prompt, tiny_model
from torch import nn

from asymkv.analysis.zack_basis import calibrate
from asymkv.head_scores import model_of


def even_model() -> nn.Module:
    """A tiny llama whose queries score every key alike."""
    model = tiny_model()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                p.zero_()
    return model


def _calibrated() -> str:
    folder = tempfile.mkdtemp(prefix="zack-bases-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.set_num_threads(1)
    for model in [*map(tiny_model, FAMILIES), even_model()]:
        basis = calibrate(model, [prompt(64, seed=9)[0]])
        basis.save(f"{folder}/{model_of(model)['weights_sha256'][:16]}")
    return folder


BASES = _calibrated()


def zack(ratio: float | None = 0.5, **settings) -> dict:
    """``dimensions`` for a tiny model (heads of 16), in blocks of 4."""
    return {"kind": "zack", "ratio": ratio, "basis": BASES, "multiple": 4, "least": 4, **settings}
